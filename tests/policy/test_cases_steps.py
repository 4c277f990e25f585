"""Saves at steps that are named one by one, and at regular intervals."""

from __future__ import annotations

import pytest

import ckptstore as cs
from ckptstore.policy.progress import Length
from ckptstore.policy.schedule import Schedule
from tests.policy.runs import whole

TOTAL = 328_146
EARLY = [0, 10, 30, 60, 100, 200, 300, 500, 700, 1000]
LATE = [*range(10_000, 60_000, 3000), *range(60_000, 320_001, 10_000), TOTAL]


def test_E01_step_0_is_saved_before_training() -> None:
    """As any other: with the same state, and once."""
    assert whole(cs.at(0, 10, 30), Length.of(40)).saved == [(0, ["step 0"]), (10, ["step 10"]), (30, ["step 30"])]


def test_E02_order_and_repetitions_do_not_matter() -> None:
    assert cs.at(30, 10, 10, 30).steps(40) == [10, 30]
    assert whole(cs.at(30, 10, 10, 30), Length.of(40)).steps == [10, 30]


def test_E03_neither_is_an_error_that_names_the_ways() -> None:
    with pytest.raises(cs.FormatError, match=r"every\(nothing\): give just one interval, as every\(steps=250\)"):
        cs.every()
    with pytest.raises(cs.FormatError, match="at least one step"):
        cs.at()


def test_E04_both_are_saved() -> None:
    """Decided: both an interval and named steps are what either wants, joined by |; none silently wins."""
    both = cs.every(steps=20) | cs.at(0, 10, 20)
    assert whole(both, Length.of(50)).steps == both.steps(50) == [0, 10, 20, 40]


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ("10", "write it without quotes: 10"),
        ("ten", "write whole numbers from 0"),
        (-3, "write whole numbers from 0"),
        (10.0, "write 10"),
        (10.5, "write whole numbers from 0"),
        (True, "write whole numbers from 0"),
        (None, "write whole numbers from 0"),
        ([1, 2], r"write at\(\*steps\) for a list"),
        (range(3), r"write at\(\*steps\) for a list"),
        (float("nan"), "write whole numbers"),
        (float("inf"), "write whole numbers"),
        (10**16, "write whole numbers"),
        ("5-2/1", "LAST not before FIRST"),
        ("2-5/0", "EVERY at least 1"),
        ("2-5", "segments as '2000-10000/1000'"),
        ("-2-5/1", "segments as"),
        ("2-5/1/1", "segments as"),
        ("0-999999999999999/1", "would save 1,000,000,000,000,000 times"),
    ],
)
def test_E05_what_is_no_step(step: object, message: str) -> None:
    with pytest.raises(cs.FormatError, match=message):
        cs.at(0, step)  # type: ignore[arg-type]


def test_E05_beyond_the_end() -> None:
    """Before training, not silently never."""
    with pytest.raises(cs.FormatError, match="step 1000000000 would never come, the run ends at step 40: leave it out"):
        cs.at(10, 10**9).steps(40)
    with pytest.raises(cs.FormatError, match="leave it out"):
        (cs.every(steps=5) | cs.at(41)).check(Length.of(40))
    assert cs.at(40).steps(40) == [40]


def test_E06_a_share_of_the_run() -> None:
    """Rounded up to whole steps."""
    steps = cs.every(fraction=0.005).steps(TOTAL)
    assert steps[:3] == [1641, 3282, 4923]
    assert len(steps) == 199


def test_E06_shares_are_exact() -> None:
    """0.1 of 1000 are 100, though no float is 0.1; 0.07 of 100 are 7."""
    assert cs.every(fraction=0.1).steps(1000) == list(range(100, 1001, 100))
    assert cs.every(fraction=0.07).steps(100) == list(range(7, 100, 7))
    assert cs.every(fraction=1).steps(7) == cs.every(fraction=1.0).steps(7) == [7]


def test_E07_the_whole_list() -> None:
    """As it was used, where 4000 is missing, and in segments, which don't miss it."""
    listed = [*EARLY, 2000, 3000, *range(5000, 10_000, 1000), *LATE]
    assert len(listed) == 62
    assert cs.at(*listed).steps(TOTAL) == listed
    segments = cs.at(*EARLY, "2000-10000/1000", "10000-60000/3000", "60000-320000/10000", TOTAL)
    assert segments.steps(TOTAL) == sorted([*listed, 4000])
    assert len(segments.steps(TOTAL)) == 63


