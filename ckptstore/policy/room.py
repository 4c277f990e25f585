"""How much room checkpoints take that can't be foreseen: the best ones, and those that are saved besides."""

from __future__ import annotations

from ckptstore.policy.events import Milestones
from ckptstore.policy.progress import Length
from ckptstore.policy.retention import AtMost, Keep, rules_of
from ckptstore.policy.rules import Best, Epochs, EveryKept, Last, MilestonesKept
from ckptstore.policy.schedule import Schedule, parts_of


class Room:
    """The most that can lie on storage, where more may be saved or kept than is foreseen.

    Each way to bound it is an upper one by itself: what is foreseen and all that may come besides; as many as the rules
    keep; the limit of ``at_most``; all that was saved so far.
    """

    def __init__(
        self, save: Schedule, keep: Keep | None, length: Length, checkpoint_bytes: int, *, in_trash: bool
    ) -> None:
        rules = rules_of(keep)
        self._bytes = checkpoint_bytes
        self._best = sum(rule.count for rule in rules if isinstance(rule, Best))
        self._besides = _besides(save, length)
        # Beside what lies in the trash, the rules bound nothing.
        ceilings = [] if in_trash else [rule.limit for rule in rules if isinstance(rule, AtMost)]
        counts = [_count(rule, save, length) for rule in rules if not isinstance(rule, AtMost)]
        if not in_trash and not ceilings and counts and all(count is not None for count in counts):
            # The newest always stays, and only ``last`` has counted it.
            newest = 0 if any(isinstance(rule, Last) for rule in rules) else 1
            ceilings.append(checkpoint_bytes * (newest + sum(count or 0 for count in counts)))
        # Also what is larger than a limit stays, if it is the newest.
        self._ceiling = max(min(ceilings), checkpoint_bytes) + checkpoint_bytes if ceilings else None

    @property
    def is_known(self) -> bool:
        """Whether ``peak`` is an upper bound."""
        return self._besides is not None or self._ceiling is not None

    def peak(self, foreseen_bytes: int, saved: int) -> int:
        """The most that can lie there where ``foreseen_bytes`` are foreseen, and ``saved`` checkpoints were."""
        bounds = [] if self._ceiling is None else [self._ceiling]
        if self._besides is not None:
            bounds.append(foreseen_bytes + (self._best + self._besides) * self._bytes)
            bounds.append((saved + self._besides) * self._bytes)
        return max(foreseen_bytes, min(bounds, default=foreseen_bytes + self._best * self._bytes))


def _besides(save: Schedule, length: Length) -> int | None:
    """How many may be saved besides those that are foreseen; None where there is no limit."""
    parts = [part for part in parts_of(save) if part.open_ends(length)]
    if not all(isinstance(part, Milestones) for part in parts):
        return None
    return sum(len(part.counts) for part in parts if isinstance(part, Milestones))


def _count(rule: Keep, save: Schedule, length: Length) -> int | None:
    """How many ``rule`` keeps at most in a run of ``length``; None where there is no limit."""
    total = length.require_total("a plan")
    if isinstance(rule, Last | Best):
        return rule.count
    if isinstance(rule, Epochs) and (length.epochs or length.steps_per_epoch):
        return len(length.epoch_ends()) // rule.every
    if isinstance(rule, EveryKept):
        return total // rule.steps + 1
    if isinstance(rule, MilestonesKept):
        return sum(len(part.counts) for part in parts_of(save) if isinstance(part, Milestones))
    return None
