"""Schedules of many saves in the first epoch and of fewer in later ones, number for number."""

from __future__ import annotations

from itertools import pairwise

import pytest

import ckptstore as cs
from ckptstore.policy.epochs import Spacing, first_epoch
from ckptstore.policy.progress import Length
from ckptstore.policy.schedule import Schedule
from tests.policy.runs import whole

FIRST_20 = [0, 17, 35, 52, 70, 87, 105, 122, 140, 157, 175, 192, 210, 227, 245, 262, 280, 297, 315, 333]
LOG = [[334, 336, 340, 348, 364, 396, 460, 588, 666], [667, 669, 673, 681, 697, 729, 793, 921, 1000]]
LINEAR_50 = [[334, 384, 434, 484, 534, 584, 634, 666], [667, 717, 767, 817, 867, 917, 967, 1000]]


def of_second(plan: Schedule) -> list[int]:
    """The steps in the second of three epochs of 1000 steps."""
    return [step for step in plan.steps(1000, 3) if 333 < step <= 666]


def test_S01_first_epoch_evenly_spread() -> None:
    assert first_epoch(100, 5) == [0, 25, 50, 75, 100]


def test_S02_first_epoch_of_few() -> None:
    """A plan itself refuses what makes no sense, where somebody wrote it."""
    assert [first_epoch(100, count) for count in (0, -1, 1)] == [[], [], [100]]
    assert [first_epoch(100, count) for count in (2, 3)] == [[0, 100], [0, 50, 100]]
    with pytest.raises(cs.FormatError, match=r"first=-1.*0 or more"):
        cs.epoch_plan(first=-1)


def test_S03_first_epoch_of_twenty_rounds_down() -> None:
    assert first_epoch(333, 20) == FIRST_20


def test_S04_first_epoch_of_five_rounds_down() -> None:
    assert first_epoch(333, 5) == [0, 83, 166, 249, 333]


def test_more_than_there_are_steps() -> None:
    """Each step once."""
    assert first_epoch(3, 10) == [0, 1, 2, 3]
    assert first_epoch(3, 4) == [0, 1, 2, 3]


def test_S06_epochs_end_where_the_run_does() -> None:
    assert Length.of(1000, 3).epoch_ends() == [333, 666, 1000]


def test_S07_log_spacing() -> None:
    assert cs.epoch_plan(20, "log", base=2).steps(1000, 3) == [*FIRST_20, *LOG[0], *LOG[1]]


def test_both_examples_number_for_number() -> None:
    assert cs.epoch_plan().steps(1000, 3) == [*FIRST_20, *LOG[0], *LOG[1]]
    linear = cs.epoch_plan(first=5, then="linear", interval=50)
    assert linear.steps(1000, 3) == [0, 83, 166, 249, 333, *LINEAR_50[0], *LINEAR_50[1]]


@pytest.mark.parametrize(
    ("base", "expected"),
    [(2, [336, 338, 342, 350, 366, 398, 462, 590, 666]), (3, [337, 343, 361, 415, 577, 666])],
)
def test_S09_log_offset(base: int, expected: list[int]) -> None:
    assert of_second(cs.epoch_plan(then="log_offset", base=base)) == expected


def test_S10_linear_spacing() -> None:
    steps = cs.epoch_plan(0, "linear", interval=50).steps(1000, 3)
    assert steps == [333, *LINEAR_50[0], *LINEAR_50[1]]