def test_E08_steps_are_those_of_the_optimizer() -> None:
    """With four micro batches in each, a quarter of the batches."""
    length = Length.of(dataset_size=1600, batch_size=10, accumulation=4, epochs=2)
    assert (length.steps_per_epoch, length.total_steps) == (40, 80)
    assert cs.every(epochs=1).steps(length=length) == [40, 80]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": 0}, r"every\(steps=0\) must be a whole number from 1"),
        ({"steps": -1}, "must be a whole number from 1"),
        ({"steps": True}, "must be a whole number"),
        ({"steps": 2.0}, "must be a whole number"),
        ({"steps": "ten"}, "must be a whole number.*for example every.steps=250"),
        ({"steps": 10**400}, "must be a whole number"),
        ({"epochs": 0.5}, "must be a whole number"),
        ({"minutes": 0}, "minutes=0. must be from 1e-06"),
        ({"minutes": 1e-300}, "must be from 1e-06"),
        ({"minutes": float("inf")}, "must be from 1e-06"),
        ({"minutes": float("nan")}, "must be from 1e-06"),
        ({"minutes": 10**400}, "must be from 1e-06"),
        ({"minutes": True}, "must be from 1e-06"),
        ({"fraction": 0}, "must be over 0 and at most 1"),
        ({"fraction": 1.5}, "must be over 0 and at most 1"),
        ({"fraction": float("nan")}, "must be over 0 and at most 1"),
        ({"tokens": "1T"}, "'1T' is no count; write numbers"),
        ({"tokens": 0}, "must be a whole number"),
        ({"steps": 5, "epochs": 1}, r"every\(steps=5, epochs=1\): give just one.*combine two with |"),
    ],
)
def test_what_is_no_interval(given: dict[str, object], message: str) -> None:
    with pytest.raises(cs.FormatError, match=message):
        cs.every(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text", ["", "250", "250xy", "-5ba", "0ba", "1.5ep", "ba", "1ep 2ep", "nan", "\u0661ba", "1e5ba"]
)
def test_what_is_no_interval_as_text(text: str) -> None:
    with pytest.raises(cs.FormatError, match="every"):
        cs.every(text)


def test_intervals_as_composer_writes_them() -> None:
    written = {
        "250ba": cs.every(steps=250),
        "1ep": cs.every(epochs=1),
        "0.1dur": cs.every(fraction=0.1),
        "600s": cs.every(minutes=10),
        "1.5h": cs.every(minutes=90),
        "1000000tok": cs.every(tokens="1M"),
    }
    assert {text: cs.every(text) for text in written} == written


@pytest.mark.parametrize(
    ("schedule", "length", "message"),
    [
        (cs.every(steps=41), Length.of(40), "the run has 40 steps; write a shorter interval"),
        (cs.every(epochs=4), Length.of(40, 3), "the run has 3 epochs"),
        # It is to have three epochs, and ends in the second.
        (cs.every(epochs=2), Length.of(1000, 3, steps_per_epoch=600), "the run has 1 epochs"),
        (cs.every(epochs=1), Length.of(1000, steps_per_epoch=1600), "the run has 0 epochs"),
        (cs.every(tokens=81), Length.of(40, tokens_per_step=2), "the run has 80 tokens"),
        (cs.every(fraction=0.5), Length.of(epochs=3), "give total_steps"),
        (cs.milestones("41", of="steps"), Length.of(40), "41 is never reached, the run has 40 steps: leave it out"),
        (cs.milestones([5, 81], of="tokens"), Length.of(40, tokens_per_step=2), "81 is never reached"),
    ],
)
def test_what_would_never_come(schedule: Schedule, length: Length, message: str) -> None:
    """Is an error before the run, alone and with others."""
    with pytest.raises(cs.FormatError, match=message):
        schedule.steps(length=length)
    with pytest.raises(cs.FormatError, match=message):
        (cs.at(1) | schedule).check(length)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"total_steps": 0}, "total_steps=0 must be a whole number of at least 1"),
        ({"total_steps": True}, "total_steps=True must be"),
        ({"total_steps": 10.0}, "total_steps=10.0 must be"),
        ({"total_steps": 2, "epochs": 3}, "an epoch has at least one step"),
        ({"total_steps": 1000, "epochs": 3, "steps_per_epoch": 1}, "is more than epochs=3 of 1 steps.*leave one out"),
        ({"dataset_size": 10}, "dataset_size and batch_size go together"),
        ({"dataset_size": 10, "batch_size": 2, "steps_per_epoch": 5}, "give one of them"),
        ({"total_steps": 5, "step_s": 0}, "step_s=0 must be a number of seconds over 0"),
        ({"total_steps": 5, "step_s": float("nan")}, "step_s=nan must be"),
        ({"total_steps": 5, "step_s": 10**400}, "must be a number of seconds"),
    ],
)
def test_what_is_no_length(given: dict[str, object], message: str) -> None:
    with pytest.raises(cs.FormatError, match=message):
        Length.of(**given)  # type: ignore[arg-type]
