"""CRC-32 of bytes that were summed up in pieces, in any order."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import TypeAlias

from ckptstore.tools.exporting.copying import Sum

_POLYNOMIAL = 0xEDB88320

_Matrix: TypeAlias = tuple[int, ...]
"""A linear map of 32 bits: what each bit becomes."""


def combined(sums: Iterable[Sum]) -> int:
    """The CRC-32 of all pieces together, which touch one another."""
    total = 0
    for each in sorted(sums):
        # A CRC is linear: that of "a then b" is that of a, carried over as many zero bytes as b has, plus that of b.
        total = _times(_zeros(each.length), total) ^ each.crc
    return total


@lru_cache(maxsize=64)
def _zeros(count: int) -> _Matrix:
    """What ``count`` zero bytes do to a CRC."""
    result: _Matrix = tuple(1 << bit for bit in range(32))
    power = _one_zero_byte()
    while count:
        if count & 1:
            result = _product(power, result)
        power = _product(power, power)
        count >>= 1
    return result


@lru_cache(maxsize=1)
def _one_zero_byte() -> _Matrix:
    def after(crc: int) -> int:
        for _ in range(8):
            crc = crc >> 1 ^ (_POLYNOMIAL if crc & 1 else 0)
        return crc

    return tuple(after(1 << bit) for bit in range(32))


def _product(left: _Matrix, right: _Matrix) -> _Matrix:
    return tuple(_times(left, column) for column in right)


def _times(matrix: _Matrix, bits: int) -> int:
    found = 0
    for column in matrix:
        if not bits:
            break
        if bits & 1:
            found ^= column
        bits >>= 1
    return found
