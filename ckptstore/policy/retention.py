"""Which checkpoints stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ckptstore.errors import FormatError


class Ordered(Protocol):
    """What a rule needs to know of a checkpoint."""

    @property
    def id(self) -> str: ...


class Keep(Protocol):
    """A rule."""

    def kept(self, checkpoints: Sequence[Ordered]) -> set[str]:
        """The ids that stay, of ``checkpoints``, oldest first."""


@dataclass(frozen=True)
class Last:
    """See ``last``."""

    count: int

    def kept(self, checkpoints: Sequence[Ordered]) -> set[str]:
        """The ids of the newest."""
        return {checkpoint.id for checkpoint in checkpoints[-self.count :]}


def last(n: int) -> Last:
    """Keep the newest ``n`` checkpoints.

    Raises:
        FormatError: ``n`` is no whole number of at least 1: the newest one always stays.
    """
    if type(n) is not int or n < 1:
        raise FormatError(f"last({n!r}): give a whole number of at least 1; the newest checkpoint always stays")
    return Last(n)
