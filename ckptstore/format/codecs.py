"""Codecs by name: how a block's bytes are stored. The name in the part is the interface.

``encode`` and ``decode`` are inverse. A decoder gets bytes whose digest was checked before, and still
never writes more than the block's raw length.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import zstandard

from ckptstore.errors import FormatError
from ckptstore.format import floatzstd
from ckptstore.format.floatzstd import PIECE_BYTES, Segments

Buffer: TypeAlias = bytes | bytearray | memoryview

_ZSTD_LEVELS = range(-7, 20)
_SETTING = re.compile(r"(none|auto|zstd|float-zstd)(?::(-?\d{1,2}))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Compression:
    """A user's choice: the codec to try on each block, and its level."""

    codec: str = "none"
    level: int = 1


def parse_compression(text: str) -> Compression:
    """``"none"``, ``"auto"``, ``"zstd"`` or ``"float-zstd"``; the latter two also with ``":LEVEL"``, -7 to 19, else 1.

    Raises:
        FormatError: anything else.
    """
    match = _SETTING.fullmatch(text)
    level = int(match[2]) if match and match[2] else 1
    if not match or level not in _ZSTD_LEVELS or (match[2] and not match[1].endswith("zstd")):
        raise FormatError(
            f"compression={text!r} is unknown; use 'none', 'auto', 'zstd', 'float-zstd', "
            "'zstd:LEVEL' or 'float-zstd:LEVEL' with a level of -7 to 19"
        )
    return Compression(match[1], level)


def encode(raw: Buffer, compression: Compression, segments: Segments) -> tuple[str, Buffer]:
    """The codec used and the bytes to store; ``("none", raw)`` where encoding would not make it smaller.

    Args:
        compression: not ``"auto"``, which the caller has made up its mind about.
        segments: dtype and length in bytes of what stands in ``raw``, as ``TensorFile.segments`` gives them.
    """
    stored: Buffer | None = None
    if compression.codec == "zstd":
        stored = zstandard.ZstdCompressor(level=compression.level).compress(raw)
    elif compression.codec == "float-zstd":
        compressors = _tools.compressors(compression.level)
        stored = floatzstd.encode(raw, segments, [compressors[0].compress, compressors[1].compress])
    if stored is not None and len(stored) < len(raw):
        return compression.codec, stored
    return "none", raw


def decode(codec: str, stored: memoryview, raw: memoryview, segments: Segments) -> None:
    """Fill ``raw`` exactly from ``stored``; the inverse of ``encode``.

    Raises:
        FormatError: unknown codec, or ``stored`` doesn't decode to ``len(raw)`` bytes.
    """
    if codec not in _DECODERS:
        raise FormatError(f"unknown codec {codec!r}; known: {', '.join(_DECODERS)}. A newer ckptstore may know it")
    _DECODERS[codec](stored, raw, segments)


class _Tools(threading.local):
    """What takes time to make, and may not be used by two threads at once."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[zstandard.ZstdCompressor, zstandard.ZstdCompressor]] = {}
        self.decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 27)
        self.piece_decompressor = zstandard.ZstdDecompressor(max_window_size=PIECE_BYTES)

    def compressors(self, level: int) -> tuple[zstandard.ZstdCompressor, zstandard.ZstdCompressor]:
        """One that hardly looks for matches, and one of ``level``."""
        if level not in self._known:
            # Exponents have few matches worth having: literals alone are smaller and several times as fast.
            literals = zstandard.ZstdCompressionParameters(
                window_log=17, hash_log=6, chain_log=6, search_log=1, min_match=7, strategy=zstandard.STRATEGY_FAST
            )
            self._known[level] = (
                zstandard.ZstdCompressor(compression_params=literals),
                zstandard.ZstdCompressor(level=level),
            )
        return self._known[level]


_tools = _Tools()


def _decode_none(stored: memoryview, raw: memoryview, _: Segments) -> None:
    if len(stored) != len(raw):
        raise FormatError(f"a block stored as it is has {len(stored)} bytes, its record says {len(raw)}")
    raw[:] = stored


def _decode_zstd(stored: memoryview, raw: memoryview, _: Segments) -> None:
    raw[:] = _frame(stored, len(raw), _tools.decompressor)


def _decode_float_zstd(stored: memoryview, raw: memoryview, segments: Segments) -> None:
    decompressor = _tools.piece_decompressor
    floatzstd.decode(stored, raw, segments, lambda frame, length: _frame(frame, length, decompressor))


def _frame(stored: memoryview, length: int, decompressor: zstandard.ZstdDecompressor) -> bytes:
    try:
        # A 13-byte frame can declare 7e18 bytes, and the library then ignores max_output_size: look first.
        declared = zstandard.get_frame_parameters(stored).content_size
        if declared != length:
            raise FormatError(f"a zstd frame declares {declared} bytes, its record says {length}")
        data = decompressor.decompress(stored, max_output_size=length, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise FormatError(f"a block is no valid zstd frame: {error}") from error
    if len(data) != length:
        raise FormatError(f"a zstd frame holds {len(data)} bytes, its record says {length}")
    return data


_DECODERS: dict[str, Callable[[memoryview, memoryview, Segments], None]] = {
    "none": _decode_none,
    "zstd": _decode_zstd,
    "float-zstd": _decode_float_zstd,
}
CODECS = frozenset(_DECODERS)
