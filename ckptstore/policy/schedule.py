"""When to save: what all schedules have in common, and how they combine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ckptstore.errors import FormatError
from ckptstore.policy.progress import LONGEST, Length, Past, Progress


class Schedule(ABC):
    """When to save. Values: the same progress and past give the same decision, and nothing is kept inside.

    Combine two with ``|``: what either wants is saved, once, for the reasons of both.
    """

    @abstractmethod
    def due(self, now: Progress, past: Past, length: Length) -> list[str]:
        """Why ``now`` is to be saved, as text for people; empty where it isn't."""

    @abstractmethod
    def enumerate(self, length: Length) -> list[int]:
        """All steps that it saves in a run of ``length``, sorted, each once.

        Raises:
            FormatError: something about the length is missing, or it depends on more than steps (see ``open_ends``).
        """

    def open_ends(self, length: Length) -> list[str]:
        """What of it no one can tell beforehand, for people; empty where ``enumerate`` knows all."""
        return []

    def is_counted(self) -> bool:
        """Whether steps, epochs and tokens alone decide, which all ranks of a run count alike."""
        return False

    def check(self, length: Length) -> None:  # noqa: B027 - most fit any run
        """Nothing, where it fits a run of ``length``.

        Raises:
            FormatError: it would never save, or not all that it says; what to write instead.
        """

    def steps(
        self,
        total_steps: int | None = None,
        epochs: int | None = None,
        *,
        length: Length | None = None,
        known_only: bool = False,
        **more: Any,
    ) -> list[int]:
        """All steps that it saves, sorted, each once.

        Args:
            total_steps, epochs, more: of the run, as for ``Length.of``.
            length: instead of these.
            known_only: leave out what depends on metrics or time, instead of raising.

        Raises:
            FormatError: it doesn't fit that run, or something depends on metrics or time.
        """
        run = length or Length.of(total_steps, epochs, **more)
        self.check(run)
        if (open_ends := self.open_ends(run)) and not known_only:
            raise FormatError(f"{'; '.join(open_ends)}. known_only=True lists the others")
        return self.enumerate(run)

    def __or__(self, other: object) -> Schedule:
        if not isinstance(other, Schedule):
            return NotImplemented
        return AnyOf((*parts_of(self), *parts_of(other)))

    @abstractmethod
    def __str__(self) -> str:
        """As it is written."""


@dataclass(frozen=True)
class AnyOf(Schedule):
    """Saves what any of its parts saves."""

    parts: tuple[Schedule, ...]

    def due(self, now: Progress, past: Past, length: Length) -> list[str]:
        """The reasons of all parts, each once."""
        return list(dict.fromkeys(reason for part in self.parts for reason in part.due(now, past, length)))

    def enumerate(self, length: Length) -> list[int]:
        """The steps of all parts whose steps are known."""
        known = [part for part in self.parts if not part.open_ends(length)]
        return sorted({step for part in known for step in part.enumerate(length)})

    def open_ends(self, length: Length) -> list[str]:
        """Those of all parts."""
        return [end for part in self.parts for end in part.open_ends(length)]

    def is_counted(self) -> bool:
        """Whether that is so with all parts."""
        return all(part.is_counted() for part in self.parts)

    def check(self, length: Length) -> None:
        """Checks each part."""
        for part in self.parts:
            part.check(length)

    def __str__(self) -> str:
        return " | ".join(map(str, self.parts))


def parts_of(schedule: Schedule) -> tuple[Schedule, ...]:
    """What ``schedule`` is combined of."""
    return schedule.parts if isinstance(schedule, AnyOf) else (schedule,)


def within_limit(count: int, what: object) -> None:
    """Nothing, for a number of steps that can be listed.

    Raises:
        FormatError: they are too many.
    """
    if count > LONGEST:
        raise FormatError(f"{what} would save {count:,} times: write longer intervals")


def crossed(steps: Sequence[int], after: int, until: int) -> bool:
    """Whether one of ``steps``, sorted, lies over ``after`` and not over ``until``."""
    return bisect_right(steps, until) > bisect_right(steps, after)
