"""What a plan tells is what a run does that asks the same policies after every step."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptstore.errors import FormatError
from ckptstore.policy.judge import judge
from ckptstore.policy.plan import FINAL, Foreseen, foresee
from ckptstore.policy.progress import Length, Past, Progress
from ckptstore.policy.text import parse_keep, parse_schedule

SIZE = 10**9


@dataclass
class Run:
    """What was saved, what lies there, and the most that ever did."""

    saved: dict[int, list[str]] = field(default_factory=dict)
    gone: dict[int, int] = field(default_factory=dict)
    present: list[Foreseen] = field(default_factory=list)
    peak: int = 0


def train(save: str, keep: str | None, length: Length, measured: Mapping[int, float]) -> Run:
    """Step by step, with a loss reported where ``measured`` has one."""
    schedule, rules = parse_schedule(save), keep and parse_keep(keep)
    total, run, past = length.require_total("this test"), Run(), Past()
    ends = length.epoch_ends() if length.epochs else []
    for step in range(total + 1):
        metrics = {"val_loss": measured[step]} if step in measured else {}
        epoch = sum(end <= step for end in ends)
        now = Progress(step, epoch, step * (length.tokens_per_step or 0), 0, step * (length.step_s or 0.0), metrics)
        reasons = schedule.due(now, past, length) or ([FINAL] if step == total else [])
        past = past.decided(now)
        if not reasons:
            continue
        past = past.saved(now, reasons)
        created = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=now.elapsed_s)
        run.saved[step] = reasons
        run.present.append(Foreseen(str(step), step, epoch, reasons, created, SIZE, metrics))
        run.peak = max(run.peak, SIZE * len(run.present))
        if rules:
            going = {verdict.step for verdict in judge(rules, run.present, now=created).going}
            run.gone |= dict.fromkeys(going, step)
            run.present = [c for c in run.present if c.step not in going]
    return run


SAVES = [
    "every(steps=7)",
    "every(epochs=1)",
    "every(fraction=0.1)",
    "every(tokens=1000)",
    "every(minutes=1)",
    "at(0, 3, 0-40/10)",
    "epoch_plan(first=5)",
    "milestones('10,35', of=steps)",
]
KEEPS = [
    "last(3)",
    "epochs()",
    "every_kept(steps=20)",
    "milestones()",
    "within('2m')",
    "tagged('epoch *')",
    "at_most('5GB')",
    "best(val_loss, n=2)",
]


def combined(parts: list[str]) -> st.SearchStrategy[str]:
    return st.lists(st.sampled_from(parts), min_size=1, max_size=3, unique=True).map(" | ".join)


LENGTHS = st.builds(
    lambda total, epochs: Length.of(total, min(epochs, total), tokens_per_step=130, step_s=4.3),
    st.integers(40, 120),
    st.integers(1, 5),
)


@settings(max_examples=300)
@given(save=combined(SAVES), keep=st.none() | combined(KEEPS), length=LENGTHS)
def test_a_plan_is_what_happens(save: str, keep: str | None, length: Length) -> None:
    """Every save with its reasons, what lies there after each, and what stays."""
    run = train(save, keep, length, {})

    plan = foresee(parse_schedule(save), keep and parse_keep(keep), length, checkpoint_bytes=SIZE)
    assert {moment.step: moment.reasons for moment in plan.moments} == run.saved
    assert {moment.step: moment.goes_at for moment in plan.moments if moment.goes_at is not None} == run.gone
    assert [verdict.step for verdict in plan.final] == [c.step for c in run.present]
    assert max(moment.peak_bytes for moment in plan.moments) == run.peak
    assert plan.at_most
    for moment in plan.moments:
        there = [step for step in run.saved if step <= moment.step and run.gone.get(step, 1000) > moment.step]
        assert moment.there == there
        assert moment.count == len(there)
        assert moment.left_bytes == SIZE * moment.count


@settings(max_examples=300)
@given(
    save=combined([*SAVES, "on_best(val_loss)"]),
    keep=st.none() | combined(KEEPS),
    length=LENGTHS,
    seed=st.integers(0, 10**6),
)
def test_the_peak_is_never_exceeded(save: str, keep: str | None, length: Length, seed: int) -> None:
    """Whatever is measured, unless the plan says that more may be."""
    dice = random.Random(seed)
    measured = {step: dice.random() for step in range(1, 121) if dice.random() < 0.3}
    run = train(save, keep, length, measured)

    plan = foresee(parse_schedule(save), keep and parse_keep(keep), length, checkpoint_bytes=SIZE)
    if plan.at_most:
        assert run.peak <= plan.peak_bytes
    else:
        assert "what is saved besides comes on top of the peak" in plan.notes


def plan_of(save: str, keep: str | None = None, trash_s: float = 0, **length: float):  # type: ignore[no-untyped-def]
    made = Length.of(**length)  # type: ignore[arg-type]
    return foresee(parse_schedule(save), keep and parse_keep(keep), made, checkpoint_bytes=SIZE, trash_s=trash_s)


@pytest.mark.parametrize(
    ("save", "keep", "peak", "known"),
    [
        ("every(steps=50)", "last(2)", 3, True),
        # No more than were saved at all.
        ("every(steps=100)", "best(val_loss, n=9)", 3, True),
        ("every(steps=50)", "last(2) | best(val_loss)", 4, True),
        # The best one takes its place within the limit.
        ("every(steps=10)", "last(2) | best(val_loss) | at_most('5GB')", 6, True),
        # As many as the rules keep, and the new one.
        ("every(epochs=1) | on_best(val_loss)", "last(10) | epochs()", 14, True),
        ("every(epochs=1) | milestones('1B,5B')", None, 5, True),
        ("every(epochs=1) | on_best(val_loss)", None, 3, False),
        ("every(epochs=1) | on_best(val_loss)", "tagged('x')", 2, False),
    ],
)
def test_peaks(save: str, keep: str | None, peak: int, known: bool) -> None:
    plan = plan_of(save, keep, total_steps=300, epochs=3)
    assert (plan.peak_bytes, plan.at_most) == (peak * SIZE, known)


def test_trash_is_reclaimed_after_the_next_save() -> None:
    """What goes at 30 s and stays for 10 lies there as the one at 40 s is written, and no longer."""
    plan = plan_of("every(steps=10)", "last(2)", 10, total_steps=60, step_s=1.0)
    assert [moment.peak_bytes // SIZE for moment in plan.moments] == [1, 2, 3, 4, 4, 4]
    assert [moment.left_bytes // SIZE for moment in plan.moments] == [1, 2, 3, 3, 3, 3]
    assert "nothing grows older here" in plan_of("every(steps=10)", "last(2)", 10, total_steps=60).notes[0]


def test_a_budget_gives_no_reasons_to_other_saves() -> None:
    plan = plan_of("every(steps=250) | budget()", total_steps=1000, step_s=1.2)
    assert {tuple(moment.reasons) for moment in plan.moments} == {("every 250 steps",)}


def test_a_long_run_that_keeps_all() -> None:
    """Takes memory in proportion to its saves."""
    plan = plan_of("every(steps=1)", total_steps=50_000)
    assert plan.peak_bytes == 50_000 * SIZE
    assert plan.moments[9].there == list(range(1, 11))


def test_longer_than_any_calendar() -> None:
    with pytest.raises(FormatError, match="take longer than"):
        plan_of("every(fraction=0.5)", total_steps=10**12, step_s=1.0)


def test_epochs_that_nobody_knows() -> None:
    assert "nobody knows where epochs end" in plan_of("every(steps=5)", "epochs()", total_steps=10).notes[0]


def test_so_many_at_once_that_a_person_is_asked() -> None:
    """After hours in which nothing was saved all that there is is old."""
    [note] = plan_of("at(0, 10, 20, 30, 20000)", "within('1h')", total_steps=20_000, step_s=1).notes
    assert note.startswith("after step 20000 4 of 5 checkpoints would go at once: without a backup, none does until")
    assert not plan_of("at(0, 10, 20, 20000)", "within('1h')", total_steps=20_000, step_s=1).notes
