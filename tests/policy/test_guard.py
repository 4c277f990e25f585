"""What is called a divergence, and what isn't: by simulated runs, healthy ones and ones that blow up."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from numpy.random import Generator, default_rng

from ckptstore import FormatError, diverged
from ckptstore.policy.guard import Divergence

Curve = np.ndarray[Any, np.dtype[np.float64]]
NOISES = (0.0, 0.001, 0.01, 0.05)


def first(values: Iterable[float], **rule: Any) -> Divergence | None:
    """The first divergence in ``values``, which begin at step 1."""
    watch = diverged(**rule).watch()
    return next((found for step, value in enumerate(values, 1) if (found := watch.see(step, value))), None)


def noise(random: Generator, kind: str, steps: int) -> Curve:
    """Of deviation 1, or thereabouts, about 0."""
    if kind == "normal":
        return random.standard_normal(steps)
    if kind == "heavy tails":
        return random.standard_t(3, steps) / 1.7
    if kind == "skewed":
        return random.exponential(1, steps) - 1
    if kind == "outliers":
        return np.where(random.random(steps) < 0.02, random.uniform(-1, 10, steps), random.standard_normal(steps))
    correlated, last = np.empty(steps), 0.0
    for step, value in enumerate(random.standard_normal(steps).tolist()):
        correlated[step] = last = 0.8 * last + 0.6 * value
    return correlated


def falling(random: Generator, steps: int) -> Curve:
    """A loss without noise: exponential, as a power, or with a plateau at first."""
    start, time = random.uniform(2, 12), np.arange(steps)
    end = start * random.choice([0.5, 0.3, 0.1, 0.01, 0.001])
    pace = random.choice([50, 300, 2000, 8000])
    shape = [
        np.exp(-time / pace),
        (1 + time / pace) ** -0.5,
        1 / (1 + np.exp(np.minimum((time - 4 * pace) / pace * 2, 700))),
    ]
    return np.asarray(end + (start - end) * shape[random.integers(3)])


def healthy(random: Generator, steps: int) -> Curve:
    """A run as they are: warmed up, noisy, with spikes that recover and learning rates that are restarted."""
    time, loss = np.arange(steps), falling(random, steps)
    if warmed := random.random() < 0.5:
        loss *= 1 + random.uniform(0, 0.3) * np.exp(-(((time - 200) / 80) ** 2))
    if restarted := random.random() < 0.3:
        for since in (time - restart for restart in range(2000, steps, 2000)):
            rise = (1 - np.exp(-np.maximum(since, 0) / 100)) * np.exp(-np.maximum(since, 0) / 800)
            loss *= 1 + random.uniform(0, 0.1) * rise
    kind = random.choice(["normal", "heavy tails", "skewed", "outliers", "correlated"])
    amount = random.choice([0, 0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4])
    noisy = loss + amount * noise(random, kind, steps) * (loss if random.random() < 0.5 else loss[-1])
    if random.random() < 0.5:
        for spike in np.flatnonzero(random.random(steps) < 1e-3):
            since = np.arange(steps - spike)
            height, life = random.choice([(0.3, 3), (1, 3), (4, 3), (99, 0.1)])
            noisy[spike:] += loss[spike] * height * np.exp(-since / life)
    # Some losses go below zero.
    return noisy if warmed or restarted or random.random() < 0.8 else noisy - loss[0] * random.uniform(0.5, 2)


def test_healthy_runs_are_left_alone(full: bool) -> None:
    """In 50 simulated runs of 10,000 steps (all: 1,000) nothing is called a divergence."""
    random = default_rng(6)
    found = [first(healthy(random, 10_000).tolist()) for _ in range(1000 if full else 50)]
    assert found == [None] * len(found)


def settled(random: Generator, amount: float, steps: int) -> tuple[Curve, Curve, int]:
    """A loss that has settled, its noise as factors, and the step after which something may happen to it."""
    start, pace = random.uniform(2, 12), random.choice([30, 100, 200])
    end = start * random.choice([0.4, 0.1, 0.01])
    at = int(8 * pace + random.integers(600, 1000))
    kind = random.choice(["normal", "heavy tails", "correlated"])
    return end + (start - end) * np.exp(-np.arange(steps) / pace), 1 + amount * noise(random, kind, steps), at


@pytest.mark.parametrize("amount", NOISES)
@pytest.mark.parametrize(
    ("kind", "within"), [("triples", 30), ("initial", 30), ("wild", 30), ("30%", 30), ("5%", 40), ("1%", 80)]
)
def test_every_blow_up_is_found(kind: str, within: int, amount: float) -> None:
    """Within the stated steps, never before it begins, and what is called good is from before the loss got bad."""
    random = default_rng(7)
    for _ in range(20):
        loss, factors, at = settled(random, amount, 3000)
        since = np.maximum(np.arange(3000) - at, 0)
        blown = {
            "triples": np.where(since > 0, 3 * loss, loss),
            "initial": np.where(since > 0, loss[0], loss),
            "wild": np.where(since > 0, loss * random.uniform(3, 1000, 3000), loss),
        }
        if kind.endswith("%"):
            blown[kind] = loss * np.exp(np.minimum(since * math.log1p(int(kind[:-1]) / 100), 600))
        found = first((blown[kind] * factors).tolist())
        # Steps begin at 1: the first bad value is the one of step at + 2.
        assert found is not None
        assert at + 2 <= found.step <= at + 2 + within
        assert at - 100 <= found.since < found.step
        assert blown[kind][found.since - 1] <= 2 * loss[found.since - 1]
        if not kind.endswith("%"):
            assert found.since <= at + 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e305])
@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("before", [0, 1, 50, 500])
def test_what_is_no_number_diverges_at_once(before: int, mode: str, value: float) -> None:
    """Also before anything was learnt."""
    found = first([*[2.0] * before, value], mode=mode)
    assert found is not None
    assert (found.step, found.since) == (before + 1, before)
    assert f"loss is {value:g}" in str(found)


@pytest.mark.parametrize("outlier", [3.0, 100.0, 1e6, 1e299])
@pytest.mark.parametrize("count", [1, 5, 15])
@pytest.mark.parametrize("loss", [2.0, -2.0, 1e-9])
def test_outliers_recover(loss: float, count: int, outlier: float) -> None:
    """Up to 15 bad values in a row are none of a divergence, and what comes later is judged as before."""
    watch = diverged().watch()
    steady = [loss * (1 + 0.01 * math.sin(step)) for step in range(3000)]
    bad = steady[:1000] + [outlier] * count + steady[:2000]
    assert not any(watch.see(step, value) for step, value in enumerate(bad))
    lasting = [watch.see(step, value) for step, value in enumerate([abs(loss) * 10] * 30, len(bad))]
    assert any(lasting)


def test_only_worse_is_far() -> None:
    """A loss may fall as it will, an accuracy rise; each the other way round is a divergence."""
    random = default_rng(8)
    steps = [2 + 0.01 * random.standard_normal() + (5 if step > 500 else 0) for step in range(600)]
    assert first(steps, metric="acc") is None
    assert first([-value for value in steps]) is None
    up, down = first(steps), first([-value for value in steps], metric="acc")
    assert up is not None
    assert down is not None
    assert (up.step, up.since) == (down.step, down.since)
    assert first([-value for value in steps], mode="max") == Divergence(
        down.step, "loss", down.value, down.why, down.since
    )
    assert "lately -" in down.why


def test_a_good_value_among_bad_ones() -> None:
    """Doesn't make the step a good one."""
    found = first([2.0] * 1000 + [9.0] * 12 + [2.0] + [9.0] * 30)
    assert found is not None
    assert (found.step > 1014, found.since) == (True, 1000)


