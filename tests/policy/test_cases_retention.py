"""What stays and what goes, checkpoint for checkpoint; the order is that of saving, never a step or a clock."""

from __future__ import annotations

from datetime import timedelta
from functools import reduce
from operator import or_

import pytest

import ckptstore as cs
from ckptstore.policy.judge import judge
from ckptstore.policy.plan import Foreseen
from ckptstore.policy.progress import Length
from ckptstore.policy.retention import Keep
from tests.policy.histories import NOW, saved, staying, steps
from tests.policy.runs import whole


def with_losses(losses: dict[int, float], name: str = "loss") -> list[Foreseen]:
    return [saved(step, metrics={name: value}) for step, value in losses.items()]


def test_D09_the_first_saved_goes_first() -> None:
    """Whatever its step."""
    assert steps(cs.last(3), [saved(step) for step in (300, 100, 200, 400)]) == [100, 200, 400]


@pytest.mark.parametrize(("limit", "count", "left"), [(3, 2, 2), (3, 3, 3), (3, 4, 3), (2, 5, 2), (3, 0, 0)])
def test_D10_no_more_than_the_limit(limit: int, count: int, left: int) -> None:
    """Where too many are there by now, all of these go at once, and not one after each save."""
    history = [saved(step) for step in range(count)]
    assert steps(cs.last(limit), history) == list(range(count))[count - left :]


def test_D11_the_best_stays_though_it_is_the_oldest() -> None:
    history = with_losses({100: 0.1, 200: 0.5, 300: 0.4, 400: 0.3})
    assert steps(cs.last(2) | cs.best("loss"), history) == [100, 300, 400]


def test_D12_two_best_of_five() -> None:
    history = with_losses({100: 0.10, 200: 0.15, 300: 0.50, 400: 0.40, 500: 0.30})
    assert steps(cs.last(2) | cs.best("loss", n=2), history) == [100, 200, 400, 500]


@pytest.mark.parametrize(
    ("metric", "values", "count", "best"),
    [
        ("loss", [2.5, 2.3, 2.7, 2.1, 2.4, 1.9], 3, {1.9, 2.1, 2.3}),
        ("accuracy", [0.85, 0.87, 0.83, 0.89, 0.86, 0.91], 3, {0.91, 0.89, 0.87}),
        ("loss", [1.0, 0.5, 0.7], 2, {0.5, 0.7}),
    ],
)
def test_D14_the_best_ones_in_any_order(metric: str, values: list[float], count: int, best: set[float]) -> None:
    history = [saved(step, metrics={metric: value}) for step, value in enumerate(values)]
    kept = staying(cs.best(metric, count), history)
    # In each of these the newest is among the best.
    assert {c.metrics[metric] for c in kept} == best
    there: list[Foreseen] = []
    for new in history:
        there = staying(cs.best(metric, count), [*there, new])
    assert there == kept


def test_D16_smaller_is_better_by_the_name() -> None:
    """Of a loss, an error and a perplexity; and as it was saved or is written, where the name doesn't tell."""
    values = {1: 0.2, 2: 0.9, 3: 0.5}
    for name in ("loss", "eval_loss", "val/Loss", "word_error_rate", "perplexity"):
        assert steps(cs.best(name), with_losses(values, name)) == [1, 3]
    for name in ("acc", "eval_f1", "x"):
        assert steps(cs.best(name), with_losses(values, name)) == [2, 3]
        assert steps(cs.best(name, mode="min"), with_losses(values, name)) == [1, 3]
    recorded = [saved(step, metrics={"x": value}, modes={"x": "min"}) for step, value in values.items()]
    assert steps(cs.best("x"), recorded) == [1, 3]
    assert steps(cs.best("x", mode="max"), recorded) == [2, 3]