def test_S11_linear_interval_is_a_tenth_of_an_epoch() -> None:
    """Of few steps it is 1."""
    steps = of_second(cs.epoch_plan(0, "linear"))
    assert steps == [*range(334, 666, 33), 666]
    assert cs.epoch_plan(0, "linear").steps(18, 2) == list(range(9, 19))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"then": "invalid"}, "'log', 'linear', 'log_offset'"),
        ({"base": 1}, "base=1. must be over 1"),
        ({"base": 0}, "base=0. must be over 1"),
        ({"base": -2}, "base=-2. must be over 1"),
        ({"base": True}, "must be over 1"),
        ({"base": float("nan")}, "must be over 1"),
        ({"base": float("inf")}, "must be over 1"),
        ({"base": 10**400}, "must be over 1"),
        ({"then": "linear", "interval": 0}, "interval.*=0 must be a whole number of at least 1"),
        ({"then": "linear", "interval": -5}, "interval.*=-5 must be a whole number of at least 1"),
        ({"then": "log", "interval": 50}, "interval=50. is for then='linear'.*leave out one"),
        ({"min_interval": 0}, "min_interval.*=0 must be"),
        ({"min_interval": True}, "min_interval.*=True must be"),
        ({"first": 2.0}, "first=2.0. must be a whole number"),
        ({"first": True}, "first=True. must be a whole number"),
    ],
)
def test_S12_what_can_not_be(given: dict[str, object], message: str) -> None:
    """Said where it is written, and what it must be."""
    with pytest.raises(cs.FormatError, match=message):
        cs.epoch_plan(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize("spacing", ["log", "linear", "log_offset"])
@pytest.mark.parametrize("first", [0, 1, 5])
def test_S13_sorted_unique_within_with_each_end(spacing: Spacing, first: int) -> None:
    steps = cs.epoch_plan(first, spacing).steps(1000, 3)
    assert steps == sorted(set(steps))
    assert steps[-1] == 1000
    assert {333, 666, 1000} <= set(steps)


def test_S14_min_interval() -> None:
    """Without one nothing is left out; with one nothing lies nearer, but for ends of epochs."""
    assert cs.epoch_plan(min_interval=1).steps(1000, 3) == cs.epoch_plan().steps(1000, 3)
    steps = cs.epoch_plan(min_interval=100).steps(1000, 3)
    assert {0, 333, 666, 1000} <= set(steps) < set(cs.epoch_plan().steps(1000, 3))
    assert all(later - one >= 100 for one, later in pairwise(steps))


def test_S15_steps_named_one_by_one() -> None:
    """None at all is an error, not a run that is never saved."""
    assert cs.at(10, 20, 30, 40, 50).steps(100) == [10, 20, 30, 40, 50]
    with pytest.raises(cs.FormatError, match="give at least one step"):
        cs.at()


def test_S16_steps_of_an_epoch() -> None:
    """From the data set where it is known, or else from the total."""
    assert Length.of(1000, 3).steps_per_epoch == 333
    assert Length.of(dataset_size=1000, batch_size=32, accumulation=8, epochs=2).steps_per_epoch == 4
    assert Length.of(dataset_size=1000, batch_size=32, accumulation=8, epochs=2).total_steps == 8
    assert Length.of(epochs=2, fallback_steps_per_epoch=100).total_steps == 200


def test_S18_step_0_and_the_last_one_are_saved() -> None:
    """0 before any update, and each after just so many."""
    assert whole(cs.at(0, 5, 10), Length.of(10)).steps == [0, 5, 10]


def test_S19_the_same_again() -> None:
    first, second = cs.epoch_plan(7, "log", base=1.5), cs.epoch_plan(7, "log", base=1.5)
    assert first == second
    assert first.steps(1000, 3) == second.steps(1000, 3)


@pytest.mark.parametrize("base", [1 + 2**-52, 1.0000001, 1.001, 1.5, 1e300])
@pytest.mark.parametrize("spacing", ["log", "log_offset"])
def test_bases_that_hardly_grow_end(base: float, spacing: Spacing) -> None:
    """Either they can be listed, or the plan is refused; and few saves of a long run are few."""
    plan = cs.epoch_plan(2, spacing, base=base)
    if spacing == "log_offset" and base < 1.001:
        with pytest.raises(cs.FormatError, match="write longer intervals"):
            plan.steps(3000, 3)
    else:
        assert plan.steps(3000, 3)[-1] == 3000
    assert len(cs.epoch_plan(2, spacing, base=1.5).steps(10**12, 3)) < 250


def test_a_run_that_ends_within_an_epoch() -> None:
    """Its end is saved; what would lie behind it isn't planned."""
    assert cs.epoch_plan(3, "linear", interval=20).steps(130, steps_per_epoch=50) == [
        *[0, 25, 50],
        *[51, 71, 91, 100],
        *[101, 121, 130],
    ]
    assert cs.epoch_plan(3).steps(30, steps_per_epoch=50) == [0, 15, 30]


@pytest.mark.parametrize("plan", [cs.epoch_plan(), cs.every(epochs=1)])
def test_more_than_can_be_listed(plan: Schedule) -> None:
    with pytest.raises(cs.FormatError, match="more than anybody can list"):
        plan.steps(10**12, 10**9)
    with pytest.raises(cs.FormatError, match="give epochs together with"):
        plan.steps(1000)
