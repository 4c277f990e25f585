"""Elements taken apart into streams that compress, and put together again: NumPy only, exact for every bit.

``split`` and ``join`` are inverse. Neither looks at what the elements mean but at their size: trained numbers share few
exponents, and a number's exponent lies in its last byte (little endian).
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Bytes: TypeAlias = NDArray[np.uint8]

GRAIN = 32
"""Elements of a piece are a multiple of this: parts are equal, and each stream is aligned to 8 bytes."""


class Form(IntEnum):
    """How the elements of a piece are taken apart."""

    WHOLE = 0
    """One stream: the bytes as they are."""
    PLANES = 1
    """As many streams as an element has bytes: the first byte of each element, the second of each, and so on."""
    FOLDED = 2
    """Two streams: the last byte of each element, and all other bytes in whole words, which is faster than planes."""


def stream_lengths(form: Form, item: int, length: int) -> list[int]:
    """Bytes of each stream of a piece of ``length`` bytes with elements of ``item`` bytes."""
    if form == Form.WHOLE:
        return [length]
    last = length // item
    return [last] * item if form == Form.PLANES else [length - last, last]


def split(form: Form, item: int, piece: Bytes, streams: Sequence[Bytes], scratch: Bytes) -> None:
    """Fill ``streams`` from ``piece``; ``scratch`` has at least the length of the piece."""
    if form == Form.WHOLE:
        np.copyto(streams[0], piece)
    elif form == Form.FOLDED:
        _fold(item, piece, streams[0], streams[1], scratch)
    else:
        for index, stream in enumerate(streams):
            np.copyto(stream, piece[index::item])


def join(form: Form, item: int, streams: Sequence[Bytes], piece: Bytes, scratch: Bytes) -> None:
    """Fill ``piece`` from ``streams``; ``scratch`` has at least the length of the piece."""
    if form == Form.WHOLE:
        np.copyto(piece, streams[0])
    elif form == Form.FOLDED:
        _unfold(item, streams[0], streams[1], piece, scratch)
    else:
        for index, stream in enumerate(streams):
            np.copyto(piece[index::item], stream)


def _fold(item: int, piece: Bytes, rest: Bytes, last: Bytes, scratch: Bytes) -> None:
    """Of ``item`` equal parts each element gives its last byte away, and gets a byte of the last part's for it."""
    *parts, guest = _vectors(piece, item, item)
    [lasts], [some] = _vectors(last, item, 1), _vectors(scratch[: len(last)], item, 1)
    np.bitwise_and(guest, 0xFF << 8 * (item - 1), out=lasts)
    for index, (part, word) in enumerate(zip(parts, _vectors(rest, item, item - 1), strict=True)):
        shift = 8 * (item - 1 - index)
        np.left_shift(guest, shift, out=word)
        np.bitwise_xor(word, part, out=word)
        np.right_shift(part, shift, out=some)
        if index:
            np.bitwise_and(some, 0xFF << 8 * index, out=some)
        np.bitwise_or(lasts, some, out=lasts)


def _unfold(item: int, rest: Bytes, last: Bytes, piece: Bytes, scratch: Bytes) -> None:
    *parts, guest = _vectors(piece, item, item)
    words = _vectors(rest, item, item - 1)
    [lasts], [some] = _vectors(last, item, 1), _vectors(scratch[: len(last)], item, 1)
    for index, word in enumerate(words):
        # A word's last byte is its element's, which `lasts` has in this place, xor the guest's.
        np.right_shift(word, 8 * (item - 1 - index), out=some)
        if index:
            np.bitwise_and(some, 0xFF << 8 * index, out=some)
        np.bitwise_xor(guest if index else lasts, some, out=guest)
    for index, (part, word) in enumerate(zip(parts, words, strict=True)):
        np.left_shift(guest, 8 * (item - 1 - index), out=some)
        np.bitwise_xor(some, word, out=part)


def _vectors(data: Bytes, item: int, count: int) -> list[NDArray[Any]]:
    """``data`` as words of ``item`` bytes, in ``count`` equal parts."""
    words = data.view(f"<u{item}")
    size = len(words) // count
    return [words[index * size : (index + 1) * size] for index in range(count)]
