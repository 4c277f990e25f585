"""Data files: byte streams that, stored as they are, any safetensors reader opens.

The header is not trusted from storage: it follows from the part's tensor table, so a file is right if and
only if its bytes begin with exactly the header built here. https://huggingface.co/docs/safetensors#format
"""

from __future__ import annotations

import json
import struct
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
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
    """A tensor as stored: name within the file, safetensors type, shape of the stored elements."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * ITEM_BYTES[self.dtype]


class Piece(NamedTuple):
    """Bytes ``[begin, begin + length)`` of tensor number ``row``, at ``offset`` in a block."""

    row: int
    begin: int
    length: int
    offset: int


def check_row(row: TensorRow) -> None:
    """Refuse a row whose size could overflow anything.

    Raises:
        FormatError: unknown type, too many dimensions, or a product that no machine holds.
    """
    if row.dtype not in ITEM_BYTES:
        raise FormatError(f"tensor {row.name[:80]!r} has the unknown type {row.dtype[:20]!r}")
    # The product leaves zeros out: [0, 2**63] is empty and still overflows in other readers.
    if len(row.shape) > _MAX_DIMS or any(not 0 <= n < _MAX_DIM for n in row.shape):
        raise FormatError(f"tensor {row.name[:80]!r} has impossible dimensions")
    if prod(n for n in row.shape if n) >= _MAX_ELEMENTS:
        raise FormatError(f"tensor {row.name[:80]!r} has more elements than can be addressed")


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
        for row in rows:
            check_row(row)
        if len({row.name for row in rows}) != len(rows):
            raise FormatError("a tensor's name stands twice in one file")
        keys = [(-ITEM_BYTES[row.dtype], row.name) for row in rows]
        if any(a > b for a, b in pairwise(keys)):
            raise FormatError("the tensors of a file are not in storage order")
        ends = list(accumulate((row.nbytes for row in rows), initial=0))
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

    def header_part(self, block: int) -> bytes:
        """The bytes of the header that lie in block number ``block``."""
        return self.header[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]


def _header(rows: Sequence[TensorRow], ends: Sequence[int]) -> bytes:
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for row, begin, end in zip(rows, ends, ends[1:], strict=False):
        table[row.name] = {"dtype": row.dtype, "shape": row.shape, "data_offsets": (begin, end)}
    if len(table) != len(rows) + 1:
        raise FormatError("no tensor can be named '__metadata__'")
    text = json.dumps(table, separators=(",", ":")).encode()
    # Spaces up to a page, so that the data begin where direct I/O likes it.
    text += b" " * (-(len(text) + 8) % HEADER_ALIGNMENT)
    if len(text) > HEADER_LIMIT:
        raise FormatError(
            f"the header would take {len(text)} bytes, safetensors allows {HEADER_LIMIT}: too many tensors"
        )
    return struct.pack("<Q", len(text)) + text
