"""Where the ranks of one job leave messages for each other: a key-value store that any thread may use.

No collectives: one that was waited for in vain can't be used again, and doesn't tell who was missing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from ckptstore.format.jsontext import compact, parse_json

MESSAGE_LIMIT = 1 << 30
"""Bytes of one message: a rank's table of a million tensors takes a tenth of that."""

FIRST_PAUSE_S = 0.0005
CALLER_PAUSE_S = 0.05
"""The longest pause between two looks where training waits."""
BEHIND_PAUSE_S = 0.25
"""The longest one in the background."""


class Board(Protocol):
    """One rank's access to it."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...

    def put(self, key: str, data: bytes) -> None:
        """Leave a message.

        Raises:
            StorageError: whoever keeps the messages is gone.
        """

    def get(self, key: str) -> bytes | None:
        """A message, at once; None where nobody has left it yet.

        Raises:
            StorageError: as ``put``.
        """

    def drop(self, key: str) -> None:
        """Forget a message; one that isn't there is no error."""


def put(board: Board, key: str, message: Any) -> None:
    """Leave ``message``, which JSON has words for."""
    board.put(key, compact(message))


def get(board: Board, key: str) -> Any:
    """The message under ``key``; None where nobody has left it yet."""
    data = board.get(key)
    return None if data is None else parse_json(data, key, limit=MESSAGE_LIMIT)


def wait_for(
    board: Board,
    keys: Iterable[str],
    timeout_s: float,
    *,
    longest_pause_s: float,
    enough: Callable[[Any], bool] = lambda message: False,
) -> dict[str, Any]:
    """The messages under ``keys`` that came within ``timeout_s`` seconds.

    Args:
        longest_pause_s: between two looks; the first ones are shorter.
        enough: whether a message makes waiting for the others needless.
    """
    ends = time.monotonic() + timeout_s
    missing, found, pause_s = list(keys), dict[str, Any](), FIRST_PAUSE_S
    while True:
        came = {key: message for key in missing if (message := get(board, key)) is not None}
        found |= came
        missing = [key for key in missing if key not in came]
        left_s = ends - time.monotonic()
        if not missing or left_s <= 0 or any(map(enough, came.values())):
            return found
        time.sleep(min(pause_s, left_s))
        pause_s = min(2 * pause_s, longest_pause_s)
