"""The stored form of codec ``float-zstd``: a table, raw streams, tails, compressed streams. SPEC.md, section 7.

What compresses a stream is passed in. ``encode`` and ``decode`` are inverse, whatever the bytes mean.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np

from ckptstore.errors import FormatError
from ckptstore.format.floatsplit import GRAIN, Bytes, Form, join, split, stream_lengths
from ckptstore.format.tensorfile import ITEM_BYTES

Buffer: TypeAlias = bytes | bytearray | memoryview
Compress: TypeAlias = Callable[[Buffer], bytes]
Segments: TypeAlias = Sequence[tuple[str, int]]

PIECE_BYTES = 1 << 20
"""Raw bytes taken apart at once: what is touched stays in the caches."""

_STRETCH = 4
"""Pieces that share a decision; sampling each one would cost more than it gains."""

_WINDOWS, _WINDOW = 8, 512
"""A sample: windows spread over the stretch, and elements in each."""

_PAYS = 0.95
"""A stream that keeps more of its size than this is not worth the time to decode it."""

_WORTH = 0.99
"""So much of a block at most may be left: one that is stored as it is loads without a copy."""

_LENGTH_BITS = 28
_LENGTH_MASK = (1 << _LENGTH_BITS) - 1


class Coding(IntEnum):
    """How a stream is stored."""

    RAW = 0
    ZSTD = 1


class Piece(NamedTuple):
    """``length`` bytes at ``begin`` of a block, all elements of ``item`` bytes."""

    item: int
    begin: int
    length: int


class Plan(NamedTuple):
    """How a piece is taken apart, and what compresses each stream; None stores it raw."""

    form: Form
    coders: Sequence[Compress | None]


class Decompress(Protocol):
    """The bytes of a frame; FormatError unless they are exactly ``length``."""

    def __call__(self, frame: memoryview, length: int) -> bytes: ...


@dataclass(frozen=True)
class Layout:
    """A block's pieces, and the ranges that are too short for one or left over: its tails."""

    pieces: Sequence[Piece]
    tails: Sequence[tuple[int, int]]

    @classmethod
    def of(cls, segments: Segments) -> Layout:
        """Runs of segments with elements of one size, cut into pieces of 1 MiB; the last one is shorter."""
        pieces: list[Piece] = []
        tails = []
        for item, begin, end in _runs(segments):
            grain = GRAIN * item
            stop = begin + (end - begin) // grain * grain
            pieces += [Piece(item, at, min(PIECE_BYTES, stop - at)) for at in range(begin, stop, PIECE_BYTES)]
            if stop < end:
                tails.append((stop, end))
        return cls(pieces, tails)

    @property
    def table_bytes(self) -> int:
        """Length of the table: for each piece a word for its form and one for each stream; a multiple of 8."""
        return -(-4 * sum(1 + piece.item for piece in self.pieces) // 8) * 8


def _runs(segments: Segments) -> Iterator[tuple[int, int, int]]:
    item = begin = end = 0
    for dtype, length in segments:
        if ITEM_BYTES[dtype] != item:
            if end > begin:
                yield item, begin, end
            item, begin = ITEM_BYTES[dtype], end
        end += length
    if end > begin:
        yield item, begin, end


class _Scratch(threading.local):
    """2 MiB for each thread: the streams of a piece, and what taking it apart needs."""

    def __init__(self) -> None:
        self.streams = np.empty(PIECE_BYTES, np.uint8)
        self.work = np.empty(PIECE_BYTES, np.uint8)


_scratch = _Scratch()


def encode(raw: Buffer, segments: Segments, compressors: Sequence[Compress]) -> memoryview | None:
    """The stored form of ``raw``, or None where that would not be at least 1 % smaller.

    Args:
        segments: dtypes and lengths in bytes of what stands in ``raw``, all of it.
        compressors: make zstd frames; the one that a sample likes best is used.
    """
    source = np.frombuffer(raw, np.uint8)
    layout = Layout.of(segments)
    assert sum(length for _, length in segments) == len(source), "segments cover the block"
    plans = _plans(source, layout, compressors)
    at = layout.table_bytes
    end = at + sum(map(_raw_bytes, layout.pieces, plans))
    out = np.empty(int(len(source) * _WORTH), np.uint8)
    for begin, stop in layout.tails:
        end = _append(out, end, source[begin:stop])
    table: list[int] = []
    for piece, plan in zip(layout.pieces, plans, strict=True):
        if end > len(out):
            return None
        at, entry, frames = _encode_piece(source, piece, plan, out, at)
        table += [*entry, *[0] * (1 + piece.item - len(entry))]
        for frame in frames:
            end = _append(out, end, np.frombuffer(frame, np.uint8))
    if end > len(out):
        return None
    out[: layout.table_bytes] = 0
    out[: 4 * len(table)] = np.array(table, "<u4").view(np.uint8)
    return out[:end].data


def _append(out: Bytes, end: int, data: Bytes) -> int:
    """Where ``data`` end when put at ``end``; that may be beyond ``out``, and nothing is put there."""
    stop = end + len(data)
    if stop <= len(out):
        # By NumPy, which lets other threads go on meanwhile.
        np.copyto(out[end:stop], data)
    return stop


def _raw_bytes(piece: Piece, plan: Plan) -> int:
    lengths = stream_lengths(plan.form, piece.item, piece.length)
    return sum(length for length, coder in zip(lengths, plan.coders, strict=True) if coder is None)


def _encode_piece(source: Bytes, piece: Piece, plan: Plan, out: Bytes, at: int) -> tuple[int, list[int], list[bytes]]:
    """Raw streams into ``out`` from ``at`` on; returns where they end, the table's words and the frames."""
    lengths = stream_lengths(plan.form, piece.item, piece.length)
    streams, used = [], 0
    for length, coder in zip(lengths, plan.coders, strict=True):
        if coder is None:
            streams.append(out[at : at + length])
            at += length
        else:
            streams.append(_scratch.streams[used : used + length])
            used += length
    split(plan.form, piece.item, source[piece.begin : piece.begin + piece.length], streams, _scratch.work)
    entry, frames = [int(plan.form)], []
    for stream, coder in zip(streams, plan.coders, strict=True):
        if coder is None:
            entry.append(Coding.RAW << _LENGTH_BITS | len(stream))
        else:
            frames.append(coder(stream.data))
            entry.append(Coding.ZSTD << _LENGTH_BITS | len(frames[-1]))
    return at, entry, frames


def _plans(source: Bytes, layout: Layout, compressors: Sequence[Compress]) -> list[Plan]:
    plans: list[Plan] = []
    while (first := len(plans)) < len(layout.pieces):
        item, begin, length = layout.pieces[first]
        count = 1
        for piece in layout.pieces[first + 1 : first + _STRETCH]:
            if piece.item != item or piece.begin != begin + length:
                break
            count, length = count + 1, length + piece.length
        plans += [_plan(source[begin : begin + length], item, compressors)] * count
    return plans


def _plan(stretch: Bytes, item: int, compressors: Sequence[Compress]) -> Plan:
    sample = _sample(stretch, item)
    whole, whole_share = _best(sample.reshape(-1), compressors)
    if item == 1:
        return Plan(Form.WHOLE, [whole])
    planes = [_best(np.ascontiguousarray(sample[:, index]), compressors) for index in range(item)]
    if whole_share < sum(share for _, share in planes) / item:
        return Plan(Form.WHOLE, [whole])
    coders = [coder for coder, _ in planes]
    if not any(coders):
        return Plan(Form.WHOLE, [None])
    if not any(coders[:-1]):
        return Plan(Form.FOLDED, [None, coders[-1]])
    return Plan(Form.PLANES, coders)


def _sample(stretch: Bytes, item: int) -> Bytes:
    """Up to 8 windows of 512 elements, spread evenly, as rows of one element."""
    elements = stretch.reshape(-1, item)
    if len(elements) <= _WINDOWS * _WINDOW:
        return elements
    step = (len(elements) - _WINDOW) // (_WINDOWS - 1)
    return np.concatenate([elements[n * step : n * step + _WINDOW] for n in range(_WINDOWS)])


def _best(sample: Bytes, compressors: Sequence[Compress]) -> tuple[Compress | None, float]:
    """What makes the sample smallest and the share that is left; None and 1 where nothing pays."""
    shares = [(len(compress(sample.data)) / len(sample), index) for index, compress in enumerate(compressors)]
    share, index = min(shares)
    return (compressors[index], share) if share < _PAYS else (None, 1.0)


def decode(stored: memoryview, raw: memoryview, segments: Segments, decompress: Decompress) -> None:
    """Fill ``raw`` from its stored form; the inverse of ``encode``.

    Raises:
        FormatError: not the stored form of a block with these segments. Nothing is allocated by what it claims.
    """
    layout = Layout.of(segments)
    if sum(length for _, length in segments) != len(raw):
        raise FormatError(f"the tensors in a block have other bytes than the {len(raw)} that its record says")
    source, target = np.frombuffer(stored, np.uint8), np.frombuffer(raw, np.uint8)
    entries = _read_table(source, layout)
    at = layout.table_bytes
    tails = at + sum(length for entry in entries for coding, length, _ in entry.streams if coding == Coding.RAW)
    frames = tails + sum(end - begin for begin, end in layout.tails)
    total = frames + sum(length for entry in entries for coding, length, _ in entry.streams if coding != Coding.RAW)
    if total != len(source):
        raise FormatError(f"a float-zstd block has {len(source)} bytes, its table says {total}")
    for piece, entry in zip(layout.pieces, entries, strict=True):
        streams = []
        for coding, length, plain in entry.streams:
            if coding == Coding.RAW:
                streams.append(source[at : at + length])
                at += length
            else:
                streams.append(np.frombuffer(decompress(stored[frames : frames + length], plain), np.uint8))
                frames += length
        join(entry.form, piece.item, streams, target[piece.begin : piece.begin + piece.length], _scratch.work)
    for begin, end in layout.tails:
        target[begin:end] = source[tails : tails + end - begin]
        tails += end - begin


class _Entry(NamedTuple):
    """A piece in the table: its form, and of each stream the coding, the stored and the plain length."""

    form: Form
    streams: Sequence[tuple[int, int, int]]


def _read_table(source: Bytes, layout: Layout) -> list[_Entry]:
    if len(source) < layout.table_bytes:
        raise FormatError(f"a float-zstd block has {len(source)} bytes, its table alone {layout.table_bytes}")
    # A copy, because what is mapped may be changed by others after it was checked.
    words = source[: layout.table_bytes].tobytes()
    numbers = np.frombuffer(words, "<u4").tolist()
    entries = []
    for piece in layout.pieces:
        entry, numbers = numbers[: 1 + piece.item], numbers[1 + piece.item :]
        entries.append(_entry(piece, entry))
    if any(numbers):
        raise FormatError("the table of a float-zstd block has something behind it")
    return entries


def _entry(piece: Piece, words: Sequence[int]) -> _Entry:
    if words[0] > (Form.FOLDED if piece.item > 1 else Form.WHOLE):
        raise FormatError(f"a float-zstd block takes elements of {piece.item} bytes apart in unknown form {words[0]}")
    form = Form(words[0])
    lengths = stream_lengths(form, piece.item, piece.length)
    streams = [
        (word >> _LENGTH_BITS, word & _LENGTH_MASK, plain) for word, plain in zip(words[1:], lengths, strict=False)
    ]
    for coding, length, plain in streams:
        if coding > Coding.ZSTD or (coding == Coding.RAW and length != plain):
            raise FormatError(f"a float-zstd block stores {plain} bytes as {length} in coding {coding}")
    if any(words[1 + len(lengths) :]):
        raise FormatError("a float-zstd block lists more streams than its elements have")
    return _Entry(form, streams)
