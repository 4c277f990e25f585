"""Let go of some checkpoints of many, so that those that stay lie ever further apart the older they are."""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Protocol


class Sized(Protocol):
    """What a checkpoint takes, and from which others it borrows."""

    @property
    def id(self) -> str: ...
    @property
    def step(self) -> int: ...
    @property
    def stored_bytes(self) -> int: ...
    @property
    def borrowed_bytes(self) -> int: ...
    @property
    def lenders(self) -> Sequence[str]: ...


def own_bytes(checkpoint: Sized) -> int:
    """What lies in its own folder."""
    return checkpoint.stored_bytes - checkpoint.borrowed_bytes


class Thinner:
    """Thins ``checkpoints``, oldest first, but for those that are protected.

    Args:
        checkpoints: all there are.
        protected: the ids that stay.
        among: those that may stay; by default all. The files of the others stay only where these borrow from them.
    """

    def __init__(
        self, checkpoints: Sequence[Sized], protected: Collection[str], *, among: Collection[str] | None = None
    ) -> None:
        self._all = checkpoints if among is None else [c for c in checkpoints if c.id in among]
        self._protected = protected
        self._own = {c.id: own_bytes(c) for c in checkpoints}

    @property
    def bytes_of_protected(self) -> int:
        """What stays whatever happens."""
        return self._bytes([c for c in self._all if c.id in self._protected])

    def _bytes(self, checkpoints: Sequence[Sized]) -> int:
        used = {id for c in checkpoints for id in (c.id, *c.lenders)}
        return sum(self._own.get(id, 0) for id in used)

    def until(self, limit: int) -> list[str]:
        """The ids that stay, so that they take ``limit`` bytes at most, if that can be had.

        Always goes next the one whose gap is the smallest for its age: of those that stay, the gaps grow in proportion
        to the age. Distances are counted in steps along the history, there and back where it was rolled back.
        """
        total = self._bytes(self._all)
        if total <= limit or not self._all:
            return [c.id for c in self._all]
        users: dict[str, int] = {}
        for c in self._all:
            for id in (c.id, *c.lenders):
                users[id] = users.get(id, 0) + 1
        steps = [c.step for c in self._all]
        # From the beginning of the run: what went before the oldest one that is left is part of its gap.
        places = list(accumulate((abs(later - one) or 1 for one, later in pairwise(steps)), initial=steps[0]))
        gone = set()
        for index in _dispensable(places, [c.id in self._protected for c in self._all]):
            going = self._all[index]
            gone.add(going.id)
            for used in (going.id, *going.lenders):
                users[used] -= 1
                # A lender's files stay as long as anybody needs them.
                if users[used] == 0:
                    total -= self._own.get(used, 0)
            if total <= limit:
                break
        return [c.id for c in self._all if c.id not in gone]


def _dispensable(places: Sequence[int], fixed: Sequence[bool]) -> Iterator[int]:
    """The indices of ``places``, in order, that aren't fixed: ever the most dispensable of those that are left."""
    count, newest = len(places), places[-1]
    before, after = list(range(-1, count - 1)), list(range(1, count + 1))
    # Where there is none before, -1 finds the beginning of the run; where there is none after, all are equally far.
    places = [*places, 0]

    def weight(index: int) -> float:
        """The gap that would remain, for its age. The newest has no age, and goes last."""
        if after[index] == count:
            return math.inf
        return (places[after[index]] - places[before[index]]) / (newest - places[index])

    heap = [(weight(index), index) for index in range(count) if not fixed[index]]
    heapq.heapify(heap)
    while heap:
        known, index = heap[0]
        # Gaps only grow: the least known weight is the least of all once it is up to date.
        if (now := weight(index)) > known:
            heapq.heapreplace(heap, (now, index))
            continue
        heapq.heappop(heap)
        if before[index] >= 0:
            after[before[index]] = after[index]
        if after[index] < count:
            before[after[index]] = before[index]
        yield index
