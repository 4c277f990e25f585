"""Plans of who writes what, made anew only where something has changed since the last save."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ckptstore.engine.sharing import Plan, Samples, Table, rank_classes, share

SAMPLE_CHARACTERS = 16
"""Of one sample's digest, as it travels: 64 bits in hex."""


class Sharer:
    """Rank 0's memory of what the ranks have, and of the plan for it.

    Attributes:
        changed: whether the last plan is another one than that before.
    """

    def __init__(self) -> None:
        self.changed = True
        self._tables: dict[int, Table] = {}
        self._classes: list[list[int]] = []
        self._signature: bytes | None = None
        self._plan: Plan | None = None

    def plan(self, tables: Sequence[Table | None], samples: Sequence[str]) -> Plan:
        """Who writes what.

        Args:
            tables: of each rank; None where it is the one of the last save.
            samples: of each rank, the digests of its tensors' samples one behind the other.

        Raises:
            RanksError: as ``share``.
        """
        fresh = {rank: table for rank, table in enumerate(tables) if table is not None}
        if fresh:
            self._signature = None
            self._tables |= fresh
            self._classes = rank_classes([self._tables[rank] for rank in range(len(tables))])
        numbers = [_numbers(each) for each in samples]
        signature = self._sign(numbers)
        self.changed = signature != self._signature
        if self.changed or self._plan is None:
            each = [self._tables[rank] for rank in range(len(tables))]
            self._plan = share(each, numbers)
            self._signature = signature
        return self._plan

    def _sign(self, samples: Sequence[Samples]) -> bytes:
        """Which ranks hold the same under which name: equal signatures, equal plans."""
        found: list[bytes] = []
        common: dict[str, list[int]] = {}
        for ranks in self._classes:
            names = self._tables[ranks[0]]["names"]
            matrix = np.stack([samples[rank] for rank in ranks]) if names else np.empty((len(ranks), 0), np.uint64)
            equal = (matrix == matrix[0]).all(axis=0)
            found.append(equal.tobytes())
            for column in np.flatnonzero(~equal):
                found.append(_grouping(matrix[:, column].tolist()))
            if len(self._classes) > 1:
                for name, number in zip(names, matrix[0].tolist(), strict=True):
                    common.setdefault(name, []).append(number)
        found += [_grouping(numbers) for numbers in common.values() if len(numbers) > 1]
        return b"/".join(found)


def _numbers(samples: str) -> Samples:
    return np.frombuffer(bytes.fromhex(samples), np.uint64)


def _grouping(values: Sequence[Any]) -> bytes:
    """Which of them are equal, whatever they are."""
    first: dict[Any, int] = {}
    return np.array([first.setdefault(value, len(first)) for value in values], np.uint32).tobytes()
