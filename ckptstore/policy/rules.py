"""The rules that say which checkpoints stay."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from fnmatch import fnmatchcase
from typing import overload

from ckptstore.errors import FormatError
from ckptstore.policy.events import Counted, Milestones, milestones_reached
from ckptstore.policy.metrics import Mode, check_metric, default_mode
from ckptstore.policy.progress import MILESTONE
from ckptstore.policy.retention import AtMost, Keep, Kept, Reasons, Situation
from ckptstore.units import duration_s, size_bytes


@dataclass(frozen=True)
class Last(Keep):
    """See ``last``."""

    count: int

    def kept(self, checkpoints: Sequence[Kept], situation: Situation) -> Reasons:
        """The newest."""
        why = f"one of the newest {self.count}" if self.count > 1 else "the newest"
        return {c.id: why for c in checkpoints[-self.count :]}

    def __str__(self) -> str:
        return f"last({self.count})"


def last(n: int) -> Last:
    """Keep the newest ``n`` checkpoints.

    Raises:
        FormatError: ``n`` is no whole number of at least 1: the newest one always stays.
    """
    return Last(_count(n, "last", "; the newest checkpoint always stays"))


@dataclass(frozen=True)
class Best(Keep):
    """See ``best``."""

    metric: str
    count: int
    mode: Mode

    def kept(self, checkpoints: Sequence[Kept], situation: Situation) -> Reasons:
        """The best."""
        rated = [c for c in checkpoints if not math.isnan(c.metrics.get(self.metric, math.nan))]
        if not rated:
            return {}
        recorded = rated[-1].modes.get(self.metric) or default_mode(self.metric)
        sign = 1 if (recorded if self.mode == "auto" else self.mode) == "max" else -1
        # Of equally good ones the newest: sorted is stable, and the last of all is the best.
        ranked = sorted(rated, key=lambda c: sign * c.metrics[self.metric])[-self.count :]
        return {c.id: f"{_nth(place)} best {self.metric}" for place, c in enumerate(reversed(ranked), 1)}

    def __str__(self) -> str:
        more = f", n={self.count}" if self.count != 1 else ""
        return f"best({self.metric!r}{more}" + ("" if self.mode == "auto" else f", mode={self.mode!r}") + ")"


def best(metric: str, n: int = 1, mode: Mode = "auto") -> Best:
    """Keep the ``n`` checkpoints with the best values of ``metric``; of equally good ones the newer.

    Those without a value, or whose value is nan, are not among them.

    Args:
        metric: its name, as it was saved.
        n: how many.
        mode: whether "min" or "max" is best; "auto" as it was saved, and that goes by the name: smaller is better with
            loss, error or perplexity in it.

    Raises:
        FormatError: no name, no count or no mode.
    """
    check_metric("best", metric, mode)
    return Best(metric, _count(n, f"best({metric!r}, n=…)"), mode)


@dataclass(frozen=True)
class Epochs(Keep):
    """See ``epochs``."""

    every: int

    def kept(self, checkpoints: Sequence[Kept], situation: Situation) -> Reasons:
        """The first ones saved when such an epoch had ended."""
        return _firsts(checkpoints, self._epoch, lambda epoch: f"end of epoch {epoch}")

    def _epoch(self, checkpoint: Kept) -> int | None:
        epoch = checkpoint.epoch
        return epoch if epoch and epoch % self.every == 0 else None

    def __str__(self) -> str:
        return "epochs()" if self.every == 1 else f"epochs(every={self.every})"


def epochs(every: int = 1) -> Epochs:
    """Keep the checkpoint at the end of each epoch, or of every second, third, …: the first saved after it ended.

    Raises:
        FormatError: ``every`` is no whole number of at least 1.
    """
    return Epochs(_count(every, "epochs"))


@dataclass(frozen=True)
class EveryKept(Keep):
    """See ``every_kept``."""

    steps: int

    def kept(self, checkpoints: Sequence[Kept], situation: Situation) -> Reasons:
        """The first of each stretch."""
        return _firsts(checkpoints, lambda c: c.step // self.steps, lambda n: f"first from step {n * self.steps}")

    def __str__(self) -> str:
        return f"every_kept(steps={self.steps})"


def every_kept(*, steps: int) -> EveryKept:
    """Keep one checkpoint of every ``steps`` steps: that of each multiple, or else the first one after it.

    Raises:
        FormatError: ``steps`` is no whole number of at least 1.
    """
    return EveryKept(_count(steps, "every_kept(steps=…)"))


@dataclass(frozen=True)
class MilestonesKept(Keep):
    """See ``milestones``."""

    def kept(self, checkpoints: Sequence[Kept], situation: Situation) -> Reasons:
        """The newest that was saved for each of them."""
        newest = {reason: c.id for c in checkpoints for reason in c.reasons if reason.startswith(MILESTONE)}
        return _by_id(newest)

    def __str__(self) -> str:
        return "milestones()"


@overload
def milestones() -> MilestonesKept: ...


@overload
def milestones(counts: str | Iterable[int | str], of: Counted = ...) -> Milestones: ...


def milestones(counts: str | Iterable[int | str] | None = None, of: Counted = "params") -> Milestones | MilestonesKept:
    """Save, or without arguments keep, the checkpoints at which a count was reached.

    As a schedule each milestone is saved once, as soon as it is reached: several that are passed at once give one
    checkpoint with all of them as reasons, and a save that fails leaves them pending. As a retention all stay.

    Args:
        counts: "1B,5B,10B", "100M,500M", "1.5b, 250k", or a list; exact. Of parameters and tokens, a number below 1,000
            without a unit means billions.
        of: what is counted: trainable "params", "tokens" learnt from, or "steps".

    Raises:
        FormatError: no counts, or nothing that is counted.
    """
    return MilestonesKept() if counts is None else milestones_reached(counts, of)


@dataclass(frozen=True)
class Within(Keep):
    """See ``within``."""

    seconds: float
    written: str = field(compare=False)

    def kept(self, checkpoints: Sequence[Kept], situation: Situation) -> Reasons:
        """The young ones. One from the future, by a wrong clock, is young."""
        # Ages are compared, as a time so long ago may lie before the calendar's beginning.
        longest = timedelta(seconds=self.seconds)
        return {c.id: f"younger than {self.written}" for c in checkpoints if situation.now - c.created <= longest}

    def __str__(self) -> str:
        return f"within({self.written!r})"


def within(age: str) -> Within:
    """Keep what was saved within the last ``age``: "90s", "10m", "24h", "7d".

    Raises:
        FormatError: no duration over 0.
    """
    seconds = duration_s(age, "within")
    if type(age) is not str or not 0 < seconds < timedelta.max.total_seconds() / 2:
        raise FormatError(f"within({age!r}) must be a duration with its unit, as '7d' or '24h'")
    return Within(seconds, age)


@dataclass(frozen=True)
class Tagged(Keep):
    """See ``tagged``."""

    patterns: tuple[str, ...]

    def kept(self, checkpoints: Sequence[Kept], situation: Situation) -> Reasons:
        """Those with such a reason."""
        found = {c.id: next(filter(self._matches, c.reasons), None) for c in checkpoints}
        return {id: f"saved for {reason!r}" for id, reason in found.items() if reason is not None}

    def _matches(self, reason: str) -> bool:
        return any(fnmatchcase(reason, pattern) for pattern in self.patterns)

    def __str__(self) -> str:
        return f"tagged({', '.join(map(repr, self.patterns))})"


def tagged(*reasons: str) -> Tagged:
    """Keep what was saved for one of these reasons: ``tagged("SIGTERM", "paper *")``. ``*`` stands for any text.

    Raises:
        FormatError: none is given, or what is no text.
    """
    if not reasons or not all(type(reason) is str and reason for reason in reasons):
        raise FormatError(f"tagged({', '.join(map(repr, reasons))}): give reasons as text, as tagged('final')")
    return Tagged(reasons)


def at_most(size: str | int) -> AtMost:
    """Keep no more than ``size`` in all, as "9GB", and up to that as much as there is room for.

    What goes is taken first where checkpoints lie densest for their age, so that those that stay lie ever further apart
    the older they are. Beside other rules what these keep comes first; where that alone is too large, it is thinned,
    too. What always stays (the newest, held and damaged ones, what others borrow from) stays. Checkpoints that a person
    deleted count until their space is reclaimed; those that rules let go of are reclaimed as soon as their room is
    needed.

    Raises:
        FormatError: no size.
    """
    limit = size_bytes(size, "at_most")
    if limit < 1:
        raise FormatError(f"at_most({size!r}) must be over 0, as '9GB'; the newest checkpoint always stays")
    return AtMost(limit, size)


def _firsts(checkpoints: Sequence[Kept], key: Callable[[Kept], int | None], why: Callable[[int], str]) -> Reasons:
    """Of each key the checkpoint with the fewest steps, of several the newest: after a roll-back that of the new line.

    Nothing but the checkpoints of one key decides among them, so that whatever else goes, the one that is kept stays.
    """
    first: dict[int, Kept] = {}
    for checkpoint in checkpoints:
        number = key(checkpoint)
        if number is not None and (number not in first or checkpoint.step <= first[number].step):
            first[number] = checkpoint
    return {checkpoint.id: why(number) for number, checkpoint in first.items()}


def _by_id(ids: dict[str, str]) -> Reasons:
    """The reasons of each id, for ``ids`` by reason."""
    reasons: dict[str, list[str]] = {}
    for reason, id in ids.items():
        reasons.setdefault(id, []).append(reason)
    return {id: ", ".join(each) for id, each in reasons.items()}


def _nth(place: int) -> str:
    ending = "th" if place % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(place % 10, "th")
    return "the" if place == 1 else f"{place}{ending}"


def _count(value: object, where: str, more: str = "") -> int:
    if type(value) is not int or value < 1:
        raise FormatError(f"{where}: {value!r} must be a whole number of at least 1{more}")
    return value
