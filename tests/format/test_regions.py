"""Boxes within a tensor: the bytes that two of them share, and whether some make up a whole."""

from __future__ import annotations

import itertools
from math import prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptstore.format.regions import Region, runs, tiles


@st.composite
def boxes(draw: st.DrawFn, shape: tuple[int, ...]) -> Region:
    offset = tuple(draw(st.integers(0, n - 1)) for n in shape)
    return Region(offset, tuple(draw(st.integers(1, n - o)) for n, o in zip(shape, offset, strict=True)))


@st.composite
def pairs(draw: st.DrawFn) -> tuple[tuple[int, ...], Region, Region]:
    shape = tuple(draw(st.lists(st.integers(1, 5), max_size=4)))
    return shape, draw(boxes(shape)), draw(boxes(shape))


def cut(tensor: np.ndarray, region: Region) -> np.ndarray:
    index = tuple(slice(o, o + n) for o, n in zip(region.offset, region.shape, strict=True))
    return np.ascontiguousarray(tensor[index])


@given(pairs(), st.sampled_from([np.uint8, np.int32, np.float64]), st.data())
def test_runs_move_what_both_have_and_nothing_else(
    case: tuple[tuple[int, ...], Region, Region], dtype: type, data: st.DataObject
) -> None:
    shape, source, target = case
    whole = np.arange(1, prod(shape) + 1, dtype=dtype).reshape(shape)
    stored, wanted = cut(whole, source), cut(whole, target)
    raw, item = stored.tobytes(), stored.itemsize
    # In pieces, as blocks give them; elements never straddle two.
    places = data.draw(st.lists(st.integers(0, len(raw) // item), max_size=4))
    edges = sorted({0, len(raw), *(place * item for place in places)})
    got = np.zeros(wanted.nbytes, np.uint8)
    times = np.zeros(wanted.nbytes, int)
    for begin, end in itertools.pairwise(edges):
        for at, to, length in runs(source, target, item, begin, end):
            assert begin <= at <= at + length <= end
            got[to : to + length] = np.frombuffer(raw, np.uint8)[at : at + length]
            times[to : to + length] += 1
    mask = np.zeros(shape, bool)
    mask[tuple(slice(o, o + n) for o, n in zip(source.offset, source.shape, strict=True))] = True
    inside = np.repeat(cut(mask, target).reshape(-1), item)
    assert np.array_equal(times, inside.astype(int))
    expected = np.where(inside, np.frombuffer(wanted.tobytes(), np.uint8), 0)
    assert np.array_equal(got, expected)


def test_shards_of_rows_are_single_runs() -> None:
    """However many rows: nothing is walked through that isn't wanted."""
    source, target = Region((0, 0), (1 << 40, 1024)), Region((1 << 39, 0), (10, 1024))
    begin = (1 << 39) * 4096
    assert list(runs(source, target, 4, begin, begin + (1 << 24))) == [(begin, 0, 10 * 4096)]
    assert list(runs(source, target, 4, 0, 1 << 24)) == []


@pytest.mark.parametrize(
    ("shape", "regions"),
    [
        ((), [Region((), ())]),
        ((4,), [Region((0,), (2,)), Region((2,), (2,))]),
        ((5, 4), [Region((0, 0), (5, 1)), Region((0, 1), (2, 3)), Region((2, 1), (3, 3))]),
        ((3,), [Region((0,), (3,)), Region((3,), (0,))]),
        ((0, 3), []),
    ],
)
def test_they_make_up_the_whole(shape: tuple[int, ...], regions: list[Region]) -> None:
    assert tiles(shape, regions)


@pytest.mark.parametrize(
    ("shape", "regions"),
    [
        ((4,), [Region((0,), (2,))]),
        ((4,), [Region((0,), (2,)), Region((1,), (2,))]),
        ((4,), [Region((0,), (3,)), Region((2,), (1,))]),
        ((4,), [Region((0,), (2,)), Region((3,), (2,))]),
        ((4, 4), [Region((0,), (4,))]),
        ((2, 2), [Region((0, 0), (1, 2)), Region((0, 0), (1, 2))]),
        ((1 << 20, 1 << 20), [Region((n, n), (1, 1)) for n in range(10)]),
    ],
)
def test_they_do_not(shape: tuple[int, ...], regions: list[Region]) -> None:
    assert not tiles(shape, regions)


def test_borders_without_end_are_refused() -> None:
    """So many pieces that counting them would take memory: a hostile part."""
    count = 5000
    regions = [Region((n, n), (1, 1)) for n in range(count - 1)]
    rest = count * count - len(regions)
    assert not tiles((count, count), [*regions, Region((0, 0), (1, rest))])
    assert not tiles((rest, 2), [Region((n, 0), (1, 1)) for n in range(10)])
