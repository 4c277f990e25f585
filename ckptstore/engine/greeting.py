"""How ranks that begin to talk make sure that they hear each other, and not what is left of a job before them.

A launcher that starts a broken job again may keep the board and all messages on it, under the same names.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence

from ckptstore.engine.board import CALLER_PAUSE_S, FIRST_PAUSE_S, Board, get, put


class AbsentError(Exception):
    """Some didn't greet.

    Attributes:
        ranks: these.
    """

    def __init__(self, ranks: Sequence[int]) -> None:
        super().__init__(f"{len(ranks)} ranks")
        self.ranks = ranks


def greet(board: Board, folder: str, timeout_s: float, longer_s: float) -> str:
    """A folder of messages that is new and the same on all ranks; each must call it.

    Rank 0 draws a number at random, the others answer it with numbers of their own, and rank 0 answers these: who finds
    its own number in an answer knows that it is meant.

    Args:
        folder: for the greeting itself.
        timeout_s: how long rank 0 waits for the others.
        longer_s: how long these wait for it.

    Raises:
        AbsentError: not all have come in time.
        StorageError: whoever keeps the messages is gone.
    """
    mine = secrets.token_hex(8)
    if board.rank == 0:
        _lead(board, folder, mine, timeout_s)
        return f"{folder}/{mine}"
    return f"{folder}/{_follow(board, folder, mine, longer_s)}"


def _lead(board: Board, folder: str, mine: str, timeout_s: float) -> None:
    missing = list(range(1, board.size))
    put(board, f"{folder}/hello/0", mine)
    for _ in _looks(timeout_s):
        for rank in list(missing):
            answer = get(board, f"{folder}/hello/{rank}")
            if answer is not None and answer[1] == mine:
                put(board, f"{folder}/welcome/{rank}", [mine, answer[0]])
                missing.remove(rank)
        if not missing:
            return
    raise AbsentError(missing)


def _follow(board: Board, folder: str, mine: str, timeout_s: float) -> str:
    heard: str | None = None
    for _ in _looks(timeout_s):
        # What is heard first may be an old one.
        if (hello := get(board, f"{folder}/hello/0")) is not None and hello != heard:
            heard = hello
            put(board, f"{folder}/hello/{board.rank}", [mine, heard])
        welcome = get(board, f"{folder}/welcome/{board.rank}")
        if welcome is not None and welcome[1] == mine:
            return str(welcome[0])
    raise AbsentError([0])


def _looks(timeout_s: float) -> Iterator[None]:
    """Once at least, and again for so many seconds."""
    ends, pause_s = time.monotonic() + timeout_s, FIRST_PAUSE_S
    yield
    while time.monotonic() < ends:
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, CALLER_PAUSE_S)
        yield
