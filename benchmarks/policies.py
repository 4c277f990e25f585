"""How long it takes to judge a history of 10,000 checkpoints under each rule, and under all of them together."""

from __future__ import annotations

import random
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from functools import reduce
from operator import or_
from typing import Any

import ckptstore as cs
from benchmarks.rounds import timed
from ckptstore.policy.judge import judge
from ckptstore.policy.plan import Foreseen
from ckptstore.policy.retention import Keep
from ckptstore.tools.turns import Tell, turns

_NOW = datetime(2026, 1, 1, tzinfo=UTC)
_BYTES = 10**9


def rules(checkpoints: int) -> list[Keep]:
    """Each of them, so that it lets go of most of ``checkpoints``."""
    return [
        cs.last(10),
        cs.best("val_loss", n=10),
        cs.epochs(),
        cs.every_kept(steps=10_000),
        cs.milestones(),
        cs.within("7d"),
        cs.tagged("SIGTERM", "milestone *"),
        cs.at_most(checkpoints * _BYTES // 100),
    ]


def history(checkpoints: int) -> Sequence[Foreseen]:
    """One save each 250 steps and ten minutes, four in an epoch; now and then a signal, a milestone and a loan."""
    chance = random.Random(0)
    made: list[Foreseen] = []
    for number in range(1, checkpoints + 1):
        reasons = ["every 250 steps", *(["SIGTERM"] if number % 1000 == 0 else [])]
        lender = made[-1].id if made and number % 100 == 0 else None
        made.append(
            Foreseen(
                id=f"0001-{number:06d}-step{number * 250}-{chance.getrandbits(64):016x}",
                step=number * 250,
                epoch=number // 4,
                reasons=[*reasons, *([f"milestone {number}M tokens"] if number % 500 == 0 else [])],
                created=_NOW - timedelta(minutes=10 * (checkpoints - number)),
                stored_bytes=_BYTES,
                metrics={"val_loss": chance.random()},
                modes={"val_loss": "min"},
                borrowed_bytes=_BYTES // 2 if lender else 0,
                lenders=(lender,) if lender else (),
            )
        )
    return made


def measure(folder: str, rounds: int, *, checkpoints: int = 10_000, tell: Tell | None = None) -> dict[str, Any]:
    """Seconds of ``judge`` in each round, by rule; nothing is read or written, in ``folder`` neither."""
    judged = history(checkpoints)
    each = {str(rule).split("(")[0]: rule for rule in rules(checkpoints)}
    each["all of them"] = reduce(or_, rules(checkpoints))
    seconds: dict[str, list[float]] = {name: [] for name in each}
    for name in turns(tuple(each), rounds, tell):
        seconds[name].append(timed(lambda keep=each[name]: judge(keep, judged, now=_NOW)))  # type: ignore[misc]
    return {"checkpoints": checkpoints, "seconds": seconds}
