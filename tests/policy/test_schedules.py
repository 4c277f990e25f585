"""What a schedule says beforehand is what a run saves, however it goes."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import accumulate, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ckptstore as cs
from ckptstore.policy.counts import count_name
from ckptstore.policy.progress import Length, Past
from ckptstore.policy.schedule import Schedule
from tests.policy.runs import Run, progress, whole
from tests.policy.strategies import scheduled


@given(scheduled())
def test_lists_are_sorted_within_the_run_and_the_same_again(given: tuple[Schedule, Length]) -> None:
    schedule, length = given
    steps = schedule.steps(length=length)
    assert steps == sorted(set(steps))
    assert all(0 <= step <= length.require_total("it") for step in steps)
    assert schedule.steps(length=length, known_only=True) == steps


@given(scheduled())
def test_a_run_saves_what_was_listed(given: tuple[Schedule, Length]) -> None:
    """Asked after every step, with no reason twice for one save."""
    schedule, length = given
    run = whole(schedule, length)
    assert run.steps == schedule.steps(length=length)
    assert all(len(set(reasons)) == len(reasons) for _, reasons in run.saved)


@given(scheduled(), st.lists(st.integers(1, 40), min_size=1, max_size=130))
def test_steps_that_come_several_at_a_time(given: tuple[Schedule, Length], strides: list[int]) -> None:
    """Each listed step is saved at the first decision that isn't before it."""
    schedule, length = given
    asked = [step for step in accumulate(strides, initial=0) if step <= length.require_total("it")]
    wanted = schedule.steps(length=length)
    run = Run(schedule, length).on(asked)
    assert run.steps == [now for before, now in pairwise([-1, *asked]) if any(before < w <= now for w in wanted)]


@given(scheduled(), st.sets(st.integers(0, 120)))
def test_saves_by_hand_shift_nothing(given: tuple[Schedule, Length], by_hand: set[int]) -> None:
    schedule, length = given
    run = Run(schedule, length).on(range(length.require_total("it") + 1), by_hand=by_hand)
    assert run.saved == whole(schedule, length).saved


@given(scheduled())
def test_an_epoch_that_is_over_after_its_last_step(given: tuple[Schedule, Length]) -> None:
    """A trainer asks after the step, and again at the same one when the epoch is over: nothing is due twice."""
    schedule, length = given
    past, saves, before = Past(), [], 0
    for step in range(length.require_total("it") + 1):
        over = progress(step, length)
        for now in [replace(over, epoch=before), *([over] if over.epoch > before else [])]:
            reasons = schedule.due(now, past, length)
            past = past.decided(now)
            if reasons:
                past = past.saved(now, reasons)
                saves.append((step, reasons))
        before = over.epoch
    assert sorted({step for step, _ in saves}) == schedule.steps(length=length)
    given_twice = [(step, reason) for step, reasons in saves for reason in reasons]
    assert len(given_twice) == len(set(given_twice))


@given(scheduled(), st.lists(st.tuples(st.integers(0, 120), st.integers(0, 120)), max_size=4))
def test_stops_and_resumes(given: tuple[Schedule, Length], stops: list[tuple[int, int]]) -> None:
    """After each stop a run goes on from any checkpoint there is, or anew, and saves what comes after that, once."""
    schedule, length = given
    total = length.require_total("it")
    wanted = schedule.steps(length=length)
    run, at = Run(schedule, length), -1
    for end, which in [*stops, (total, 0)]:
        end = min(max(end, at), total)
        before = len(run.saved)
        run.on(range(at + 1, end + 1))
        assert run.steps[before:] == [step for step in wanted if at < step <= end]
        choice = [-1, *sorted(run.kept)]
        at = choice[which % len(choice)]
        run.past = run.kept[at] if at >= 0 else Past()
        # What lies behind the one that is resumed from was rolled back.
        run.kept = {step: past for step, past in run.kept.items() if step <= at}


@given(scheduled(), st.sets(st.integers(0, 120)))
def test_a_milestone_whose_save_failed_comes_at_the_next_decision(
    given: tuple[Schedule, Length], fails: set[int]
) -> None:
    """Once, however many fail."""
    other, length = given
    total = length.require_total("it")
    reached = max(1, total // 2)
    run = Run(other | cs.milestones([reached], of="steps"), length).on(range(total + 1), fails=fails)
    came = [step for step, reasons in run.saved if f"milestone {count_name(reached)} steps" in reasons]
    assert came == [step for step in range(reached, total + 1) if step not in fails][:1]


@given(st.dictionaries(st.integers(1, 30), st.sampled_from([0.5, 1.0, 2.0, float("nan")])), st.sets(st.integers(1, 31)))
def test_a_best_whose_save_failed_comes_at_the_next_decision(values: dict[int, float], fails: set[int]) -> None:
    """Unless a worse value was reported since, which takes its place; best is what was saved, not what was seen."""
    metrics = {step: {"val_loss": value} for step, value in values.items()}
    run = Run(cs.on_best("val_loss"), Length.of(31)).on(range(32), fails=fails, metrics=metrics)
    expected, best, pending = [], float("inf"), float("nan")
    for step in range(32):
        pending = values.get(step, pending)
        if pending < best and step not in fails:
            expected.append(step)
            best, pending = pending, float("nan")
    assert run.steps == expected
    assert run.past.best == ({"val_loss": best} if expected else {})


def test_a_best_of_zero_and_a_worse_one() -> None:
    """0.0 is a value as any, and equal is no better."""
    metrics = {1: {"loss": 0.0}, 2: {"loss": 0.0}, 3: {"loss": -1.0}, 4: {"acc": 1.0}}
    assert Run(cs.on_best("loss"), Length.of(4)).on(range(5), metrics=metrics).steps == [1, 3]


def test_the_best_of_each_metric_is_remembered() -> None:
    """Also of one that was not reported when another was saved."""
    metrics = {1: {"loss": 1.0}, 2: {"acc": 0.5}, 3: {"loss": 2.0}, 4: {"acc": 0.4}, 5: {"loss": 0.5, "acc": 0.6}}
    run = Run(cs.on_best("loss") | cs.on_best("acc"), Length.of(5)).on(range(6), metrics=metrics)
    assert run.saved == [(1, ["best loss"]), (2, ["best acc"]), (5, ["best loss", "best acc"])]


def test_what_depends_on_more_than_steps_is_named_and_left_out() -> None:
    """Tokens, time and metrics; also where such a part stands alone."""
    open_ended = [cs.milestones("1M", of="tokens"), cs.milestones("1M"), cs.every(tokens="1K"), cs.every(minutes=1)]
    for schedule in [*open_ended, cs.on_best("loss"), cs.budget()]:
        assert schedule.steps(1000, known_only=True) == []
        assert (schedule | cs.at(7)).steps(1000, known_only=True) == [7]
        with pytest.raises(cs.FormatError, match=re.escape(str(schedule))):
            schedule.steps(1000)


def test_deciding_changes_nothing_that_was_given() -> None:
    """Values: what was asked can be asked again."""
    metrics = {"loss": 1.0}
    length, past = Length.of(10, 2), Past(step=4)
    schedule = cs.on_best("loss") | cs.every(steps=5) | cs.milestones("5", of="steps")
    now = progress(5, length, metrics=metrics)
    first = schedule.due(now, past, length)
    after = past.decided(now).saved(now, first)
    assert schedule.due(now, past, length) == first == ["best loss", "every 5 steps", "milestone 5 steps"]
    assert (metrics, past) == ({"loss": 1.0}, Past(step=4))
    assert schedule.due(now, after, length) == []
