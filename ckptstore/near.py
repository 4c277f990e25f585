"""What somebody may have meant who wrote a name that isn't there."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from itertools import islice

_AMONG = 2000
_LONGEST = 200
"""Names that are looked at, and how much of each: an error's text must not take longer than what failed."""


_WILD = re.compile(r"[*?[]")


def near(name: str, known: Iterable[str], *, count: int = 3) -> list[str]:
    """Those of ``known`` that ``name`` may have been meant to be, the likeliest first."""
    folded: dict[str, str] = {}
    for one in islice(known, _AMONG):
        folded.setdefault(one[:_LONGEST].lower(), one)
    return [folded[found] for found in difflib.get_close_matches(name[:_LONGEST].lower(), folded, n=count)]


def meant(name: str, known: Iterable[str]) -> str:
    """``; did you mean 'a' or 'b'?``, or nothing where nothing is alike."""
    found = [repr(one) for one in near(name, known)]
    return f"; did you mean {' or '.join(found)}?" if found else ""


def meant_pattern(pattern: str, names: Iterable[str]) -> str:
    """The same for a pattern that matches none of ``names``: what stands before its first wildcard is compared.

    ``names`` are paths, as ``model/layers.0.weight``; the folders that they lie in count, too.
    """
    head = _WILD.split(pattern, maxsplit=1)[0].rstrip("/.")
    known = dict.fromkeys(folder for name in islice(names, _AMONG) for folder in _folders(name))
    found = [repr(one + pattern[len(head) :]) for one in near(head, known)] if head else []
    return f"; did you mean {' or '.join(found)}?" if found else ""


def _folders(name: str) -> Iterator[str]:
    """The name, and what stands before each of its slashes."""
    yield from (name[:index] for index, character in enumerate(name) if character == "/")
    yield name
