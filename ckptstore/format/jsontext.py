"""JSON without its traps, both ways: what one reader takes for another value than the next is refused."""

from __future__ import annotations

import json
import math
from typing import Any

from ckptstore.errors import FormatError


def compact(fields: Any) -> bytes:
    """One line without spaces, in ASCII, in the order of the fields."""
    return json.dumps(fields, separators=(",", ":"), allow_nan=False).encode("ascii")


def indented(fields: Any) -> bytes:
    """For people: one field a line, and a line feed at the end."""
    return json.dumps(fields, indent=1, allow_nan=False).encode("ascii") + b"\n"


def parse_json(data: bytes, key: str, *, limit: int) -> Any:
    """The inverse of both: no duplicate keys, NaN, Infinity or trailing data, bounded size and depth.

    Raises:
        FormatError: anything of that.
    """
    if len(data) > limit:
        raise FormatError(f"{key} has {len(data)} bytes, more than the {limit} allowed", key=key)
    try:
        return json.loads(
            data.decode("ascii"), object_pairs_hook=no_duplicates, parse_constant=no_constant, parse_float=_finite
        )
    except RecursionError as error:
        raise FormatError(f"{key} is nested too deeply", key=key) from error
    except ValueError as error:
        raise FormatError(f"{key} is no valid JSON: {error}", key=key) from error


def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, for ``json.loads``; ValueError where a key stands in it twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object has the same key twice")
    return found


def no_constant(name: str) -> Any:
    """What ``json.loads`` calls for nan and the infinities, which JSON lacks (ValueError)."""
    raise ValueError(f"{name} is no JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text[:40]} is larger than any number here")
    return number
