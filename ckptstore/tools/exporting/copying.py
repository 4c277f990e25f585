"""Stored tensors into files, piece by piece, several at a time: each block is read once, wherever its bytes go."""

from __future__ import annotations

import os
import threading
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ckptstore.engine.tensorreader import TensorReader
from ckptstore.engine.workers import Meter, Progress, default_threads, run
from ckptstore.format.tensorfile import ITEM_BYTES, TensorRow
from ckptstore.state.dtypes import torch_name
from ckptstore.storage.posix import os_errors, pwrite_all
from ckptstore.tools.elements import element_type
from ckptstore.tools.exporting.notes import Notes

PIECE_BYTES = 8 << 20

CASTS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
"""What ``dtype=`` may say."""

_FLOATS = frozenset(CASTS.values())


class Span(NamedTuple):
    """A place in a file for a tensor's elements.

    Attributes:
        name: of the tensor in the checkpoint.
        file: which exists, and is long enough.
        offset: in bytes.
        cast: the type to convert to; None: as stored.
    """

    name: str
    file: Path
    offset: int
    cast: torch.dtype | None


class Sum(NamedTuple):
    """The CRC-32 of some bytes that were written."""

    begin: int
    length: int
    crc: int


class Part(NamedTuple):
    """Rows ``[row, row + rows)`` of a stored tensor; one without dimensions is a row."""

    name: str
    row: int
    rows: int


class Piece(NamedTuple):
    """Bytes ``[begin, begin + length)`` of a stored tensor."""

    name: str
    begin: int
    length: int


def cast_of(row: TensorRow, wanted: torch.dtype | None) -> torch.dtype | None:
    """The type to convert a tensor to; None where it stays: integers, truth values, complex and 8-bit numbers do."""
    if wanted is None or row.logical is not None:
        return None
    own = element_type(row)
    return wanted if own in _FLOATS and own != wanted else None


def cast_bytes(row: TensorRow, cast: torch.dtype | None) -> int:
    """Bytes of a tensor, converted."""
    return row.nbytes if cast is None else row.nbytes // ITEM_BYTES[row.dtype] * cast.itemsize


def parts(reader: TensorReader, names: Collection[str]) -> Iterator[Part]:
    """All of some tensors, in the order in which they lie on storage, so that each block is needed once."""
    scattered = _scattered(reader)
    done: set[str] = set()
    for file in reader.contents.files:
        for index, row in enumerate(file.stream.rows):
            name = file.name(index)
            if name not in names or name in done:
                continue
            if name in scattered:
                done.add(name)
                yield Part(name, 0, _rows(reader.tensors[name].shape))
            else:
                offset = file.region(index).offset
                yield Part(name, offset[0] if offset else 0, _rows(row.shape))


def _rows(shape: tuple[int, ...]) -> int:
    return shape[0] if shape else 1


def pieces(reader: TensorReader, names: Collection[str]) -> Iterator[Piece]:
    """The bytes of some tensors in the same order, a few at a time."""
    for part in parts(reader, names):
        whole = reader.tensors[part.name]
        row_bytes = whole.nbytes // max(1, _rows(whole.shape))
        begin, end = part.row * row_bytes, (part.row + part.rows) * row_bytes
        for at in range(begin, end, PIECE_BYTES):
            yield Piece(part.name, at, min(PIECE_BYTES, end - at))


def _scattered(reader: TensorReader) -> set[str]:
    """Tensors whose shards are more than some rows of them, so that each is in many places of the whole."""
    return {
        file.name(index)
        for file in reader.contents.files
        if file.entry.tensors.shards
        for index, row in enumerate(file.stream.rows)
        if row.shape[1:] != reader.tensors[file.name(index)].shape[1:]
    }


def copy_tensors(
    reader: TensorReader, spans: Sequence[Span], notes: Notes, progress: Progress | None, *, sums: bool = False
) -> Mapping[Span, list[Sum]]:
    """Fill all spans.

    Args:
        reader: of the checkpoint.
        spans: which don't overlap.
        notes: told of numbers that became infinite.
        progress: called with bytes read and all.
        sums: sum up what is written, too.

    Raises:
        IntegrityError: a block is damaged.
        StorageError: the storage failed, or the disk.
    """
    return _Copy(reader, spans, notes, progress, sums).run()


class _Copy:
    def __init__(
        self, reader: TensorReader, spans: Sequence[Span], notes: Notes, progress: Progress | None, sums: bool
    ) -> None:
        self._reader, self._notes, self._with_sums = reader, notes, sums
        self._spans: dict[str, list[Span]] = {}
        for span in spans:
            self._spans.setdefault(span.name, []).append(span)
        self._meter = Meter(sum(reader.tensors[name].nbytes for name in self._spans), progress)
        self._lock = threading.Lock()
        self._sums: dict[Span, list[Sum]] = {span: [] for span in spans}

    def run(self) -> Mapping[Span, list[Sum]]:
        run(pieces(self._reader, self._spans), self._copy, threads=default_threads())
        return self._sums

    def _copy(self, piece: Piece) -> None:
        image = np.empty(piece.length, np.uint8)
        self._reader.read_into(piece.name, piece.begin, image.data)
        row = self._reader.tensors[piece.name]
        for span in self._spans[piece.name]:
            begin, data = piece.begin, image
            if span.cast is not None:
                begin = begin // ITEM_BYTES[row.dtype] * span.cast.itemsize
                data = self._cast(image, row, span)
            self._put(span, begin, data.data)
        self._meter.add(piece.length)

    def _cast(self, image: np.ndarray, row: TensorRow, span: Span) -> np.ndarray:
        assert span.cast is not None
        made = converted(torch.from_numpy(image).view(element_type(row)), span.cast, span.name, self._notes)
        return made.view(torch.uint8).numpy()

    def _put(self, span: Span, begin: int, data: memoryview) -> None:
        with os_errors("write", str(span.file), str(span.file)):
            # Opened for each piece: an export of a thousand shards would need as many open files.
            descriptor = os.open(span.file, os.O_WRONLY | os.O_CLOEXEC)
            try:
                pwrite_all(descriptor, data, span.offset + begin)
            finally:
                os.close(descriptor)
        if self._with_sums:
            found = Sum(begin, len(data), zlib.crc32(data))
            with self._lock:
                self._sums[span].append(found)


def converted(elements: torch.Tensor, wanted: torch.dtype, name: str, notes: Notes) -> torch.Tensor:
    """Elements in another type, rounded to nearest; ``notes`` is told where finite numbers have become infinite."""
    made = elements.to(wanted)
    finite = torch.isfinite(made)
    if not finite.all() and (torch.isfinite(elements) & ~finite).any():
        notes.overflowed.setdefault(name, torch_name(wanted))
    return made
