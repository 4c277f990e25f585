"""Texts of errors without what storage_options hold: they end up in logs and bug reports."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

_SHOWN = re.compile(r"endpoint_url|region(_name)?|project|account_name|account_host|host|port|version|verify", re.ASCII)
"""Options that are no secrets, and without which nobody could tell what failed."""
_LEAST = 4
"""Letters; a shorter value would blot out half of every text."""
_MASK = "***"


class Mask:
    """Knows the values of ``options``."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        found = {value for value in _values(options) if len(value) >= _LEAST}
        # The longer first, which may contain the shorter.
        self._secrets = sorted(found, key=len, reverse=True)

    def text(self, error: BaseException) -> str:
        """What ``error`` is and says, in one short line, each secret as ``***``."""
        return f"{type(error).__name__}: {' '.join(self.hide(str(error)).split())}"[:300]

    def hide(self, text: str) -> str:
        """``text`` with each secret as ``***``."""
        for secret in self._secrets:
            text = text.replace(secret, _MASK)
        return text

    def is_clean(self, error: BaseException) -> bool:
        """Whether ``error`` can be shown, with all that led to it."""
        seen: set[int] = set()
        left: list[BaseException | None] = [error]
        while left:
            one = left.pop()
            if one is None or id(one) in seen:
                continue
            seen.add(id(one))
            shown = f"{one} {one!r} {getattr(one, '__notes__', '')}"
            if self.hide(shown) != shown:
                return False
            left += [one.__cause__, one.__context__]
        return True


def _values(options: object) -> Iterator[str]:
    if isinstance(options, Mapping):
        for name, value in options.items():
            if not (isinstance(name, str) and _SHOWN.fullmatch(name)):
                yield from _values(value)
    elif isinstance(options, list | tuple | set):
        for value in options:
            yield from _values(value)
    elif isinstance(options, bytes):
        yield from _values(options.decode(errors="replace"))
    elif isinstance(options, str):
        yield options
        # A connection string has its secrets inside, and an error may repeat just one of them.
        for field in options.split(";"):
            yield field.partition("=")[2]
