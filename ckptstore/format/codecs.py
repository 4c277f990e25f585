"""Codecs by name: how a block's bytes are stored. The name in the part is the interface.

``encode`` and ``decode`` are inverse. A decoder gets bytes whose digest was checked before, and still
never writes more than the block's raw length.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import zstandard

from ckptstore.errors import FormatError

Buffer: TypeAlias = bytes | bytearray | memoryview

_ZSTD_LEVELS = range(-7, 20)
_SETTING = re.compile(r"(none|zstd)(?::(-?\d{1,2}))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Compression:
    """A user's choice: the codec to try on each block, and its level."""

    codec: str = "none"
    level: int = 1


def parse_compression(text: str) -> Compression:
    """``"none"``, ``"zstd"`` or ``"zstd:LEVEL"`` (-7 to 19; 1 where not given).

    Raises:
        FormatError: anything else.
    """
    match = _SETTING.fullmatch(text)
    level = int(match[2]) if match and match[2] else 1
    if not match or level not in _ZSTD_LEVELS or (match[1] == "none" and match[2]):
        raise FormatError(
            f"compression={text!r} is unknown; use 'none', 'zstd' or 'zstd:LEVEL' with a level of -7 to 19"
        )
    return Compression(match[1], level)


def encode(raw: Buffer, compression: Compression) -> tuple[str, Buffer]:
    """The codec used and the bytes to store; ``("none", raw)`` where encoding would not make it smaller."""
    if compression.codec == "zstd":
        stored = zstandard.ZstdCompressor(level=compression.level).compress(raw)
        if len(stored) < len(raw):
            return "zstd", stored
    return "none", raw


def decode(codec: str, stored: memoryview, raw: memoryview) -> None:
    """Fill ``raw`` exactly from ``stored``; the inverse of ``encode``.

    Raises:
        FormatError: unknown codec, or ``stored`` doesn't decode to ``len(raw)`` bytes.
    """
    if codec not in _DECODERS:
        raise FormatError(f"unknown codec {codec!r}; known: {', '.join(_DECODERS)}. A newer ckptstore may know it")
    _DECODERS[codec](stored, raw)


def _decode_none(stored: memoryview, raw: memoryview) -> None:
    if len(stored) != len(raw):
        raise FormatError(f"a block stored as it is has {len(stored)} bytes, its record says {len(raw)}")
    raw[:] = stored


def _decode_zstd(stored: memoryview, raw: memoryview) -> None:
    try:
        # A 13-byte frame can declare 7e18 bytes, and the library then ignores max_output_size: look first.
        declared = zstandard.get_frame_parameters(stored).content_size
        if declared != len(raw):
            raise FormatError(f"a zstd frame declares {declared} bytes, its record says {len(raw)}")
        decoder = zstandard.ZstdDecompressor(max_window_size=1 << 27)
        data = decoder.decompress(stored, max_output_size=len(raw), allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise FormatError(f"a block is no valid zstd frame: {error}") from error
    if len(data) != len(raw):
        raise FormatError(f"a zstd frame holds {len(data)} bytes, its record says {len(raw)}")
    raw[:] = data


_DECODERS: dict[str, Callable[[memoryview, memoryview], None]] = {"none": _decode_none, "zstd": _decode_zstd}
CODECS = frozenset(_DECODERS)
