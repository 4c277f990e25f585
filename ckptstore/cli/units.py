"""What can be written after an option: durations, sizes and shares, with their units."""

from __future__ import annotations

import re

import click

from ckptstore import units
from ckptstore.errors import FormatError

_NUMBER = r"(\d{1,15}(?:\.\d{1,9})?)"
_SHARE = re.compile(_NUMBER + r"(%?)", re.ASCII)


def duration_s(text: str) -> float:
    """``90s``, ``10m``, ``24h`` or ``7d`` in seconds.

    Raises:
        click.BadParameter: anything else.
    """
    try:
        return units.duration_s(text)
    except FormatError as error:
        raise click.BadParameter(str(error).removeprefix("duration: ")) from error


def size_bytes(text: str) -> int:
    """``100MB``, ``1GB`` or ``1GiB`` in bytes.

    Raises:
        click.BadParameter: anything else.
    """
    try:
        return units.size_bytes(text)
    except FormatError as error:
        raise click.BadParameter(str(error).removeprefix("size: ")) from error


def share(text: str) -> float:
    """``10%`` or ``0.1``: over 0 and at most 1.

    Raises:
        click.BadParameter: anything else.
    """
    match = _SHARE.fullmatch(text)
    value = float(match[1]) / (100 if match[2] else 1) if match else 0.0
    if not 0 < value <= 1:
        raise click.BadParameter(f"{text!r} is no share; write 10% or 0.1 (over 0, at most 100%)")
    return value
