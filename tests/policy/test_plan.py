"""What a plan tells is what a run that saves into a store, and removes what doesn't stay, finds there."""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import count

import pytest
import torch

import ckptstore as cs
from ckptstore.policy.judge import judge
from ckptstore.policy.progress import Length, Past
from ckptstore.policy.retention import Keep
from ckptstore.policy.schedule import Schedule
from tests.policy.runs import progress

NAMES = count()
LENGTH = Length.of(60, 4, tokens_per_step=100, step_s=2.0)


def state(step: int) -> dict[str, torch.Tensor]:
    return {"x": torch.full((8,), step)}


def one_checkpoint_bytes() -> int:
    with cs.open(f"memory://plan-{next(NAMES)}") as store:
        return store.save(state(0), step=0).stored_bytes


SIZE = one_checkpoint_bytes()

SAVES: list[Schedule] = [
    cs.every(steps=5),
    cs.every(steps=7) | cs.every(epochs=1),
    cs.at(0, 1, "10-30/4") | cs.milestones("1K,2.5K", of="tokens"),
    cs.epoch_plan(6) | cs.every(minutes=0.25),
    cs.every(fraction=0.1) | cs.milestones("11,12", of="steps"),
    cs.at(0),
]
KEEPS: list[Keep | None] = [
    None,
    cs.last(3),
    cs.last(2) | cs.epochs() | cs.milestones(),
    cs.every_kept(steps=20) | cs.tagged("epoch *", "final"),
    cs.at_most(4 * SIZE),
    cs.last(1) | cs.epochs(every=2) | cs.at_most(3 * SIZE),
]


def lived(schedule: Schedule, keep: Keep | None, length: Length) -> tuple[list[tuple[object, ...]], dict[int, str]]:
    """What each save of a run left: its step and reasons, what went and what was there; and why it stays at the end."""
    past, moments, why = Past(), [], {}
    with cs.open(f"memory://plan-{next(NAMES)}") as store:
        for step in range(length.require_total("a run") + 1):
            now = progress(step, length)
            reasons = schedule.due(now, past, length) or (["final"] if step == length.total_steps else [])
            past = past.decided(now)
            if not reasons:
                continue
            store.save(state(step), step=step, epoch=now.epoch, reasons=reasons)
            past = past.saved(now, reasons)
            peak = sum(c.stored_bytes for c in store.checkpoints())
            going = []
            if keep is not None:
                judgement = judge(keep, store.checkpoints(), now=datetime.now(UTC))
                going = [verdict.step for verdict in judgement.going]
                why = {verdict.step: verdict.why for verdict in judgement.verdicts if verdict.stays}
                for verdict in judgement.going:
                    store.delete(verdict.id)
                store.prune(grace_s=0)
            there = [c.step for c in store.checkpoints()]
            left = sum(c.stored_bytes for c in store.checkpoints())
            moments.append((step, now.epoch, reasons, going, there, peak, left))
    return moments, why


@pytest.mark.parametrize("keep", KEEPS, ids=str)
@pytest.mark.parametrize("schedule", SAVES, ids=str)
def test_a_plan_is_what_happens(schedule: Schedule, keep: Keep | None) -> None:
    """Save for save: the step and why, what goes, what is there, and the bytes."""
    plan = cs.foresee(schedule, keep, LENGTH, checkpoint_bytes=SIZE)
    moments, why = lived(schedule, keep, LENGTH)
    planned = [
        (m.step, m.epoch, m.reasons, [v.step for v in m.going], list(m.there), m.peak_bytes, m.left_bytes)
        for m in plan.moments
    ]
    assert planned == moments
    assert plan.peak_bytes == max(peak for *_, peak, _ in moments)
    assert plan.notes == []
    if keep is not None:
        assert {v.step: v.why for v in plan.final if v.stays} == why
    assert [v.step for v in plan.final if v.stays] == moments[-1][4]


def test_a_run_of_rolling_checkpoints_and_epochs() -> None:
    """Three rolling ones and the end of each epoch: three, three more that are kept for good, and one being written."""
    keep = cs.last(3) | cs.epochs()
    plan = cs.foresee(cs.every(steps=50) | cs.every(epochs=1), keep, Length.of(900, 3), checkpoint_bytes=1)
    assert [v.step for v in plan.final if v.stays] == [300, 600, 800, 850, 900]
    assert plan.peak_bytes == 6


def test_the_trash_takes_up_space() -> None:
    """For as long as it is kept, in the run's own time."""
    length = Length.of(100, step_s=1.0)
    plan = cs.foresee(cs.every(steps=10), cs.last(2), length, checkpoint_bytes=1, trash_s=25)
    assert [moment.left_bytes for moment in plan.moments] == [1, 2, 3, 4, 5, 5, 5, 5, 5, 5]


@pytest.mark.parametrize("trash_s", [20, 50, 80, 10_000])
def test_the_trash_makes_room_within_a_limit(trash_s: float) -> None:
    """Nothing that the rules keep goes because of what went before, and all together take no more than the limit."""
    keep, length = cs.last(3) | cs.epochs() | cs.at_most(20), Length.of(600, 4, step_s=1.0)
    plan = cs.foresee(cs.every(steps=10), keep, length, checkpoint_bytes=1, trash_s=trash_s)
    assert [moment.left_bytes for moment in plan.moments] == [min(saved, 20) for saved in range(1, 61)]
    assert {150, 300, 450, 580, 590, 600} <= {v.step for v in plan.final if v.stays}
    assert plan.moments[-1].count == 20


def test_without_a_total_there_is_no_plan() -> None:
    with pytest.raises(cs.FormatError, match="needs to know how long the run is"):
        cs.foresee(cs.every(steps=10), cs.last(2), Length(), checkpoint_bytes=1)
    for size in (-1, 1.5, True, "1GB"):
        with pytest.raises(cs.FormatError, match="must be a whole number of at least 0"):
            cs.foresee(cs.at(1), None, Length.of(10), checkpoint_bytes=size)  # type: ignore[arg-type]
