"""The interval that follows from what saving costs and how often the machine fails."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ckptstore as cs
from ckptstore.policy.budget import FIRST_S, Budget, Interval
from ckptstore.policy.progress import Costs, Length, Past, Progress

UNKNOWN = Length()
SECONDS = st.floats(1e-3, 1e4)
HOURS = st.floats(60, 1e7)


def interval(stall_s: float, mtbf: float | str, overhead: float | str = "99%", **costs: float) -> Interval:
    """Where nothing but the failures decides, if nothing else is said."""
    made = cs.budget(overhead, mtbf)
    assert isinstance(made, Budget)
    return made.interval(Costs(**({"step_s": 1e-6, "save_s": 0.0} | costs), stall_s=stall_s))


@pytest.mark.parametrize(
    ("stall_s", "mtbf_s", "expected_s"),
    # Reckoned with 30 digits: sqrt(2dM) * (1 + sqrt(d/2M)/3 + (d/2M)/9) - d.
    [
        (60, 86400, 3180.062113598447),
        (300, 86400, 7001.388888888889),
        (5, 21600, 461.430645037708),
    ],
)
def test_daly(stall_s: float, mtbf_s: float, expected_s: float) -> None:
    assert interval(stall_s, mtbf_s).interval_s == pytest.approx(expected_s, rel=1e-9)


def test_the_least_time_is_lost() -> None:
    """Of all intervals the chosen one costs least in all, by the complete model of exponentially distributed failures.

    Time that a run takes for each second of training, with saves of d seconds, failures every M seconds and restarts
    that take nothing: M * (e^((t + d) / M) - 1) / t.
    """
    from math import expm1

    for stall, mtbf in [(5.0, 3600.0), (60.0, 21_600.0), (300.0, 7200.0)]:
        chosen = interval(stall, mtbf).interval_s

        def cost(training: float, stall: float = stall, mtbf: float = mtbf) -> float:
            return mtbf * expm1((training + stall) / mtbf) / training

        least = min(cost(chosen * share / 1000) for share in range(200, 5000))
        assert cost(chosen) <= least * 1.0005


@given(SECONDS, HOURS, st.floats(1e-4, 0.9), SECONDS, SECONDS)
def test_bounds(stall: float, mtbf: float, overhead: float, save: float, step: float) -> None:
    """Never over the overhead, never shorter than a save or a step takes; and it tells which of these decided."""
    chosen = interval(stall, mtbf, overhead, save_s=save, step_s=step)
    assert chosen.overhead <= overhead * (1 + 1e-9)
    assert chosen.interval_s >= max(save, step)
    assert chosen.overhead == pytest.approx(stall / (chosen.interval_s + stall))
    assert chosen.loss_s == pytest.approx(chosen.interval_s / 2 + save)
    decided = {
        "save time": save,
        "step time": step,
        "overhead": stall / overhead - stall,
        "mtbf": interval(stall, mtbf).interval_s,
    }
    assert chosen.bound_by in decided
    assert chosen.interval_s == pytest.approx(max(decided.values()), rel=1e-6, abs=1e-6)
    assert decided[chosen.bound_by] == pytest.approx(max(decided.values()), rel=1e-6, abs=1e-6)


@given(SECONDS, HOURS, st.floats(1, 10), st.floats(1e-4, 0.9))
def test_monotone(stall: float, mtbf: float, factor: float, overhead: float) -> None:
    """Rarer failures and dearer saves make it longer, a larger overhead shorter."""
    chosen = interval(stall, mtbf, overhead).interval_s * (1 - 1e-9)
    assert interval(stall, mtbf * factor, overhead).interval_s >= chosen
    assert interval(stall * factor, mtbf, overhead).interval_s >= chosen
    assert interval(stall, mtbf, overhead / factor).interval_s >= chosen


@given(st.floats(0, 1e-9), HOURS)
def test_saves_that_cost_nothing(stall: float, mtbf: float) -> None:
    """Are made as often as they can be, and nothing is divided by zero."""
    chosen = interval(stall, mtbf, save_s=2.0)
    assert chosen.interval_s == pytest.approx(2.0)
    assert (chosen.bound_by, chosen.overhead) == ("save time", pytest.approx(0.0, abs=1e-6))


def test_a_machine_that_fails_faster_than_it_saves() -> None:
    """Trains for as long as it stays up."""
    assert interval(100.0, 40.0).interval_s == 40.0


def test_what_it_tells() -> None:
    chosen = cs.budget("1%", "6h").interval(Costs(step_s=0.5, stall_s=1.0, save_s=30.0))
    assert chosen.bound_by == "mtbf"
    assert str(chosen).startswith("a save every 3.453m ")
    assert "(bound by mtbf): training waits 0.48% of the time, a failure costs 2.2 minutes on average" in str(chosen)


def test_when_it_is_due() -> None:
    """A minute in, before it is known what a save costs; then at the interval since whichever save was the last."""
    schedule, past = cs.budget("50%", "6h"), Past(step=0)
    costs = Costs(step_s=1.0, stall_s=0.001, save_s=100.0)
    assert schedule.due(Progress(step=59, elapsed_s=FIRST_S - 1), past, UNKNOWN) == []
    first = Progress(step=60, elapsed_s=FIRST_S)
    assert schedule.due(first, past, UNKNOWN) == ["budget, the first save"]
    past = past.decided(first).saved(first, ["budget, the first save"])
    assert schedule.due(Progress(step=61, elapsed_s=61.0, costs=costs), past, UNKNOWN) == []
    # One that somebody made by hand counts: what matters is how much would be lost.
    past = past.saved(Progress(step=100, elapsed_s=100.0), ["by hand"])
    assert schedule.due(Progress(step=199, elapsed_s=199.9, costs=costs), past, UNKNOWN) == []
    due = Progress(step=200, elapsed_s=200.0, costs=costs)
    assert schedule.due(due, past, UNKNOWN) == ["budget, every 100s"]
    # That save failed: it is due until one succeeds.
    later = Progress(step=201, elapsed_s=201.0, costs=costs)
    assert schedule.due(later, past.decided(due), UNKNOWN) == ["budget, every 100s"]


@pytest.mark.parametrize(
    "overhead", [0, 1, -0.5, 1.5, True, "1", "0%", "100%", "-1%", "x", float("nan"), None, 10**400]
)
def test_what_is_no_overhead(overhead: object) -> None:
    with pytest.raises(cs.FormatError, match=r"over 0 and below 100 %, as '1%' or 0.01"):
        cs.budget(overhead)  # type: ignore[arg-type]


@pytest.mark.parametrize("mtbf", [0, -1, True, "6", "0h", "6y", float("nan"), float("inf"), None, 10**400, 1e300])
def test_what_is_no_mtbf(mtbf: object) -> None:
    with pytest.raises(cs.FormatError, match="mtbf"):
        cs.budget(mtbf=mtbf)  # type: ignore[arg-type]
