"""What reasons have in common: "epoch 3" and "epoch 4" are both ends of epochs, and share a row and a colour."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ckptstore.policy.progress import MILESTONE

_SAVED = (
    (re.compile(r"epoch \d+"), "epochs"),
    (re.compile(r"epoch plan, step \d+"), "epoch plan"),
    (re.compile(r"step \d+"), "named steps"),
    (re.compile(re.escape(MILESTONE) + ".+"), "milestones"),
    (re.compile(r"rollback to .+"), "rollbacks"),
    (re.compile(r"imported from .+", re.DOTALL), "imports"),
    (re.compile(r"((weighted |greedy soup, )?average|exponential average \(.+?\)|and) of .+", re.DOTALL), "averages"),
)
# What is meant to stay longest comes first: of several rules that keep a checkpoint it is shown as that.
_KEPT = (
    (re.compile(re.escape(MILESTONE) + ".+"), "milestones"),
    (re.compile(r"end of epoch \d+"), "ends of epochs"),
    (re.compile(r"(?:the|\d+(?:st|nd|rd|th)) best (.+)"), r"best \1"),
    (re.compile(r"first from step \d+"), "the first of each stretch"),
    (re.compile(r"(saved for .+)"), r"\1"),
    (re.compile(r"(younger than .+)"), r"\1"),
    (re.compile(r"(?:the|one of the) newest( \d+)?"), r"the newest\1"),
    (re.compile(r"there is (room within .+)"), r"\1"),
    (re.compile(r"(the newest) good one always stays"), r"\1"),
)


def saved_as(reason: str) -> str:
    """The kind of a reason to save: "epochs" for "epoch 3"; one that stands for itself as it is."""
    return next((kind for pattern, kind in _SAVED if pattern.fullmatch(reason)), reason)


def kept_as(why: str) -> str:
    """The kind of what keeps a checkpoint, as a ``Verdict`` says it; of several the one that keeps longest."""
    parts = why.split(", ")
    for pattern, kind in _KEPT:
        for part in parts:
            if match := pattern.fullmatch(part):
                # A group that matched nothing leaves nothing.
                return match.expand(kind)
    return why


def kinds(reasons: Sequence[str]) -> list[str]:
    """The kinds of reasons to save, each once."""
    return list(dict.fromkeys(map(saved_as, reasons)))
