"""Elements taken apart into streams that compress, and put together again: NumPy only, exact for every bit.

``split`` and ``join`` are inverse. Neither looks at what the elements mean but at their size: trained numbers share few
exponents, and a number's exponent lies in its last byte (little endian).
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Bytes: TypeAlias = NDArray[np.uint8]

GRAIN = 32
"""Elements of a piece are a multiple of this, so that each stream of it is aligned to 8 bytes."""


class Form(IntEnum):
    """How the elements of a piece are taken apart."""

    WHOLE = 0
    """One stream: the bytes as they are."""
    PLANES = 1
    """As many streams as an element has bytes: the first byte of each element, the second of each, and so on."""
    QUARTERS = 2
    """Of elements of 4 bytes: their last bytes, and in whole words all else. Faster than four planes."""


def stream_lengths(form: Form, item: int, length: int) -> list[int]:
    """Bytes of each stream of a piece of ``length`` bytes with elements of ``item`` bytes."""
    if form == Form.WHOLE:
        return [length]
    if form == Form.PLANES:
        return [length // item] * item
    return [length // 4 * 3, length // 4]


def split(form: Form, item: int, piece: Bytes, streams: Sequence[Bytes], scratch: Bytes) -> None:
    """Fill ``streams`` from ``piece``; ``scratch`` has at least the length of the piece."""
    if form == Form.WHOLE:
        np.copyto(streams[0], piece)
    elif form == Form.QUARTERS:
        _split_quarters(piece, streams[0], streams[1], scratch)
    elif item == 2:
        # Two casts and a shift are vector code, a strided copy of bytes is not.
        words, shifted = piece.view("<u2"), scratch[: len(piece)].view("<u2")
        np.copyto(streams[0], words, casting="unsafe")
        np.copyto(streams[1], np.right_shift(words, 8, out=shifted), casting="unsafe")
    else:
        for index, stream in enumerate(streams):
            np.copyto(stream, piece[index::item])


def join(form: Form, item: int, streams: Sequence[Bytes], piece: Bytes, scratch: Bytes) -> None:
    """Fill ``piece`` from ``streams``; ``scratch`` has at least the length of the piece."""
    if form == Form.WHOLE:
        np.copyto(piece, streams[0])
    elif form == Form.QUARTERS:
        _join_quarters(streams[0], streams[1], piece, scratch)
    elif item == 2:
        words, low = piece.view("<u2"), scratch[: len(piece)].view("<u2")
        np.copyto(words, streams[1])
        np.left_shift(words, 8, out=words)
        np.copyto(low, streams[0])
        np.bitwise_or(words, low, out=words)
    else:
        for index, stream in enumerate(streams):
            np.copyto(piece[index::item], stream)


def _quarters(words: Bytes, count: int) -> list[NDArray[np.uint32]]:
    vectors = words.view("<u4")
    size = len(vectors) // count
    return [vectors[index * size : (index + 1) * size] for index in range(count)]


def _split_quarters(piece: Bytes, rest: Bytes, last: Bytes, scratch: Bytes) -> None:
    a, b, c, d = _quarters(piece, 4)
    for word, element, shift in zip(_quarters(rest, 3), (a, b, c), (24, 16, 8), strict=True):
        np.left_shift(d, shift, out=word)
        np.bitwise_xor(word, element, out=word)
    [bytes_], [some] = _quarters(last, 1), _quarters(scratch[: len(last)], 1)
    np.right_shift(a, 24, out=bytes_)
    for element, shift, mask in ((b, 16, 0xFF00), (c, 8, 0xFF0000), (d, 0, 0xFF000000)):
        np.right_shift(element, shift, out=some)
        np.bitwise_and(some, mask, out=some)
        np.bitwise_or(bytes_, some, out=bytes_)


def _join_quarters(rest: Bytes, last: Bytes, piece: Bytes, scratch: Bytes) -> None:
    a, b, c, d = _quarters(piece, 4)
    words = _quarters(rest, 3)
    [bytes_], [some] = _quarters(last, 1), _quarters(scratch[: len(last)], 1)
    # A word's last byte is its element's, known from `last`, xor one byte of d.
    np.right_shift(words[0], 24, out=some)
    np.bitwise_xor(bytes_, some, out=d)
    for word, shift, mask in ((words[1], 16, 0xFF00), (words[2], 8, 0xFF0000)):
        np.right_shift(word, shift, out=some)
        np.bitwise_and(some, mask, out=some)
        np.bitwise_xor(d, some, out=d)
    for word, element, shift in zip(words, (a, b, c), (24, 16, 8), strict=True):
        np.left_shift(d, shift, out=some)
        np.bitwise_xor(some, word, out=element)
