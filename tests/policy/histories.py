"""Checkpoints of no store, and any history of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from hypothesis import strategies as st

import ckptstore as cs
from ckptstore.policy.judge import Judgement, judge
from ckptstore.policy.plan import Foreseen
from ckptstore.policy.retention import Keep

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def saved(step: int, **facts: Any) -> Foreseen:
    """A checkpoint of one byte; what isn't said is as if nothing had been said at its save."""
    given = {"epoch": None, "reasons": (), "created": NOW, "stored_bytes": 1, "id": f"step {step}"} | facts
    return Foreseen(step=step, **given)


def staying(keep: Keep, history: Sequence[Foreseen], **more: Any) -> list[Foreseen]:
    """What of ``history`` stays under ``keep``."""
    judgement = judge(keep, history, now=NOW, **more)
    return [c for c, verdict in zip(history, judgement.verdicts, strict=True) if verdict.stays]


def steps(keep: Keep, history: Sequence[Foreseen], **more: Any) -> list[int]:
    """The steps of what stays."""
    return [c.step for c in staying(keep, history, **more)]


def own_bytes(judgement: Judgement) -> int:
    """What lies on storage once the others are gone."""
    return sum(verdict.own_bytes for verdict in judgement.verdicts if verdict.stays)


VALUES = st.sampled_from([math.nan, 0.0, 0.5, 0.5, 1.0, 2.0, math.inf, -1.0])
REASONS = ["milestone 1B", "milestone 5B", "SIGTERM", "final", "every 10 steps", "epoch 1"]


@st.composite
def histories(draw: st.DrawFn, *, most: int = 14, lend: bool = True) -> list[Foreseen]:
    """Saves in their order: failures left gaps, some borrow, roll-backs make steps fall, clocks jump."""
    step = draw(st.sampled_from([0, 999_990]))
    size = draw(st.integers(1, most))
    history: list[Foreseen] = []
    for number in draw(st.permutations(range(2 * most)))[:size]:
        # Mostly ahead, at times the same step again, and at times back.
        step = max(0, step + draw(st.sampled_from([1, 2, 3, 5, 9, 0, -4, -9])))
        metrics = draw(st.dictionaries(st.sampled_from(["loss", "acc"]), VALUES, max_size=2))
        lenders = [c.id for c in history if not c.lenders] if lend else []
        lender = draw(st.sampled_from([*lenders, None, None, None]))
        history.append(
            saved(
                step,
                # Ids don't sort as the saves do.
                id=f"id {number}",
                epoch=draw(st.sampled_from([step // 7, step // 7, None])),
                metrics=metrics,
                reasons=draw(st.lists(st.sampled_from(REASONS), max_size=2, unique=True)),
                created=NOW - timedelta(hours=draw(st.sampled_from([0, 0, 1, 30, 30, 500, -5]))),
            )
        )
        stored = draw(st.integers(0, 5))
        borrowed = draw(st.integers(0, stored)) if lender else 0
        loan = {"borrowed_bytes": borrowed, "lenders": (lender,)} if lender else {}
        history[-1] = replace(history[-1], stored_bytes=stored, **loan)
    return history


COUNTS = st.integers(1, 4)
LASTING = st.one_of(
    st.builds(cs.last, COUNTS),
    st.builds(cs.best, st.sampled_from(["loss", "acc"]), COUNTS, st.sampled_from(["auto", "min", "max"])),
    st.builds(cs.epochs, COUNTS),
    st.builds(lambda n: cs.every_kept(steps=n), st.integers(1, 12)),
    st.just(cs.milestones()),
    st.builds(cs.tagged, st.sampled_from(["SIGTERM", "fin*", "epoch 1", "nothing"])),
)
"""Rules that go neither by the time nor by sizes."""
RULES = LASTING | st.builds(cs.within, st.sampled_from(["1h", "2d", "90d"]))


def combined(rules: st.SearchStrategy[Keep], most: int = 3) -> st.SearchStrategy[list[Keep]]:
    """Several rules, to be combined with ``|``."""
    return st.lists(rules, min_size=1, max_size=most)
