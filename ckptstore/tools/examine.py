"""The numbers in a tensor of a checkpoint: their range, mean, spread and distribution. Only its blocks are read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ckptstore.engine.tensorreader import BlockCache, TensorReader
from ckptstore.engine.workers import Meter, Progress
from ckptstore.errors import NotFoundError
from ckptstore.format.tensorfile import BLOCK_BYTES
from ckptstore.near import near
from ckptstore.state.dtypes import numpy_dtype
from ckptstore.store import Store
from ckptstore.tools.elements import Elements, elements
from ckptstore.tools.outline import wanted

BINS = 20
PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
_FINE = 400
"""For each of ``BINS``: percentiles come from these."""
_FIRST = 8
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Home:
    """Where a tensor's bytes are: blocks ``[first, last]`` of a data file."""

    key: str
    first: int
    last: int
    codecs: Sequence[str]


@dataclass(frozen=True)
class TensorStats:
    """What is in a tensor. Of complex numbers the absolute values are described; None where nothing can be said.

    Attributes:
        name, dtype, shape, nbytes: the tensor.
        homes: where it is.
        elements: how many there are.
        nan, inf: of them, and infinite ones.
        zeros: of both signs.
        min, max, mean, std, norm: of the finite ones; ``std`` is that of all there are, not of a sample.
        percentiles: by percent, from the fine histogram: right to 1/8000 of the range.
        edges, counts: a histogram of the finite ones: ``counts[i]`` lie between ``edges[i]`` and ``edges[i + 1]``.
        first: the first values.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    homes: Sequence[Home]
    elements: int
    first: Sequence[Any]
    nan: int | None = None
    inf: int | None = None
    zeros: int | None = None
    min: float | None = None
    max: float | None = None
    mean: float | None = None
    std: float | None = None
    norm: float | None = None
    percentiles: dict[int, float] | None = None
    edges: Sequence[float] = ()
    counts: Sequence[int] = ()


def examine(store: Store, selector: str, name: str, *, progress: Progress | None = None) -> TensorStats:
    """The numbers in one tensor.

    It is read in two passes, the second for the histogram; one that fits into 256 MiB from storage only once.

    Args:
        store: where the checkpoint is.
        selector: which one.
        name: of the tensor, as ``model/layers.0.weight``.
        progress: called with (bytes done, bytes in all).

    Raises:
        NotFoundError: no such checkpoint, or no such tensor: it names those that are called nearly so.
        IntegrityError: a block of it is damaged.
    """
    with store.reader(selector, cache=BlockCache()) as reader:
        if name not in reader.tensors:
            raise unknown(reader, name)
        return next(described(reader, [name], progress))


def examine_all(
    store: Store, selector: str, patterns: Sequence[str], *, progress: Progress | None = None
) -> list[TensorStats]:
    """The numbers in all tensors that one of ``patterns`` matches, in the order in which they are stored.

    Raises:
        NotFoundError: as ``examine``; a pattern matches nothing.
        IntegrityError: as ``examine``.
    """
    with store.reader(selector, cache=BlockCache()) as reader:
        for pattern in patterns:
            if pattern not in reader.tensors and not any(wanted(name, [pattern]) for name in reader.tensors):
                raise unknown(reader, pattern)
        names = [name for name in reader.tensors if name in patterns or wanted(name, patterns)]
        return list(described(reader, names, progress))


def unknown(reader: TensorReader, name: str) -> NotFoundError:
    """There is no such tensor, but perhaps another was meant."""
    id, names = reader.contents.commit.id, list(reader.tensors)
    tails = {tail: full for full in names for tail in (full, full.partition("/")[2], full.rpartition("/")[2])}
    likely = list(dict.fromkeys(tails[tail] for tail in near(name, tails)))
    known = f"; it has {', '.join(names[:5])}{', …' * (len(names) > 5)}"
    hint = f"; did you mean {' or '.join(likely)}?" if likely else known
    return NotFoundError(f"{id} has no tensor {name!r:.200}{hint}", id=id)


def described(reader: TensorReader, names: Sequence[str], progress: Progress | None) -> Iterator[TensorStats]:
    """One after the other."""
    meter = Meter(2 * sum(reader.tensors[name].nbytes for name in names), progress)
    for name in names:
        yield _Look(reader, name, meter).stats()


class _Look:
    """At one tensor."""

    def __init__(self, reader: TensorReader, name: str, meter: Meter) -> None:
        self._reader, self._name, self._meter = reader, name, meter
        self._row = reader.tensors[name]
        self._it = elements(self._row)

    def stats(self) -> TensorStats:
        it, row = self._it, self._row
        found = TensorStats(
            name=self._name,
            dtype=row.logical or row.dtype,
            shape=it.shape,
            nbytes=row.nbytes,
            homes=[_home(place) for place in self._reader.places(self._name)],
            elements=it.total,
            first=_first(self._reader, self._name, it),
        )
        if it.parts is None:
            self._meter.add(2 * row.nbytes)
            return found
        moments = _Moments()
        for values in self._values():
            moments.add(values)
        fields: dict[str, Any] = {**vars(found), "nan": moments.nan, "inf": moments.inf, "zeros": moments.zeros}
        if not moments.count:
            self._meter.add(row.nbytes)
            return TensorStats(**fields)
        whole = not (it.pairs or it.parts.is_floating_point)
        low, high = moments.low, moments.high
        counts, edges = self._histogram(low, high)
        return TensorStats(
            **fields
            | {
                "min": int(low) if whole else low,
                "max": int(high) if whole else high,
                "mean": moments.mean,
                "std": math.sqrt(moments.spread / moments.count),
                "norm": math.sqrt(moments.squares),
                "percentiles": {p: _percentile(counts, edges, low, high, p) for p in PERCENTILES},
                "counts": [int(part.sum()) for part in np.split(counts, BINS)],
                "edges": [float(edge) for edge in edges[::_FINE]],
            }
        )

    def _values(self) -> Iterator[np.ndarray[Any, Any]]:
        """The elements as numbers that NumPy computes with, in the order in which they are stored."""
        it, step = self._it, max(1, _CHUNK_BYTES // self._it.size) * self._it.size
        assert it.parts is not None
        room = bytearray(min(step, self._row.nbytes))
        for begin in range(0, self._row.nbytes, step):
            view = memoryview(room)[: min(step, self._row.nbytes - begin)]
            self._reader.read_into(self._name, begin, view)
            self._meter.add(len(view))
            part = torch.frombuffer(view, dtype=it.parts)
            if it.pairs:
                yield torch.view_as_complex(part.double().view(-1, 2)).abs().numpy()
            elif part.dtype in (torch.float64, torch.int64, torch.uint64):
                yield part.numpy()
            else:
                yield part.to(torch.float64).numpy()

    def _histogram(self, low: float, high: float) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        bins = BINS * _FINE
        start, end = float(low), float(high)
        # What has no width, or more than there are numbers for, is put into a range that has.
        if not math.isfinite(end - start):
            start, end = start / 4, end / 4
        scale = 0.25 if (start, end) != (float(low), float(high)) else 1.0
        if start == end:
            start, end = start - 0.5 * max(1.0, abs(start)), end + 0.5 * max(1.0, abs(end))
        counts = np.zeros(bins, np.int64)
        for values in self._values():
            finite = values[np.isfinite(values)]
            places = ((finite.astype(np.float64) * scale - start) / (end - start) * bins).astype(np.int64)
            counts += np.bincount(np.clip(places, 0, bins - 1), minlength=bins)
        return counts, np.linspace(start, end, bins + 1) / scale


class _Moments:
    """Of the finite ones: their number, range, mean, and the sums of squares about the mean and about zero."""

    def __init__(self) -> None:
        self.count = self.nan = self.inf = self.zeros = 0
        self.low: Any = math.inf
        self.high: Any = -math.inf
        self.mean = self.spread = self.squares = 0.0

    def add(self, values: np.ndarray[Any, Any]) -> None:
        """A chunk more."""
        self.zeros += len(values) - int(np.count_nonzero(values))
        if values.dtype.kind == "f":
            finite = np.isfinite(values)
            if not finite.all():
                nan = int(np.count_nonzero(np.isnan(values)))
                self.nan += nan
                self.inf += len(values) - int(np.count_nonzero(finite)) - nan
                values = values[finite]
        if not len(values):
            return
        self.low, self.high = min(self.low, values.min().item()), max(self.high, values.max().item())
        # Of numbers so large that their squares are none, the spread is infinite.
        with np.errstate(over="ignore", invalid="ignore"):
            self._add(values.astype(np.float64, copy=False))

    def _add(self, wide: np.ndarray[Any, Any]) -> None:
        count, mean = len(wide), float(wide.mean())
        away = wide - mean
        # Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979).
        total, step = self.count + count, mean - self.mean
        self.spread += _square(away) + step * step * self.count * count / total
        self.mean += step * count / total
        self.squares += _square(wide)
        self.count = total


def _square(numbers: np.ndarray[Any, Any]) -> float:
    # Not BLAS's product, which has threads of its own.
    return float(np.einsum("i,i->", numbers, numbers))


def _percentile(
    counts: np.ndarray[Any, Any], edges: np.ndarray[Any, Any], low: float, high: float, percent: int
) -> float:
    sums = np.cumsum(counts)
    rank = percent / 100 * int(sums[-1])
    place = int(np.searchsorted(sums, rank))
    before = int(sums[place - 1]) if place else 0
    share = (rank - before) / int(counts[place])
    value = float(edges[place] + share * (edges[place + 1] - edges[place]))
    return min(max(value, float(low)), float(high))


def _first(reader: TensorReader, name: str, it: Elements) -> list[Any]:
    """The first values, as Python's numbers, or as text where it has none."""
    count, row = min(it.total, _FIRST), reader.tensors[name]
    image = bytearray(count * it.size)
    reader.read_into(name, 0, memoryview(image))
    if not image:
        return []
    if it.parts is not None:
        values = torch.frombuffer(image, dtype=it.parts)
        wide = values if not values.dtype.is_floating_point else values.double()
        return [complex(a, b) for a, b in wide.view(-1, 2).tolist()] if it.pairs else list(wide.tolist())
    if row.logical is not None and row.logical.startswith("numpy:"):
        return [str(value) for value in np.frombuffer(image, numpy_dtype(row.logical[6:]))]
    return [f"0x{image[at : at + it.size].hex()}" for at in range(0, len(image), it.size)]


def _home(place: Any) -> Home:
    begin = place.file.stream.begins[place.row]
    end = max(begin + place.file.stream.rows[place.row].nbytes - 1, begin)
    first, last = begin // BLOCK_BYTES, end // BLOCK_BYTES
    blocks = place.file.entry.blocks[first : last + 1]
    return Home(place.file.key, first, last, sorted({block.codec for block in blocks}))
