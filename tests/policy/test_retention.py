"""What never goes, whatever the rules say, and what they keep together."""

from __future__ import annotations

from datetime import timedelta
from functools import reduce
from itertools import pairwise
from operator import or_

from hypothesis import given
from hypothesis import strategies as st

import ckptstore as cs
from ckptstore.policy.judge import judge
from ckptstore.policy.plan import Foreseen
from ckptstore.policy.retention import Keep
from tests.policy.histories import LASTING, NOW, RULES, combined, histories, own_bytes, saved, staying, steps

SIZES = st.integers(1, 40).map(cs.at_most)
PICKS = st.sets(st.integers(0, 13), max_size=4)


def picked(history: list[Foreseen], picks: set[int]) -> dict[str, str]:
    """Some of ``history``, by id."""
    return {history[pick % len(history)].id: "its files are gone" for pick in picks}


def floor(history: list[Foreseen], held: dict[str, list[str]], bad: dict[str, str]) -> set[str]:
    """What always stays: the newest good one, held and damaged ones, and what any of these borrows from."""
    good = [c.id for c in history if c.id not in bad]
    always = {*held, *bad, *good[-1:]}
    return always | {lender for c in history if c.id in always for lender in c.lenders}


@given(histories(), combined(RULES | SIZES), PICKS, PICKS)
def test_what_always_stays(history: list[Foreseen], rules: list[Keep], hold: set[int], damage: set[int]) -> None:
    """And nothing that stays borrows from what goes."""
    held, bad = {id: ["mine"] for id in picked(history, hold)}, picked(history, damage)
    judgement = judge(reduce(or_, rules), history, now=NOW, held=held, bad=bad)
    there = {verdict.id for verdict in judgement.verdicts if verdict.stays}
    assert floor(history, held, bad) <= there
    assert {lender for c in history if c.id in there for lender in c.lenders} <= there
    assert [verdict.id for verdict in judgement.verdicts] == [c.id for c in history]
    assert all(verdict.why for verdict in judgement.verdicts)


@given(histories(), combined(RULES), PICKS)
def test_what_any_part_keeps_stays(history: list[Foreseen], rules: list[Keep], damage: set[int]) -> None:
    """Just that, beside what always stays."""
    bad = picked(history, damage)
    together = staying(reduce(or_, rules), history, bad=bad)
    alone = [c.id for rule in rules for c in staying(rule, history, bad=bad)]
    assert {c.id for c in together} == set(alone)


@given(histories(), combined(RULES, most=2), st.integers(1, 30), PICKS, PICKS, st.integers(0, 5))
def test_no_more_than_at_most(
    history: list[Foreseen], rules: list[Keep], limit: int, hold: set[int], damage: set[int], buried: int
) -> None:
    """All of what lies there, deleted and damaged ones too, but for what always stays."""
    held, bad = {id: ["mine"] for id in picked(history, hold)}, picked(history, damage)
    keep = reduce(or_, [*rules, cs.at_most(limit)])
    judgement = judge(keep, history, now=NOW, held=held, bad=bad, other_bytes=buried)
    there = {verdict.id for verdict in judgement.verdicts if verdict.stays}
    assert own_bytes(judgement) + buried <= limit or there == floor(history, held, bad)


@given(histories(), combined(RULES, most=2), st.integers(1, 30))
def test_what_fits_stays_beside_what_the_rules_keep(history: list[Foreseen], rules: list[Keep], limit: int) -> None:
    """Nothing goes for at_most that there is room for: with any one more, it would be too much."""
    keep = reduce(or_, rules)
    judgement = judge(keep | cs.at_most(limit), history, now=NOW)
    there = {verdict.id for verdict in judgement.verdicts if verdict.stays}
    wanted = {c.id for c in staying(keep, history)}
    if own_bytes(judge(keep, history, now=NOW)) <= limit:
        assert wanted <= there
    else:
        assert there <= wanted


def test_what_the_rules_keep_is_thinned_to_the_limit() -> None:
    """By itself: what they don't keep has no part in it, and as many stay as there is room for."""
    history = [saved(step, reasons=["paper"] if step < 5 else []) for step in range(1, 11)]
    assert steps(cs.tagged("paper") | cs.at_most(3), history) == [2, 4, 10]


def test_what_damaged_ones_borrow_takes_up_space() -> None:
    """It can't make room, so that something else has to."""
    history = [
        saved(1, id="lender", stored_bytes=5),
        saved(50, stored_bytes=3),
        saved(60, id="bad", stored_bytes=1, lenders=("lender",)),
        saved(100),
    ]
    assert steps(cs.at_most(7), history, bad={"bad": "torn"}) == [1, 60, 100]
    assert steps(cs.at_most(10), history, bad={"bad": "torn"}) == [1, 50, 60, 100]


@given(histories(lend=False), st.integers(1, 30))
def test_the_smallest_gap_for_its_age_goes_first(history: list[Foreseen], limit: int) -> None:
    """One after the other, each judged by those that are left then."""
    places = [history[0].step]
    for one, later in pairwise(history):
        places.append(places[-1] + max(1, abs(later.step - one.step)))
    left = list(range(len(history)))
    while len(left) > 1 and sum(history[index].stored_bytes for index in left) > limit:
        gaps = [
            (places[after] - (places[left[number - 1]] if number else 0)) / (places[-1] - places[index])
            for number, (index, after) in enumerate(pairwise(left))
        ]
        del left[gaps.index(min(gaps))]
    assert staying(cs.at_most(limit), history) == [history[index] for index in left]


