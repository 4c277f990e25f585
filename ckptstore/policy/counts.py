"""Large counts as people write them: 1B, 250k, 1.5M."""

from __future__ import annotations

import re
from collections.abc import Iterable
from decimal import Decimal

from ckptstore.errors import FormatError

_COUNT = re.compile(r"(\d{1,15}(?:\.\d{1,9})?(?:[eE]\+?\d{1,2})?)\s*([KMB]?)", re.ASCII | re.IGNORECASE)
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}
_GRAMMAR = "write numbers with commas between them, as 1B,5B or 250k,1.5M (B, M and K are powers of ten)"
_LARGEST = 10**15
BARE_BILLIONS = 1000
"""Below it a number without a unit means billions, of parameters and tokens."""


def parse_count(text: str, name: str = "count", *, billions: bool = False) -> int:
    """``1B``, ``250k``, ``1.5M`` or a plain number, exactly: 2.01B is 2,010,000,000.

    Args:
        text: what somebody wrote.
        name: what it is, for the error.
        billions: whether a number below 1,000 without a unit means billions.

    Raises:
        FormatError: anything else; no whole number from 1 to 10**15.
    """
    match = _COUNT.fullmatch(text.strip())
    if match is None:
        raise FormatError(f"{name}: {text!r} is no count; {_GRAMMAR}")
    number, unit = Decimal(match[1]), match[2].upper()
    scale = _UNITS["B"] if billions and not unit and number < BARE_BILLIONS else _UNITS[unit]
    exact = number * scale
    if exact != exact.to_integral_value() or not 1 <= exact <= _LARGEST:
        raise FormatError(f"{name}: {text!r} is {exact:f}, no whole number from 1 to {_LARGEST:,}")
    return int(exact)


def parse_counts(given: str | Iterable[int | str], name: str = "milestones", *, billions: bool = False) -> list[int]:
    """``1B,5B,10B`` or a list of such counts, sorted, each once.

    Raises:
        FormatError: one of them is no count, or there is none.
    """
    if not isinstance(given, Iterable):
        raise FormatError(f"{name}: {given!r:.60} is no text and no list; {_GRAMMAR}")
    parts = given.split(",") if isinstance(given, str) else list(given)
    found = set()
    for part in parts:
        if type(part) is int and 1 <= part <= _LARGEST:
            found.add(part)
        elif isinstance(part, str):
            found.add(parse_count(part, name, billions=billions))
        else:
            raise FormatError(f"{name}: {part!r} is no count; {_GRAMMAR}")
    if not found:
        raise FormatError(f"{name}: there is none; {_GRAMMAR}")
    return sorted(found)


def count_name(count: int) -> str:
    """The shortest exact way to write ``count``: 1B, 1.04M, 123456789."""
    for unit in ("B", "M", "K"):
        number = Decimal(count) / _UNITS[unit]
        text = f"{number.normalize():f}"
        if number >= 1 and len(text) < len(str(count)):
            return f"{text}{unit}"
    return str(count)


def count_text(count: int) -> str:
    """``count`` with one decimal, for reading: 124.4M, 1.0B."""
    for unit, below in (("K", "M"), ("M", "B"), ("B", None)):
        text = f"{count / _UNITS[unit]:.1f}"
        # What rounds to a thousand of one unit is one of the next.
        if below is None or float(text) < 1000:
            return f"{text}{unit}"
    raise AssertionError
