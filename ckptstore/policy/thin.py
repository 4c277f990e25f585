"""Let go of some checkpoints of many, so that those that stay lie ever further apart the older they are."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Sequence
from itertools import accumulate, pairwise
from typing import Protocol


class _Sized(Protocol):
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


class Thinner:
    """Thins ``checkpoints``, oldest first, but for those that are protected.

    Args:
        checkpoints: all there are.
        protected: the ids that stay.
        among: those that may stay; by default all. The files of the others stay only where these borrow from them.
    """

    def __init__(
        self, checkpoints: Sequence[_Sized], protected: Collection[str], *, among: Collection[str] | None = None
    ) -> None:
        self._all = checkpoints if among is None else [c for c in checkpoints if c.id in among]
        self._protected = protected
        self._own = {c.id: c.stored_bytes - c.borrowed_bytes for c in checkpoints}

    @property
    def bytes_of_protected(self) -> int:
        """What stays whatever happens."""
        return self._bytes([c for c in self._all if c.id in self._protected])

    def _bytes(self, checkpoints: Sequence[_Sized]) -> int:
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
        line = _Line(
            # From the beginning of the run: what went before the oldest one that is left is part of its gap.
            list(accumulate((abs(later - one) or 1 for one, later in pairwise(steps)), initial=steps[0])),
            [c.id in self._protected for c in self._all],
        )
        gone = set()
        while total > limit and (index := line.pop()) is not None:
            going = self._all[index]
            gone.add(going.id)
            for used in (going.id, *going.lenders):
                users[used] -= 1
                # A lender's files stay as long as anybody needs them.
                if users[used] == 0:
                    total -= self._own.get(used, 0)
        return [c.id for c in self._all if c.id not in gone]


class _Line:
    """Places in order, of which the most dispensable is taken out, one after the other."""

    def __init__(self, places: Sequence[int], fixed: Sequence[bool]) -> None:
        count = len(places)
        self._places, self._fixed = places, fixed
        self._before = list(range(-1, count - 1))
        self._after = list(range(1, count + 1))
        self._heap = [(self._weight(index), index) for index in range(count) if not fixed[index]]
        heapq.heapify(self._heap)
        self._gone = [False] * count

    def _weight(self, index: int) -> float:
        """The gap that would remain, for its age. The newest has no age, and goes last."""
        before, after = self._before[index], self._after[index]
        if after == len(self._places):
            return float("inf")
        start = self._places[before] if before >= 0 else 0
        return (self._places[after] - start) / (self._places[-1] - self._places[index])

    def pop(self) -> int | None:
        while self._heap:
            weight, index = heapq.heappop(self._heap)
            # Its gap has grown since, and the heap holds it once more with that.
            if self._gone[index] or weight != self._weight(index):
                continue
            self._gone[index] = True
            before, after = self._before[index], self._after[index]
            for neighbour, links, other in ((before, self._after, after), (after, self._before, before)):
                if 0 <= neighbour < len(self._places):
                    links[neighbour] = other
            for neighbour in (before, after):
                if 0 <= neighbour < len(self._places) and not self._fixed[neighbour]:
                    heapq.heappush(self._heap, (self._weight(neighbour), neighbour))
            return index
        return None