def test_D16_a_metric_has_one_name() -> None:
    """Decided: "x" is not looked for as "eval_x" as well, as both may be there and differ."""
    both = [saved(1, metrics={"x": 1.0, "eval_x": 0.0}), saved(2, metrics={"x": 0.0, "eval_x": 1.0}), saved(3)]
    assert steps(cs.best("x"), both) == [1, 3]
    assert steps(cs.best("eval_x"), both) == [2, 3]


def test_D17_nothing_that_comes_later_makes_one_newer() -> None:
    """Neither a time nor metrics."""
    history = [saved(1, created=NOW + timedelta(days=9), metrics={"loss": 1.0}), saved(2), saved(3)]
    assert steps(cs.last(1), history) == [3]
    assert steps(cs.last(2), history) == [2, 3]


def test_D29_a_run_with_a_limit_and_the_two_best() -> None:
    losses = {25: 0.3, 50: 0.1, 75: 0.2, 100: 0.4}
    keep = cs.last(3) | cs.best("val_loss", n=2)
    there: list[Foreseen] = []
    for step in whole(cs.every(steps=25), Length.of(100)).steps:
        there = staying(keep, [*there, saved(step, metrics={"val_loss": losses[step]})])
        best = sorted(value for known, value in losses.items() if known <= step)[:2]
        assert set(best) <= {c.metrics["val_loss"] for c in there}
        assert len(there) <= 5
    assert [c.step for c in there] == [50, 75, 100]


def test_T01_three_rolling_ones() -> None:
    """The newest and the one before it are among them, and no copies."""
    assert steps(cs.last(3), [saved(step) for step in (10, 20, 30, 40, 50)]) == [30, 40, 50]


def test_T02_one_checkpoint_in_many_roles() -> None:
    """An epoch's end that is the best is kept for both, once."""
    history = [saved(100, epoch=1, metrics={"loss": 0.1}), *[saved(step, metrics={"loss": 1.0}) for step in (110, 120)]]
    judgement = judge(cs.last(1) | cs.epochs() | cs.best("loss"), history, now=NOW)
    assert [(v.stays, v.why) for v in judgement.verdicts][::2] == [
        (True, "end of epoch 1, the best loss"),
        (True, "the newest"),
    ]
    assert not judgement.verdicts[1].stays