def test_a_level_that_was_left_is_forgotten() -> None:
    """However high it was, a loss that triples 700 steps later is found."""
    found = first([10.0] * 200 + [0.1] * 700 + [0.3] * 30)
    assert found is not None
    assert found.since == 900


def test_an_outlier_to_the_good_side() -> None:
    """However good, what follows isn't far from it, and a blow-up is still found."""
    steady = [2 + 0.01 * math.sin(step) for step in range(1000)]
    assert first([*steady, -1e6, *steady, 1e-9, *steady]) is None
    found = first([*steady, -1e6, *steady[:30], *[6.0] * 30])
    assert found is not None
    assert found.since <= 1031


def test_any_fall_is_fine() -> None:
    """However steep, and also below zero and after a plateau."""
    for fall in (lambda t: -(1.05**t), lambda t: -t, lambda t: 1e6 * 0.9**t, lambda t: 5.0 if t < 400 else -1e9):
        assert first(map(fall, range(2000))) is None


def test_slow_drifts_are_fine() -> None:
    """A loss that rises by a tenth in 1,000 steps hasn't blown up."""
    random = default_rng(9)
    assert first(2 + 0.0002 * step + 0.02 * random.standard_normal() for step in range(10_000)) is None


def test_constant_losses() -> None:
    """Rounding noise isn't far, about whatever value; nor is what comes and goes after nothing but zeros."""
    for value in (0.0, 2.0, -3.0, 1e-30, 1e200):
        assert first(value * (1 + 1e-7 * (step % 7)) for step in range(2000)) is None
    assert first([5 * 0.9**step for step in range(3000)] + [1e-6 * (step % 3 + 1) for step in range(2000)]) is None
    assert first([0.0] * 500 + [0.0, 0.0, 0.0, 0.1] * 500) is None
    assert first([0.0] * 500 + [1.0] * 30) is not None


