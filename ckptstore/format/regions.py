"""Boxes within a tensor: where a shard lies, what two of them share, and which of their bytes are the same."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from math import prod
from typing import NamedTuple, TypeAlias

import numpy as np

Shape: TypeAlias = tuple[int, ...]

_MAX_CELLS = 1 << 24
"""Pieces that a tensor may be cut into by all borders of its shards; 4096 ranks in a square make as many."""


class Region(NamedTuple):
    """A box of elements, by its first element and its extent in each dimension."""

    offset: Shape
    shape: Shape

    @classmethod
    def whole(cls, shape: Shape) -> Region:
        """All of a tensor."""
        return cls((0,) * len(shape), shape)

    def fits(self, shape: Shape) -> bool:
        """Whether it lies within a tensor."""
        if not len(self.offset) == len(self.shape) == len(shape):
            return False
        return all(begin + count <= size for begin, count, size in zip(self.offset, self.shape, shape, strict=True))

    def within(self, other: Region) -> Region | None:
        """What it shares with ``other``, from where that begins; None where that is nothing."""
        low = tuple(max(a, b) for a, b in zip(self.offset, other.offset, strict=True))
        high = tuple(
            min(a + n, b + m)
            for a, n, b, m in zip(self.offset, self.shape, other.offset, other.shape, strict=True)
        )  # fmt: skip
        if any(a >= b for a, b in zip(low, high, strict=True)):
            return None
        offset = tuple(a - b for a, b in zip(low, other.offset, strict=True))
        return Region(offset, tuple(b - a for a, b in zip(low, high, strict=True)))


class Run(NamedTuple):
    """Bytes that lie in one piece in two regions."""

    source: int
    """Where they begin in the one, in bytes."""
    target: int
    length: int


def runs(source: Region, target: Region, item: int, begin: int, end: int) -> Iterator[Run]:
    """Which of the bytes ``[begin, end)`` of ``source`` lie in ``target``, too, and where, in order.

    Both are boxes of the same tensor, stored in C order, with elements of ``item`` bytes.
    """
    shared = source.within(target)
    if shared is None or end <= begin:
        return
    low = [a + b for a, b in zip(target.offset, shared.offset, strict=True)]
    high = [a + n for a, n in zip(low, shared.shape, strict=True)]
    strides = _strides(source.shape, item), _strides(target.shape, item)
    depth = _depth(source.shape, target.shape, low, high)
    length = item if not low else (high[depth] - low[depth]) * strides[0][depth]
    outer = [range(a, b) for a, b in zip(low[:depth], high[:depth], strict=True)]
    if outer:
        # Of a large shard most rows lie outside of the bytes asked for.
        step, first = strides[0][0], source.offset[0]
        rows = range(first + begin // step, first + (end - 1) // step + 1)
        outer[0] = range(max(low[0], rows.start), min(high[0], rows.stop))
    tail = low[depth:]
    for head in itertools.product(*outer):
        at = [*head, *tail]
        place = sum((i - o) * s for i, o, s in zip(at, source.offset, strides[0], strict=True))
        start, stop = max(place, begin), min(place + length, end)
        if start < stop:
            there = sum((i - o) * s for i, o, s in zip(at, target.offset, strides[1], strict=True))
            yield Run(start, there + start - place, stop - start)


def _strides(shape: Shape, item: int) -> list[int]:
    return [item * prod(shape[n + 1 :]) for n in range(len(shape))]


def _depth(one: Shape, other: Shape, low: Sequence[int], high: Sequence[int]) -> int:
    """The first dimension below which both regions share whole rows."""
    depth = max(len(low) - 1, 0)
    while depth > 0 and high[depth] - low[depth] == one[depth] == other[depth]:
        depth -= 1
    return depth


def tiles(shape: Shape, regions: Sequence[Region]) -> bool:
    """Whether ``regions`` cover a tensor exactly: no gap, no overlap. Empty ones count for nothing."""
    regions = [region for region in regions if prod(region.shape)]
    if not all(region.fits(shape) for region in regions):
        return False
    if sum(prod(region.shape) for region in regions) != prod(shape):
        return False
    # The volumes agree: then it is enough that none overlaps another.
    edges = [sorted({e for r in regions for e in (r.offset[n], r.offset[n] + r.shape[n])}) for n in range(len(shape))]
    cells = [max(len(edge) - 1, 1) for edge in edges]
    if prod(cells) > _MAX_CELLS:
        return False
    covered = np.zeros(cells, bool)
    places = [{edge: index for index, edge in enumerate(edge_list)} for edge_list in edges]
    for region in regions:
        box = tuple(
            slice(place[begin], place[begin + count])
            for place, begin, count in zip(places, region.offset, region.shape, strict=True)
        )
        if covered[box].any():
            return False
        covered[box] = True
    return True
