"""What a schedule lists beforehand is what it decides on the way."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptstore.policy.progress import Length, Past, Progress
from ckptstore.policy.schedule import Schedule
from ckptstore.policy.steps import every


def decided(schedule: Schedule, length: Length) -> list[int]:
    """The steps at which a run of ``length`` that asks after every step is told to save."""
    past, found = Past(), []
    for step in range(length.require_total("this test") + 1):
        now = Progress(step=step, tokens=step * (length.tokens_per_step or 0), elapsed_s=step * (length.step_s or 0.0))
        if schedule.due(now, past, length):
            found.append(step)
        past = past.decided(now)
    return found


@given(total=st.integers(1, 300), step_s=st.floats(0.01, 100), minutes=st.floats(0.01, 5))
def test_minutes(total: int, step_s: float, minutes: float) -> None:
    """Seconds are floats, and both round them in the same way."""
    length, schedule = Length.of(total, step_s=step_s), every(minutes=minutes)
    assert schedule.enumerate(length) == decided(schedule, length)


@pytest.mark.parametrize("step_s", [0.1, 0.3, 0.7, 1.2])
@pytest.mark.parametrize("minutes", [0.1, 0.3, 0.5, 0.7, 1.1])
def test_minutes_that_no_float_is(step_s: float, minutes: float) -> None:
    length, schedule = Length.of(2000, step_s=step_s), every(minutes=minutes)
    assert schedule.enumerate(length) == decided(schedule, length)


@given(total=st.integers(1, 300), per_step=st.integers(1, 5000), tokens=st.integers(1, 20_000))
def test_tokens(total: int, per_step: int, tokens: int) -> None:
    length, schedule = Length.of(total, tokens_per_step=per_step), every(tokens=tokens)
    assert schedule.enumerate(length) == decided(schedule, length)


@pytest.mark.parametrize(
    ("fraction", "reason"),
    [(0.1, "every 10 % of the run"), (0.005, "every 0.5 % of the run"), (1, "every 100 % of the run")],
)
def test_fractions_say_why(fraction: float, reason: str) -> None:
    """As text for people, and at the steps that are listed."""
    length, schedule = Length.of(1000), every(fraction=fraction)
    assert schedule.enumerate(length) == decided(schedule, length)
    assert schedule.due(Progress(step=1000), Past(step=999), length) == [reason]