def test_nothing_is_far_at_first() -> None:
    """The first ``after`` values only teach."""
    values = [1.0] * 20 + [100.0] * 60
    assert first(values) is None
    found = first(values, after=20)
    assert found is not None
    assert (20 < found.step <= 45, found.since) == (True, 20)
    assert first([1.0] * 20 + [2.0] * 60, after=20, far=40) is None


def test_since_begins_before_the_first_value() -> None:
    """Where nothing was ever well, nothing that was seen is called good."""
    watch = diverged().watch()
    found = watch.see(70, math.nan)
    assert found == Divergence(70, "loss", math.nan, "is nan", 69) or (found is not None and found.since == 69)
    assert str(found) == "step 70: loss is nan; all was well until step 69"


def test_a_resumed_run_goes_on() -> None:
    """The state crosses JSON, and what comes later is judged as if nothing had happened."""
    random = default_rng(10)
    values = [*(falling(random, 700) + 0.1 * random.standard_normal(700)).tolist(), *[20.0] * 40]
    whole, part = diverged().watch(), diverged().watch()
    for step, value in enumerate(values[:400]):
        assert whole.see(step, value) == part.see(step, value)
    state = json.loads(json.dumps(part.state_dict()))
    again = diverged().watch()
    again.load_state_dict(state)
    rest = [(whole.see(step, value), again.see(step, value)) for step, value in enumerate(values[400:], 400)]
    assert all(one == other for one, other in rest)
    assert any(one for one, _ in rest)
    fresh = diverged().watch()
    empty = diverged().watch().state_dict()
    fresh.load_state_dict(empty)
    assert fresh.state_dict() == empty


@pytest.mark.parametrize(
    "change",
    [
        {"seen": -1},
        {"seen": 1.5},
        {"long": math.nan},
        {"short": "1"},
        {"since": 2.5},
        {"since": None},
        {"deviation": None},
    ],
    ids=str,
)
def test_other_states_are_refused(change: dict[str, Any]) -> None:
    """Nothing changes by a state that can't be."""
    watch = diverged().watch()
    watch.see(1, 2.0)
    before = watch.state_dict()
    with pytest.raises(FormatError, match=f"no state of diverged\\('loss'\\): {next(iter(change))}"):
        watch.load_state_dict(before | change)
    with pytest.raises(FormatError, match="seen"):
        watch.load_state_dict({})
    assert watch.state_dict() == before


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        ({}, "diverged('loss')"),
        ({"metric": "acc", "far": 4, "after": 10, "mode": "max"}, "diverged('acc', far=4, after=10, mode='max')"),
        ({"far": 2.5}, "diverged('loss', far=2.5)"),
    ],
)
def test_is_written_as_text(rule: dict[str, Any], text: str) -> None:
    """As it is written, and two that are written alike are equal."""
    assert str(diverged(**rule)) == text
    assert eval(text, {"diverged": diverged}) == diverged(**rule)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"metric": ""}, "name of a metric"),
        ({"metric": 3}, "name of a metric"),
        ({"metric": "best:loss"}, "name of a metric"),
        ({"mode": "up"}, "'auto', 'min' or 'max'"),
        ({"far": 0}, r"far=0\) must"),
        ({"far": math.inf}, r"far=inf\) must"),
        ({"far": "10"}, r"far='10'\) must"),
        ({"after": 0}, r"after=0\) must"),
        ({"after": 1.5}, r"after=1.5\) must"),
        ({"after": True}, r"after=True\) must"),
    ],
)
def test_what_can_not_be_is_refused(rule: dict[str, Any], message: str) -> None:
    """At once, saying what and why."""
    with pytest.raises(FormatError, match=message):
        diverged(**rule)