@given(histories(), combined(SIZES, most=3), combined(LASTING, most=2))
def test_the_least_of_several_limits_holds(history: list[Foreseen], limits: list[Keep], rules: list[Keep]) -> None:
    """In whichever order they are written."""
    least = min(limits, key=lambda rule: rule.limit)  # type: ignore[attr-defined]
    expected = steps(reduce(or_, [*rules, least]), history)
    assert steps(reduce(or_, [*limits, *rules]), history) == expected
    assert steps(reduce(or_, [*rules, *reversed(limits)]), history) == expected


@given(histories(), combined(RULES | SIZES), PICKS, PICKS, st.integers(0, 5))
def test_deciding_again_changes_nothing(
    history: list[Foreseen], rules: list[Keep], hold: set[int], damage: set[int], buried: int
) -> None:
    """What is left once the others are gone all stays."""
    held, bad = {id: ["mine"] for id in picked(history, hold)}, picked(history, damage)
    keep = reduce(or_, rules)
    left = staying(keep, history, held=held, bad=bad, other_bytes=buried)
    assert staying(keep, left, held=held, bad=bad, other_bytes=buried) == left


@given(histories(), combined(RULES), PICKS)
def test_nothing_goes_because_another_went(history: list[Foreseen], rules: list[Keep], first: set[int]) -> None:
    """Also where only some of what was to go has gone, as where a removal was cut short."""
    keep = reduce(or_, rules)
    stayed = staying(keep, history)
    going = [c for c in history if c not in stayed]
    gone = [going[pick % len(going)] for pick in first if going]
    left = [c for c in history if c not in gone]
    assert {c.id for c in stayed} <= {c.id for c in staying(keep, left)}


@given(histories(), RULES, st.integers(1, 14))
def test_the_newest_of_equals(history: list[Foreseen], rule: Keep, count: int) -> None:
    """Where everything was saved at one step with one metric, the newer are kept, and order is that of saving alone."""
    same = [saved(5, id=c.id, epoch=1, metrics={"loss": 0.0}, reasons=["final"], created=c.created) for c in history]
    newest = [c.id for c in same[-count:]]
    assert {c.id for c in staying(cs.last(count), same)} == set(newest)
    assert {c.id for c in staying(cs.best("loss", count), same)} == set(newest)
    assert [c.id for c in staying(cs.epochs() | cs.every_kept(steps=2), same)] == newest[-1:]
    assert same[-1] in staying(rule, same)


def test_a_million_is_newer_than_999_999() -> None:
    """Neither ids nor steps are compared as text."""
    history = [saved(step) for step in (999_998, 999_999, 1_000_000)]
    assert steps(cs.last(1), history) == [1_000_000]
    assert steps(cs.last(2), history) == [999_999, 1_000_000]


def test_values_that_are_none() -> None:
    """nan and missing are not among the best, 0.0 and infinities are; where there is none, none is kept."""
    values = [{}, {"loss": float("nan")}, {"loss": 0.0}, {"loss": float("inf")}, {"loss": float("nan")}, {}]
    history = [saved(step, metrics=metrics) for step, metrics in enumerate(values)]
    assert steps(cs.best("loss"), history) == [2, 5]
    assert steps(cs.best("loss", 9), history) == [2, 3, 5]
    assert steps(cs.best("loss", mode="max"), history) == [3, 5]
    assert steps(cs.best("acc"), history) == [5]


def test_after_a_roll_back_the_new_line_takes_over() -> None:
    """Of an epoch that ended twice the newer end is kept; as long as it hasn't ended again, the older one."""
    old = [saved(step, id=f"old {step}", epoch=step // 10) for step in (5, 10, 15, 20, 25)]
    new = [saved(step, id=f"new {step}", epoch=step // 10) for step in (8, 10, 15)]
    assert [c.id for c in staying(cs.epochs(), [*old, *new[:1]])] == ["old 10", "old 20", "new 8"]
    assert [c.id for c in staying(cs.epochs(), [*old, *new])] == ["old 20", "new 10", "new 15"]
    assert [c.id for c in staying(cs.every_kept(steps=10), [*old, *new])] == ["old 5", "old 20", "new 10", "new 15"]


def test_clocks_decide_nothing_but_age() -> None:
    """One from the future is young; among the newest it has no better place."""
    times = [NOW + timedelta(days=400), NOW - timedelta(days=2), NOW - timedelta(days=1)]
    history = [saved(step, created=created) for step, created in enumerate(times)]
    assert steps(cs.last(2), history) == [1, 2]
    assert steps(cs.within("36h"), history) == [0, 2]


def test_all_damaged() -> None:
    """Who knows what can be saved of them: all stay."""
    history = [saved(step) for step in range(5)]
    assert steps(cs.last(1), history, bad={c.id: "torn" for c in history}) == [0, 1, 2, 3, 4]
    assert steps(cs.last(1), history, bad={c.id: "torn" for c in history[3:]}) == [2, 3, 4]
    assert judge(cs.last(1), [], now=NOW).verdicts == []
