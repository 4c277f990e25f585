"""Which checkpoints stay: what all rules have in common, and how they combine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol

from ckptstore.policy.thin import Sized, Thinner


class Kept(Sized, Protocol):
    """What the rules need to know of a checkpoint. Those of a store are such."""

    @property
    def epoch(self) -> int | None: ...
    @property
    def metrics(self) -> Mapping[str, float]: ...
    @property
    def modes(self) -> Mapping[str, str]: ...
    @property
    def reasons(self) -> Sequence[str]: ...
    @property
    def created(self) -> datetime: ...


@dataclass(frozen=True)
class Situation:
    """What a rule goes by besides the checkpoints.

    Attributes:
        now: the time.
        fixed: ids that stay whatever the rules say.
        other_bytes: what else takes up space there and can't make room, as what a person deleted and may bring back.
    """

    now: datetime
    fixed: Collection[str] = ()
    other_bytes: int = 0


Reasons = Mapping[str, str]
"""Why each of the ids stays, for people."""


class Keep(ABC):
    """Which checkpoints stay. Values: the same checkpoints give the same answer, and nothing is kept inside.

    Combine two with ``|``: what either keeps stays.
    """

    @property
    def limit_bytes(self) -> int | None:
        """No more than that may lie there in all; None without a limit."""
        return None

    @abstractmethod
    def kept(self, checkpoints: Sequence[Kept], situation: Situation) -> Reasons:
        """What stays of ``checkpoints``, oldest first, and why."""

    def __or__(self, other: object) -> Keep:
        if not isinstance(other, Keep):
            return NotImplemented
        return AnyOf((*rules_of(self), *rules_of(other)))

    @abstractmethod
    def __str__(self) -> str:
        """As it is written."""


@dataclass(frozen=True)
class AtMost(Keep):
    """See ``at_most``."""

    limit: int
    written: int | str = field(compare=False)

    @property
    def limit_bytes(self) -> int:
        """As it is written."""
        return self.limit

    def kept(self, checkpoints: Sequence[Kept], situation: Situation) -> Reasons:
        """As many as there is room for."""
        return self.capped(checkpoints, {}, situation)

    def capped(self, checkpoints: Sequence[Kept], others: Reasons, situation: Situation) -> Reasons:
        """What stays of what ``others`` keep, or these and as many more as there is room for."""
        room = self.limit - situation.other_bytes
        first = {*situation.fixed, *others}
        thinner = Thinner(checkpoints, first)
        if thinner.bytes_of_protected > room:
            # They alone are too large: what the other rules keep is thinned as well, and nothing else stays.
            stay = Thinner(checkpoints, set(situation.fixed), among=first).until(room)
            return {id: others[id] for id in stay if id in others}
        within = f"there is room within {self.written}" + ("B" if isinstance(self.written, int) else "")
        return {id: others.get(id, within) for id in thinner.until(room)}

    def __str__(self) -> str:
        return f"at_most({self.written!r})"


@dataclass(frozen=True)
class AnyOf(Keep):
    """Keeps what any of its parts keeps; where one of them is ``at_most``, no more than that, the least of several."""

    parts: tuple[Keep, ...]

    @property
    def limit_bytes(self) -> int | None:
        """The least of all parts."""
        return min((part.limit_bytes for part in self.parts if part.limit_bytes is not None), default=None)

    def kept(self, checkpoints: Sequence[Kept], situation: Situation) -> Reasons:
        """What any part keeps, for the reasons of all of them."""
        rules = [part for part in self.parts if not isinstance(part, AtMost)]
        reasons: Reasons = merged(rule.kept(checkpoints, situation) for rule in rules)
        limits = [part for part in self.parts if isinstance(part, AtMost)]
        if limits:
            # The smallest says it all: a larger one would fill up what that one has emptied.
            return min(limits, key=lambda part: part.limit).capped(checkpoints, reasons, situation)
        return reasons

    def __str__(self) -> str:
        return " | ".join(map(str, self.parts))


def merged(reasons: Iterable[Reasons]) -> dict[str, str]:
    """All of them, for each id one after the other."""
    given = [each for each in reasons if each]
    if len(given) < 2:
        return dict(*given)
    found: dict[str, list[str]] = {}
    for each in given:
        for id, why in each.items():
            found.setdefault(id, []).append(why)
    return {id: ", ".join(whys) for id, whys in found.items()}


def rules_of(keep: Keep | None) -> tuple[Keep, ...]:
    """What ``keep`` is combined of; nothing for None."""
    if keep is None:
        return ()
    return keep.parts if isinstance(keep, AnyOf) else (keep,)