def test_T03_epochs_are_counted_from_one() -> None:
    """Decided: an epoch is a completed one. Each end is kept, whatever else goes."""
    run = whole(cs.every(epochs=1) | cs.every(steps=10), Length.of(300, 3))
    assert [step for step, why in run.saved if any(w.startswith("epoch ") for w in why)] == [100, 200, 300]
    history = [saved(step, epoch=step // 100) for step in run.steps]
    judged = {v.step: v.why for v in judge(cs.epochs(), history, now=NOW).verdicts if v.stays}
    assert judged == {100: "end of epoch 1", 200: "end of epoch 2", 300: "end of epoch 3"}


def test_T04_steps_and_epochs_together() -> None:
    """Steps are completed ones: a step and an epoch that end together are one save."""
    run = whole(cs.every(steps=50) | cs.every(epochs=1), Length.of(300, 3))
    assert run.steps == [50, 100, 150, 200, 250, 300]
    assert dict(run.saved)[200] == ["every 50 steps", "epoch 2"]
    apart = whole(cs.every(steps=50) | cs.every(epochs=1), Length.of(steps_per_epoch=99, epochs=3))
    assert apart.steps == [50, 99, 100, 150, 198, 200, 250, 297]


@pytest.mark.parametrize("count", [0, -1, True, 1.0, "3", None])
def test_T10_none_is_no_count(count: object) -> None:
    """Decided: the newest always stays, so that 0 is an error and neither all nor none."""
    for rule in (cs.last, lambda n: cs.best("loss", n), cs.epochs, lambda n: cs.every_kept(steps=n)):
        with pytest.raises(cs.FormatError, match="must be a whole number of at least 1"):
            rule(count)  # type: ignore[operator]


def test_T11_the_same_step_twice() -> None:
    """By step and by epoch the newer one takes the place of the older."""
    history = [saved(10, id="first", epoch=1), saved(10, id="second", epoch=1), saved(11, epoch=1)]
    for rule in (cs.epochs(), cs.every_kept(steps=10), cs.epochs() | cs.every_kept(steps=5)):
        assert [c.id for c in staying(rule, history)] == ["second", "step 11"]


def test_T14_the_best_and_the_one_before() -> None:
    history = with_losses({10: 0.9, 20: 0.5, 30: 0.4, 40: 0.3})
    assert steps(cs.best("loss"), history) == [40]
    assert steps(cs.last(2), history) == [30, 40]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cs.best(""), "give the name of a metric, as best"),
        (lambda: cs.best("loss:min"), "give the name of a metric"),
        (lambda: cs.best(5), "give the name of a metric"),
        (lambda: cs.best("loss", mode="low"), "must be 'auto', 'min' or 'max'"),
        (lambda: cs.on_best(None), "give the name of a metric, as on_best"),
        (lambda: cs.on_best("loss", "up"), "must be 'auto', 'min' or 'max'"),
        (lambda: cs.within("7"), "'7' is no duration; write a number and a unit"),
        (lambda: cs.within("0d"), "must be a duration with its unit, as '7d'"),
        (lambda: cs.within(60), "must be a duration with its unit"),
        (lambda: cs.within("999999999999999d"), "must be a duration"),
        (lambda: cs.within("-1d"), "is no duration"),
        (lambda: cs.within("inf"), "is no duration"),
        (lambda: cs.at_most("9"), "'9' is no size; write a number and a unit"),
        (lambda: cs.at_most(0), "is no size"),
        (lambda: cs.at_most("0B"), "must be over 0, as '9GB'"),
        (lambda: cs.at_most(True), "is no size"),
        (lambda: cs.at_most(float("nan")), "is no size"),
        (lambda: cs.tagged(), r"tagged\(\): give reasons as text"),
        (lambda: cs.tagged("a", ""), "give reasons as text"),
        (lambda: cs.tagged(5), "give reasons as text"),
        (lambda: cs.every_kept(steps=True), "must be a whole number of at least 1"),
    ],
)
def test_what_is_no_rule(make: object, message: str) -> None:
    with pytest.raises(cs.FormatError, match=message):
        make()  # type: ignore[operator]


def test_many_at_once_need_a_person() -> None:
    """A wrong rule, or the wrong store."""
    few, many = [saved(step) for step in range(12)], [saved(step) for step in range(40)]
    assert judge(cs.last(9), few, now=NOW).needs_force is None
    assert judge(cs.last(3), few, now=NOW).needs_force == "9 of 12 checkpoints would go at once"
    assert judge(cs.last(20), many, now=NOW).needs_force is None
    assert judge(cs.last(19), many, now=NOW).needs_force == "21 of 40 checkpoints would go at once"


def test_why_one_stays() -> None:
    """By its place among the best, and for all reasons."""
    history = with_losses({1: 0.3, 2: 0.1, 3: 0.4, 4: 0.2})
    judgement = judge(cs.best("loss", 3) | cs.last(2), history, now=NOW, held={"step 3": ["b", "a"]})
    assert [verdict.why for verdict in judgement.verdicts] == [
        "3rd best loss",
        "the best loss",
        "one of the newest 2, held as a, b",
        "2nd best loss, one of the newest 2",
    ]


def test_why_one_goes() -> None:
    """Names the rules that don't keep it."""
    rules: list[Keep] = [cs.last(1), cs.milestones(), cs.tagged("final"), cs.within("1d")]
    history = [saved(1, created=NOW - timedelta(days=3)), saved(2)]
    [gone] = judge(reduce(or_, rules), history, now=NOW).going
    assert gone.why == "not kept by last(1) | milestones() | tagged('final') | within('1d')"
