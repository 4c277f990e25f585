"""What becomes of each checkpoint: what the rules say, and what is never given up whatever they say."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from ckptstore.policy.retention import Keep, Kept, Situation, merged
from ckptstore.policy.thin import own_bytes

MANY = 20
FEW = 3
"""So many may go at once, whatever share they are."""


@dataclass(frozen=True)
class Verdict:
    """What becomes of one checkpoint.

    Attributes:
        id, step: of the checkpoint.
        stays: whether it does.
        why: the rules that keep it, or why none does.
        own_bytes: what lies in its own folder, in bytes.
    """

    id: str
    step: int
    stays: bool
    why: str
    own_bytes: int


@dataclass(frozen=True)
class Judgement:
    """What becomes of all of them, oldest first."""

    verdicts: Sequence[Verdict]

    @property
    def going(self) -> list[Verdict]:
        """Those that don't stay."""
        return [verdict for verdict in self.verdicts if not verdict.stays]

    @property
    def going_bytes(self) -> int:
        """What lies in their folders, in bytes."""
        return sum(verdict.own_bytes for verdict in self.going)

    @property
    def needs_force(self) -> str | None:
        """Why a person should look before so many go; None where they are few."""
        return too_many(len(self.going), len(self.verdicts))


def too_many(going: int, count: int) -> str | None:
    """Why a person should look before ``going`` of ``count`` checkpoints go; None where they are few."""
    if going > MANY or (going > FEW and going * 2 > count):
        return f"{going} of {count} checkpoints would go at once"
    return None


def judge(
    keep: Keep,
    checkpoints: Sequence[Kept],
    *,
    now: datetime,
    held: Mapping[str, Collection[str]] | None = None,
    bad: Mapping[str, str] | None = None,
    other_bytes: int = 0,
) -> Judgement:
    """What becomes of ``checkpoints``, oldest first, under ``keep``.

    Only good ones count, and the newest good one always stays; so does what is held, what others borrow from, and what
    is damaged, which is for a person to decide.

    Args:
        keep: the rules.
        checkpoints: all there are.
        now: the time.
        held: the names of the holds that pin each id.
        bad: the ids that are damaged, and what is wrong with them.
        other_bytes: what else takes up space there and can't make room. Not what these rules let go of before: were it
            counted, they would let go of more and more, and none of it would make room.
    """
    reasons = staying(keep, checkpoints, now=now, held=held, bad=bad, other_bytes=other_bytes)
    # Written once, not for each that goes.
    written = str(keep)
    return Judgement([verdict(c, reasons, written) for c in checkpoints])


def staying(
    keep: Keep,
    checkpoints: Sequence[Kept],
    *,
    now: datetime,
    held: Mapping[str, Collection[str]] | None = None,
    bad: Mapping[str, str] | None = None,
    other_bytes: int = 0,
) -> Mapping[str, str]:
    """Why each of ``checkpoints`` stays that does, by id; the arguments are those of ``judge``."""
    held, bad = held or {}, bad or {}
    good = [c for c in checkpoints if c.id not in bad]
    always = {id: f"held as {', '.join(sorted(names))}" for id, names in held.items()}
    newest = {c.id: "the newest good one always stays" for c in good[-1:]}
    bad_lenders = {lender for c in checkpoints if c.id in bad for lender in c.lenders}
    # What is damaged takes up space as well, and nobody can tell whether it could be less.
    bad_bytes = sum(own_bytes(c) for c in checkpoints if c.id in bad)
    situation = Situation(now, {*always, *newest, *bad_lenders}, other_bytes + bad_bytes)
    kept = merged([keep.kept(good, situation), always])
    for id, why in newest.items():
        kept.setdefault(id, why)
    there = [c for c in checkpoints if c.id in kept or c.id in bad]
    lenders = {lender: f"{c.id} borrows from it" for c in there for lender in c.lenders}
    return lenders | kept | {id: f"damaged, and so left as it is: {problem}" for id, problem in bad.items()}


def verdict(checkpoint: Kept, reasons: Mapping[str, str], keep: Keep | str) -> Verdict:
    """What becomes of ``checkpoint`` where ``reasons`` say what stays."""
    id = checkpoint.id
    why = reasons.get(id, f"not kept by {keep}")
    return Verdict(id, checkpoint.step, id in reasons, why, own_bytes(checkpoint))
