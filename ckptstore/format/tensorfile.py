"""Data files: byte streams that, stored as they are, any safetensors reader opens.

The header is not trusted from storage: it follows from the part's tensor table, so a file is right if and
only if its bytes begin with exactly the header built here. https://huggingface.co/docs/safetensors#format
"""

from __future__ import annotations

import struct
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from json.encoder import encode_basestring_ascii
from math import prod
from typing import Final, NamedTuple

from ckptstore.errors import FormatError

BLOCK_BYTES: Final = 16777216
"""Raw bytes in each block but the last of a file."""

HEADER_LIMIT = 100_000_000
HEADER_ALIGNMENT = 4096

ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1),
}
"""Bytes in one stored element, by safetensors' name of its type."""

_MAX_DIMS = 64
_MAX_DIM = 1 << 48
_MAX_ELEMENTS = 1 << 60


class TensorRow(NamedTuple):
    """A tensor as stored: name within the file, safetensors type and shape of the stored elements."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    logical: str | None = None
    """What it is in memory, where the stored elements are something else."""

    @property
    def nbytes(self) -> int:
        """Bytes of the stored elements."""
        return stored_size(self.dtype, self.shape, self.name)


class Piece(NamedTuple):
    """Bytes ``[begin, begin + length)`` of tensor number ``row``, at ``offset`` in a block."""

    row: int
    begin: int
    length: int
    offset: int


def stored_size(dtype: str, shape: tuple[int, ...], name: str) -> int:
    """Bytes that a tensor takes; refuses one whose size could overflow anything.

    Raises:
        FormatError: unknown type, too many dimensions, or a product that no machine holds.
    """
    if dtype not in ITEM_BYTES:
        raise FormatError(f"tensor {name[:80]!r} has the unknown type {dtype[:20]!r}")
    # The product leaves zeros out: [0, 2**63] is empty and still overflows in other readers.
    if len(shape) > _MAX_DIMS or any(not 0 <= n < _MAX_DIM for n in shape):
        raise FormatError(f"tensor {name[:80]!r} has impossible dimensions")
    if prod(n for n in shape if n) >= _MAX_ELEMENTS:
        raise FormatError(f"tensor {name[:80]!r} has more elements than can be addressed")
    return prod(shape) * ITEM_BYTES[dtype]


def storage_order(rows: Iterable[TensorRow]) -> list[TensorRow]:
    """Largest elements first, then by name: no element straddles a block, and each is aligned to its size."""
    return sorted(rows, key=lambda row: (-ITEM_BYTES[row.dtype], row.name))


@dataclass(frozen=True)
class TensorFile:
    """The byte stream of one data file: ``header``, then every tensor of ``rows`` without gaps."""

    rows: Sequence[TensorRow]
    header: bytes
    begins: Sequence[int]
    """Where each tensor begins in the stream; one more entry, the length of the stream, ends it."""

    @classmethod
    def of(cls, rows: Sequence[TensorRow]) -> TensorFile:
        """Lay out ``rows``, which stand in storage order.

        Raises:
            FormatError: a bad row, a name twice, another order, or a header over 100 MB.
        """
        if len({row.name for row in rows}) != len(rows):
            raise FormatError("a tensor's name stands twice in one file")
        ends = [0, *accumulate(_sizes(rows))]
        keys = [(-ITEM_BYTES[row.dtype], row.name) for row in rows]
        if any(a > b for a, b in pairwise(keys)):
            raise FormatError("the tensors of a file are not in storage order")
        header = _header(rows, ends)
        return cls(rows, header, [len(header) + end for end in ends])

    @property
    def raw_bytes(self) -> int:
        return self.begins[-1]

    @property
    def block_lengths(self) -> list[int]:
        """Raw bytes of each block: 16 MiB, and less in the last."""
        full, rest = divmod(self.raw_bytes, BLOCK_BYTES)
        return [BLOCK_BYTES] * full + [rest] * bool(rest)

    def pieces(self, block: int) -> list[Piece]:
        """Which bytes of which tensors lie in block number ``block``, in order."""
        start = block * BLOCK_BYTES
        stop = min(start + BLOCK_BYTES, self.raw_bytes)
        found = []
        index = max(bisect_right(self.begins, start) - 1, 0)
        while index < len(self.rows) and self.begins[index] < stop:
            low, high = max(self.begins[index], start), min(self.begins[index + 1], stop)
            if high > low:
                found.append(Piece(index, low - self.begins[index], high - low, low - start))
            index += 1
        return found

    @cached_property
    def _changes(self) -> tuple[list[int], list[str]]:
        """Where in the stream elements of another type begin, and which."""
        begins, dtypes = [0], ["U8"]
        for (_, dtype, _, _), begin, end in zip(self.rows, self.begins, self.begins[1:], strict=False):
            if dtype != dtypes[-1] and end > begin:
                begins.append(begin)
                dtypes.append(dtype)
        return begins, dtypes

    def segments(self, block: int) -> list[tuple[str, int]]:
        """Types and lengths in bytes of what stands in block number ``block``, all of it; the header is ``U8``."""
        start = block * BLOCK_BYTES
        stop = min(start + BLOCK_BYTES, self.raw_bytes)
        begins, dtypes = self._changes
        first, last = bisect_right(begins, start) - 1, bisect_left(begins, stop)
        edges = [start, *begins[first + 1 : last], stop]
        return [(dtype, b - a) for dtype, (a, b) in zip(dtypes[first:last], pairwise(edges), strict=True)]

    def header_part(self, block: int) -> bytes:
        """The bytes of the header that lie in block number ``block``."""
        return self.header[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]


def _sizes(rows: Sequence[TensorRow]) -> Iterator[int]:
    # Models repeat few shapes many times: each is checked once.
    known: dict[tuple[str, tuple[int, ...]], int] = {}
    for name, dtype, shape, _ in rows:
        size = known.get((dtype, shape))
        if size is None:
            size = known[dtype, shape] = stored_size(dtype, shape, name)
        yield size


def _header(rows: Sequence[TensorRow], ends: Sequence[int]) -> bytes:
    if any(row.name == "__metadata__" for row in rows):
        raise FormatError("no tensor can be named '__metadata__'")
    entries = ['"__metadata__":{"format":"pt"}']
    for (name, dtype, shape, _), begin, end in zip(rows, ends, ends[1:], strict=False):
        dims = ",".join(map(str, shape))
        # Written by hand: json.dumps takes five times as long, which 100,000 tensors make felt.
        entries.append(
            f'{encode_basestring_ascii(name)}:{{"dtype":"{dtype}","shape":[{dims}],"data_offsets":[{begin},{end}]}}'
        )
    text = ("{" + ",".join(entries) + "}").encode("ascii")
    # Spaces up to a page, so that the data begin where direct I/O likes it.
    text += b" " * (-(len(text) + 8) % HEADER_ALIGNMENT)
    if len(text) > HEADER_LIMIT:
        raise FormatError(
            f"the header would take {len(text)} bytes, safetensors allows {HEADER_LIMIT}: too many tensors"
        )
    return struct.pack("<Q", len(text)) + text
