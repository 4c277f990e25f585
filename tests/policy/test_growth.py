"""What is kept while a history grows, where after each save what doesn't stay is gone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from itertools import pairwise
from operator import or_

from hypothesis import given
from hypothesis import strategies as st

import ckptstore as cs
from ckptstore.policy.plan import Foreseen
from ckptstore.policy.retention import Keep
from tests.policy.histories import LASTING, combined, histories, saved, staying


def grown(keep: Keep, history: Sequence[Foreseen]) -> list[Foreseen]:
    """What is left at the end."""
    there: list[Foreseen] = []
    for new in history:
        there = staying(keep, [*there, new])
    return there


@given(histories(most=25), combined(LASTING))
def test_what_would_be_kept_of_all_is_there(history: list[Foreseen], rules: list[Keep]) -> None:
    """As if nothing had ever been removed before; lenders may have gone, as nobody borrows from what isn't there."""
    keep = reduce(or_, rules)
    lenders = {lender for c in history for lender in c.lenders}
    wanted = [c for rule in rules for c in staying(rule, history) if c.id not in lenders]
    left = grown(keep, history)
    assert {c.id for c in wanted} <= {c.id for c in left}


@given(histories(most=25, lend=False), LASTING)
def test_nothing_else_is_left(history: list[Foreseen], rule: Keep) -> None:
    """A rule alone keeps just what it would keep of all."""
    assert grown(rule, history) == staying(rule, history)


@given(histories(most=25, lend=False), combined(LASTING, most=2), st.integers(10, 40))
def test_under_a_limit_the_newest_and_what_fits(history: list[Foreseen], rules: list[Keep], limit: int) -> None:
    left = grown(reduce(or_, [*rules, cs.at_most(limit)]), history)
    assert left[-1] == history[-1]
    assert sum(c.stored_bytes for c in left) <= limit


def test_under_a_limit_they_lie_ever_further_apart() -> None:
    """Not the newest ten: the gaps grow with the age, and the first one is part of them."""
    left = [c.step for c in grown(cs.at_most(10), [saved(step) for step in range(1, 1001)])]
    assert len(left) == 10
    assert left[-1] == 1000
    assert left[0] <= 700
    gaps = [later - one for one, later in pairwise(left)]
    assert sum(gaps[:4]) > 4 * sum(gaps[-4:])
