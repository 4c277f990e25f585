"""The tensors of two checkpoints beside each other: what differs is read, in chunks, and measured."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch

from ckptstore.engine.tensorreader import Place, TensorReader
from ckptstore.engine.workers import Meter, Progress, default_threads, run
from ckptstore.format.tensorfile import BLOCK_BYTES, TensorRow
from ckptstore.tools.elements import Elements, elements, serial_parts

Kind: TypeAlias = Literal["removed", "added", "reshaped", "cast", "changed"]
KINDS: tuple[Kind, ...] = ("removed", "added", "reshaped", "cast", "changed")
"""By what matters most."""

_CHUNK, _CHUNK_BYTES = 1 << 17, 1 << 20
"""Elements, and bytes, that are compared at a time, in what a core keeps near itself."""
_Bytes: TypeAlias = "np.ndarray[Any, np.dtype[np.uint8]]"


class Form(NamedTuple):
    """Element type and shape, as ``show`` names them."""

    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


@dataclass(frozen=True)
class TensorChange:
    """What became of one tensor.

    Attributes:
        name: in the state.
        kind: "removed", "added", "reshaped", "cast" (another element type) or "changed".
        before, after: type and shape on both sides, None where it isn't there.
        elements: how many there are; the numbers that follow are None where there is nothing to compare.
        changed: elements that differ, bit by bit: -0.0 is not 0.0. Where the type differs, as numbers.
        norm, norm_change: of what was before, and of the difference, over all elements that are finite on both sides.
        largest: the largest absolute change of one of them.
        nonfinite: elements that are nan or infinite, before and after.
    """

    name: str
    kind: Kind
    before: Form | None
    after: Form | None
    elements: int
    changed: int | None = None
    norm: float | None = None
    norm_change: float | None = None
    largest: float | None = None
    nonfinite: tuple[int, int] | None = None

    @property
    def relative(self) -> float | None:
        """The norm of the difference by that of what was before; infinite where that was zero."""
        if self.norm is None or self.norm_change is None:
            return None
        return self.norm_change / self.norm if self.norm else math.inf if self.norm_change else 0.0

    @property
    def share(self) -> float | None:
        """Of the elements that differ."""
        return None if self.changed is None else self.changed / self.elements if self.elements else 0.0


class _Piece(NamedTuple):
    """Elements ``[begin, begin + length)`` of a tensor; ``same`` where their blocks have the same digests."""

    name: str
    begin: int
    length: int
    same: bool


class _Sums(NamedTuple):
    changed: int = 0
    squares: float = 0.0
    squares_change: float = 0.0
    largest: float = 0.0
    before: int = 0
    after: int = 0


class _Pair(NamedTuple):
    """A tensor on both sides."""

    before: Elements
    after: Elements
    alike: bool
    """Of the same type."""


class _Wide(NamedTuple):
    """Room for the numbers of a chunk in fp64, and for their change; both also in parts."""

    own: torch.Tensor
    change: torch.Tensor
    owns: list[torch.Tensor]
    changes: list[torch.Tensor]

    @classmethod
    def of(cls, count: int) -> _Wide:
        own, change = (torch.empty(count, dtype=torch.float64, device="cpu") for _ in "ab")
        return cls(own, change, serial_parts(own), serial_parts(change))


class Comparison:
    """Compares the tensors ``names`` of two checkpoints.

    Args:
        before, after: readers of the two, which share a cache.
        names: of those that are wanted, on either side.

    Attributes:
        numbers: both values of each tensor of one element that was compared.
    """

    def __init__(self, before: TensorReader, after: TensorReader, names: Sequence[str]) -> None:
        self._before, self._after, self._names = before, after, names
        self.numbers: dict[str, tuple[float, float]] = {}
        self._pairs: dict[str, _Pair] = {}
        self._found: dict[str, list[_Sums]] = {}
        self._local = threading.local()

    def run(self, progress: Progress | None) -> list[TensorChange]:
        """All that differs, in the order of the names.

        Raises:
            IntegrityError: a block that has to be read is damaged.
        """
        structure = {name: change for name in self._names if (change := self._structure(name)) is not None}
        pieces = [piece for name in self._pairs for piece in self._pieces(name)]
        differing = {piece.name for piece in pieces if not piece.same}
        self._found = {name: [] for name in differing}
        tasks = [task for task in self._tasks([p for p in pieces if p.name in differing]) if task]
        meter = Meter(sum(self._bytes(piece) for task in tasks for piece in task), progress)

        def work(task: list[_Piece]) -> None:
            for piece in task:
                self._found[piece.name].append(self._measured(piece))
                meter.add(self._bytes(piece))

        run(tasks, work, threads=default_threads())
        found = structure | {name: change for name in differing if (change := self._change(name)) is not None}
        return [found[name] for name in self._names if name in found]

    def _structure(self, name: str) -> TensorChange | None:
        """What differs before a byte is read; otherwise it is to be compared."""
        rows = self._before.tensors.get(name), self._after.tensors.get(name)
        before, after = (None if row is None else elements(row) for row in rows)
        old, new = (
            None if row is None or it is None else _form(row, it) for row, it in zip(rows, (before, after), strict=True)
        )
        if before is None or after is None or old is None or new is None:
            one = before or after
            return TensorChange(name, "added" if before is None else "removed", old, new, one.total if one else 0)
        if before.shape != after.shape:
            return TensorChange(name, "reshaped", old, new, before.total)
        alike = old.dtype == new.dtype
        comparable = before.parts is not None and after.parts is not None and before.pairs == after.pairs
        if not alike and not (comparable and before.total):
            return TensorChange(name, "cast", old, new, before.total)
        self._pairs[name] = _Pair(before, after, alike)
        return None

    # -- what is read ------------------------------------------------------------------------------------

    def _pieces(self, name: str) -> Iterator[_Piece]:
        """A tensor, cut where a block ends; of shards, where one would end if it weren't one."""
        pair = self._pairs[name]
        before, after = self._before.places(name), self._after.places(name)
        size, total = pair.before.size, pair.before.total
        start = before[0].file.stream.begins[before[0].row] % BLOCK_BYTES if len(before) == 1 else 0
        alone = pair.alike and self._before.contents.digest == self._after.contents.digest
        whole = alone and len(before) > 1 and _same_shards(before, after)
        begin = 0
        while begin < total:
            # Whole elements: those of two words may lie in two blocks.
            edge = (start + begin * size) // BLOCK_BYTES * BLOCK_BYTES + BLOCK_BYTES - start
            end = min(total, max(edge // size, begin + 1))
            same = whole
            if alone and len(before) == len(after) == 1:
                same = _same_bytes(before[0], after[0], begin * size, end * size)
            yield _Piece(name, begin, end - begin, same)
            begin = end

    def _tasks(self, pieces: Sequence[_Piece]) -> Iterator[list[_Piece]]:
        """Those in one block together, in the order in which the first checkpoint stores them."""

        def place(piece: _Piece) -> tuple[str, int, int]:
            first = self._before.places(piece.name)[0]
            at = first.file.stream.begins[first.row] + piece.begin * self._pairs[piece.name].before.size
            return first.file.key, at // BLOCK_BYTES, at

        for _, group in groupby(sorted(pieces, key=place), key=lambda piece: place(piece)[:2]):
            yield list(group)

    def _bytes(self, piece: _Piece) -> int:
        pair = self._pairs[piece.name]
        return piece.length * (pair.before.size + (0 if piece.same else pair.after.size))

    # -- what is measured --------------------------------------------------------------------------------

    def _measured(self, piece: _Piece) -> _Sums:
        pair = self._pairs[piece.name]
        step = max(1, min(_CHUNK, _CHUNK_BYTES // max(pair.before.size, pair.after.size)))
        total = _Sums()
        for begin in range(piece.begin, piece.begin + piece.length, step):
            count = min(step, piece.begin + piece.length - begin)
            total = _added(total, self._compared(piece, pair, begin, count))
        return total

    def _compared(self, piece: _Piece, pair: _Pair, begin: int, count: int) -> _Sums:
        size = pair.before.size
        after = None if piece.same else self._read(self._after, piece.name, begin, count, pair.after.size, 1)
        with closing(self._before.views(piece.name, begin * size, count * size)) as views:
            _, view = next(views)
            if len(view) == count * size:
                # Where it lies, which saves a copy; one that lies in several places is put together.
                before = np.frombuffer(view, np.uint8)
                return self._sums(piece.name, pair, before, before if after is None else after)
        before = self._read(self._before, piece.name, begin, count, size, 0)
        return self._sums(piece.name, pair, before, before if after is None else after)

    def _read(self, reader: TensorReader, name: str, begin: int, count: int, size: int, side: int) -> _Bytes:
        rooms: list[bytearray] = self._kept("rooms", lambda: [bytearray(), bytearray()])
        if len(rooms[side]) < count * size:
            rooms[side] = bytearray(max(count * size, _CHUNK_BYTES))
        view = memoryview(rooms[side])[: count * size]
        reader.read_into(name, begin * size, view)
        return np.frombuffer(view, np.uint8)

    def _sums(self, name: str, pair: _Pair, before: _Bytes, after: _Bytes) -> _Sums:
        changed = 0
        if pair.alike and before is not after:
            changed = _count_differing(before, after, pair.before.size)
        if pair.before.parts is None or pair.after.parts is None:
            return _Sums(changed)
        one = torch.from_numpy(before).view(pair.before.parts)
        other = one if pair.alike and not changed else torch.from_numpy(after).view(pair.after.parts)
        if len(one) == 1 == pair.before.total:
            self.numbers[name] = float(one), float(other)
        found = self._numbers(pair, one, None if other is one else other)
        return found._replace(changed=changed) if pair.alike else found

    def _numbers(self, pair: _Pair, before: torch.Tensor, after: torch.Tensor | None) -> _Sums:
        """``after`` None: the same as before."""
        kept: dict[int, _Wide] = self._kept("wide", dict)
        wide = kept.get(len(before)) or _Wide.of(len(before))
        if len(before) in (_CHUNK, 2 * _CHUNK):
            # What most chunks of large tensors are.
            kept[len(before)] = wide
        own, change, owns, changes = wide
        # One call for many small pieces, during which other threads run.
        torch._foreach_copy_(owns, serial_parts(before))
        squares = _squares(owns)
        if after is None:
            return _Sums(squares=squares) if math.isfinite(squares) else _masked(own, own, pair.before.pairs)
        torch._foreach_copy_(changes, serial_parts(after))
        changed = 0 if pair.alike else _count_unlike(own, change, pair.before.pairs)
        torch._foreach_sub_(changes, owns)
        squares_change = _squares(changes)
        if not math.isfinite(squares + squares_change):
            change.copy_(after)
            return _masked(own, change, pair.before.pairs)._replace(changed=changed)
        return _Sums(changed, squares, squares_change, _largest(change, pair.before.pairs))

    def _kept(self, name: str, make: Any) -> Any:
        """Room that each thread uses again."""
        if not hasattr(self._local, name):
            setattr(self._local, name, make())
        return getattr(self._local, name)

    def _change(self, name: str) -> TensorChange | None:
        pair, sums = self._pairs[name], self._found[name]
        changed = sum(it.changed for it in sums)
        if pair.alike and not changed:
            return None
        found = TensorChange(
            name,
            "changed" if pair.alike else "cast",
            _form(self._before.tensors[name], pair.before),
            _form(self._after.tensors[name], pair.after),
            pair.before.total,
            changed,
        )
        if pair.before.parts is None or pair.after.parts is None:
            return found
        return replace(
            found,
            # Of the exact sum, so that the order in which threads were done doesn't count.
            norm=math.sqrt(math.fsum(it.squares for it in sums)),
            norm_change=math.sqrt(math.fsum(it.squares_change for it in sums)),
            largest=max(it.largest for it in sums),
            nonfinite=(sum(it.before for it in sums), sum(it.after for it in sums)),
        )


def _form(row: TensorRow, it: Elements) -> Form:
    return Form(row.logical or row.dtype, it.shape)


def _added(a: _Sums, b: _Sums) -> _Sums:
    return _Sums(
        a.changed + b.changed,
        a.squares + b.squares,
        a.squares_change + b.squares_change,
        max(a.largest, b.largest),
        a.before + b.before,
        a.after + b.after,
    )


def _count_differing(before: _Bytes, after: _Bytes, size: int) -> int:
    if size in (1, 2, 4, 8):
        word = np.dtype(f"u{size}")
        return int(np.count_nonzero(before.view(word) != after.view(word)))
    return int((before.reshape(-1, size) != after.reshape(-1, size)).any(axis=1).sum())


def _count_unlike(before: torch.Tensor, after: torch.Tensor, pairs: bool) -> int:
    """Numbers of different types that aren't the same; nan is the same as nan."""
    unlike = before.ne(after) & ~(before.isnan() & after.isnan())
    return int(torch.count_nonzero(unlike.view(-1, 2).any(1) if pairs else unlike))


def _squares(parts: list[torch.Tensor]) -> float:
    return sum(float(norm) ** 2 for norm in torch._foreach_norm(parts))


def _largest(change: torch.Tensor, pairs: bool) -> float:
    if pairs:
        return float(torch.view_as_complex(change.view(-1, 2)).abs().max())
    # NumPy has no threads of its own.
    numbers = change.numpy()
    return max(-float(numbers.min()), float(numbers.max()))


def _masked(before: torch.Tensor, after: torch.Tensor, pairs: bool) -> _Sums:
    """The sums where something is nan, infinite, or so large that its square is."""
    finite = [it.isfinite().view(-1, 2).all(1) if pairs else it.isfinite() for it in (before, after)]
    both = finite[0] & finite[1]
    mask = both.repeat_interleave(2) if pairs else both
    own, change = before[mask], (after - before)[mask]
    squares, squares_change = _squares([own]), _squares([change])
    bad = [len(it) - int(torch.count_nonzero(it)) for it in finite]
    return _Sums(0, squares, squares_change, _largest(change, pairs) if len(change) else 0.0, *bad)


# -- what needn't be read --------------------------------------------------------------------------------


def _same_bytes(before: Place, after: Place, begin: int, end: int) -> bool:
    """Whether the blocks that hold these bytes of two stored tensors are the same."""
    one, other = (place.file.stream.begins[place.row] for place in (before, after))
    if (one - other) % BLOCK_BYTES:
        return False
    first, last = (one + begin) // BLOCK_BYTES, (one + end - 1) // BLOCK_BYTES
    shift = (other - one) // BLOCK_BYTES
    return all(
        before.file.entry.blocks[number].digest == after.file.entry.blocks[number + shift].digest
        for number in range(first, last + 1)
    )


def _same_shards(before: Sequence[Place], after: Sequence[Place]) -> bool:
    """Whether two tensors lie in the same shards, in the same blocks."""
    if [place.region for place in before] != [place.region for place in after]:
        return False
    return all(
        _same_bytes(one, other, 0, one.file.stream.rows[one.row].nbytes)
        for one, other in zip(before, after, strict=True)
        if one.file.stream.rows[one.row].nbytes
    )
