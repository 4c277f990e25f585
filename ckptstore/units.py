"""Sizes and durations as people write them."""

from __future__ import annotations

import re
import sys

from ckptstore.errors import FormatError

_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,9})?)(?:([kKMGT])(i?))?B", re.ASCII)
_DURATION = re.compile(r"(\d{1,15}(?:\.\d{1,9})?)([smhd])", re.ASCII)
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 24 * 3600}
_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")
_POWERS = {None: 0, "k": 1, "K": 1, "M": 2, "G": 3, "T": 4}


def size_bytes(size: int | str, name: str = "size") -> int:
    """``100MB``, ``1GB``, ``1GiB``, or a number of bytes, in bytes.

    Raises:
        FormatError: anything else; ``name`` says what it should have been.
    """
    if type(size) is int and size > 0:
        return size
    match = _SIZE.fullmatch(size) if isinstance(size, str) else None
    if match is None:
        raise FormatError(f"{name}: {size!r} is no size; write a number and a unit, as 100MB, 1GB or 1GiB")
    unit: int = (1024 if match[3] else 1000) ** _POWERS[match[2]]
    return round(float(match[1]) * unit)


def duration_s(duration: float | str, name: str = "duration") -> float:
    """``90s``, ``10m``, ``24h``, ``7d``, or a number of seconds, in seconds.

    Raises:
        FormatError: anything else; ``name`` says what it should have been.
    """
    if type(duration) in (int, float) and 0 <= duration <= sys.float_info.max:  # type: ignore[operator]
        return float(duration)
    match = _DURATION.fullmatch(duration) if isinstance(duration, str) else None
    if match is None:
        raise FormatError(f"{name}: {duration!r} is no duration; write a number and a unit, as 90s, 10m, 24h or 7d")
    return float(match[1]) * _SECONDS[match[2]]


def duration_text(seconds: float) -> str:
    """``seconds`` as ``duration_s`` reads it, in the largest unit of which there is at least one: 1.5h, 90s, 7d."""
    unit = next((unit for unit in reversed(_SECONDS) if seconds >= 2 * _SECONDS[unit]), "s")
    number = seconds / _SECONDS[unit]
    # Never as 1e-05 or 1e+04, which nobody reads as a duration.
    return f"{number:.4g}{unit}" if 1e-4 <= number < 1e4 else f"{number:.9f}".rstrip("0").rstrip(".") + unit


def size_text(count: float) -> str:
    """Bytes in decimal units with three digits, as ``1.23 GB``."""
    value = float(count)
    for unit in _UNITS:
        # 999.5 would be shown as 1000.
        if value < 999.5 or unit == _UNITS[-1]:
            break
        value /= 1000
    if unit == "B":
        return f"{count:.0f} B"
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f} {unit}"


def rate_text(count: float, seconds: float) -> str:
    """Bytes per second, as ``1.43 GB/s``."""
    return f"{size_text(count / seconds)}/s" if seconds > 0 else "-"


def count_text(count: int, noun: str) -> str:
    """A number with its noun, as ``1 file`` and ``2 files``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
