"""When a run saves: by its schedule, what was saved before, what was reported, and what failed."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ckptstore.policy.progress import Length, Past, Progress, Remembered
from ckptstore.policy.schedule import AnyOf, Schedule, parts_of


class Decisions:
    """One run's. A save in the background counts as made until it turns out to have failed.

    Attributes:
        schedule, length: that it goes by.
        reported: metrics since the last save that succeeded, or is under way.
    """

    def __init__(self, schedule: Schedule | None, length: Length, *, retry_s: float) -> None:
        self.schedule, self.length = schedule, length
        self.reported: dict[str, float] = {}
        self._retry_s = retry_s
        self._sure = Past()
        self._hoped: Past | None = None
        self._under_way: tuple[frozenset[str], dict[str, float]] = (frozenset(), {})
        # Why the last save was tried that failed, and is asked for ever since; and when it is tried again.
        self._stuck: frozenset[str] = frozenset()
        self._retry_at = 0.0

    @property
    def past(self) -> Past:
        """What the schedule remembers."""
        return self._hoped or self._sure

    def resume(self, past: Past) -> None:
        """Go on with what a checkpoint remembers."""
        self._sure, self._hoped = past, None

    def resume_after(self, now: Progress, line: Sequence[Remembered]) -> None:
        """Go on after ``line``, checkpoints that remember nothing themselves; the last one was loaded."""
        self.resume(Past.resumed(now, line))

    @property
    def is_stuck(self) -> bool:
        """Whether what the last save was for is still asked for, since it failed."""
        return bool(self._stuck)

    def due(self, now: Progress, *, last: bool = False) -> list[str]:
        """Why the state at ``now`` is to be saved; empty where it isn't. At the ``last`` time nothing is put off."""
        if self.schedule is None:
            return []
        past = self._hoped or self._sure
        reasons = self.schedule.due(now, past, self.length)
        self._sure = self._sure.decided(now)
        if self._hoped is not None:
            self._hoped = self._hoped.decided(now)
        if self._stuck:
            # A milestone is asked for at each step until it is saved: a full disk is not tried that often.
            self._stuck &= set(reasons)
            if not last and self._stuck.issuperset(reasons) and time.monotonic() < self._retry_at:
                return []
        return reasons

    def after(self, now: Progress, reasons: Sequence[str]) -> Past:
        """What is remembered once the state at ``now`` is saved: it stands in the checkpoint itself."""
        return self._sure.saved(now, reasons)

    def began(self, now: Progress, reasons: Sequence[str]) -> None:
        """A save of the state at ``now`` is under way."""
        self._hoped = self.after(now, reasons)
        self._under_way = frozenset(reasons), self.reported
        self.reported = {}

    def succeeded(self) -> None:
        """It is durable."""
        self._sure = self._hoped or self._sure
        self._hoped, self._stuck = None, frozenset()

    def failed(self) -> None:
        """It is not: all that it was for is pending again."""
        reasons, reported = self._under_way
        self._hoped = None
        self.reported = {**reported, **self.reported}
        self._stuck, self._retry_at = reasons, time.monotonic() + self._retry_s


class Counted:
    """What of a schedule goes by counters alone. All ranks of a run know without a message when it is due."""

    def __init__(self, schedule: Schedule | None, length: Length) -> None:
        self._parts = [part for part in parts_of(schedule or AnyOf(())) if part.is_counted()]
        self._length, self._past = length, Past()

    def resume(self, past: Past) -> None:
        """Go on with what a checkpoint remembers."""
        self._past = past

    def due(self, now: Progress) -> bool:
        """Whether it is due at ``now``; True once for each time, as it is rank 0 that tries again what failed."""
        reasons = [reason for part in self._parts for reason in part.due(now, self._past, self._length)]
        self._past = self._past.decided(now).saved(now, reasons)
        return bool(reasons)


class Evaluations:
    """When a run evaluates."""

    def __init__(self, schedule: Schedule | None, length: Length) -> None:
        self._schedule, self._length = schedule, length
        self._past = Past()

    def is_counted(self) -> bool:
        """Whether counters alone decide."""
        return self._schedule is None or self._schedule.is_counted()

    def resume(self, now: Progress) -> None:
        """Go on after ``now``."""
        self._past = Past().decided(now)

    def due(self, now: Progress) -> bool:
        """Whether it evaluates at ``now``; True once for each time."""
        if self._schedule is None:
            return False
        due = bool(self._schedule.due(now, self._past, self._length))
        self._past = self._past.decided(now)
        return due


def past_fields(past: Past) -> dict[str, object]:
    """``past`` as plain values."""
    return {**vars(past), "reached": sorted(past.reached), "best": dict(past.best)}


def past_of(fields: Mapping[str, object], now: Progress) -> Past:
    """The inverse of ``past_fields``, decided at ``now``."""
    known = {name: fields[name] for name in ("saved_s", "best") if name in fields}
    reached = fields.get("reached", ())
    return replace(Past(**known), reached=frozenset(reached)).decided(now)  # type: ignore[arg-type, call-overload]
