"""A board in memory: the ranks of a test are threads of one process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class MemoryBoard:
    """One rank's view of a dict that all share."""

    def __init__(self, rank: int, size: int, messages: dict[str, bytes]) -> None:
        self.rank, self.size = rank, size
        self.messages = messages
        self.calls = 0

    def put(self, key: str, data: bytes) -> None:
        self.calls += 1
        self.messages[key] = bytes(data)

    def get(self, key: str) -> bytes | None:
        self.calls += 1
        return self.messages.get(key)

    def drop(self, key: str) -> None:
        self.messages.pop(key, None)


def boards(size: int) -> list[MemoryBoard]:
    messages: dict[str, bytes] = {}
    return [MemoryBoard(rank, size, messages) for rank in range(size)]


def on_all(size: int, run: Callable[[int], T]) -> list[T | BaseException]:
    """What ``run(rank)`` gives or raises on each rank, all at once."""
    ready = threading.Barrier(size)

    def one(rank: int) -> T | BaseException:
        ready.wait()
        try:
            return run(rank)
        except BaseException as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))
