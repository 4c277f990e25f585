"""Threads that take turns: one runs at a time, and the test chooses who is next wherever one may be interrupted."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from types import FrameType, ModuleType
from typing import Any

UNFAIR, PATIENCE = 20_000, 200_000
"""After so many turns all get theirs, one after the other; so many without an end are none."""


class Stuck(Exception):
    """They wait for each other."""


class _Over(BaseException):
    """Another thread has failed."""


class Turns:
    """Runs functions as threads, each until its next ``turn``.

    Args:
        choose: which of so many threads is next; it may be unfair for a while.
        module: before each of its lines another thread may run, too.
    """

    def __init__(self, choose: Callable[[int], int], module: ModuleType | None = None) -> None:
        self._choose, self._file = choose, None if module is None else module.__file__
        self._gates: list[threading.Semaphore] = []
        self._alive: list[int] = []
        self._turns = 0
        self._error: BaseException | None = None
        self._done = threading.Event()
        self._mine = threading.local()

    def run(self, *functions: Callable[[], None]) -> None:
        """All of them to their ends.

        Raises:
            Stuck: they don't come to one.
        """
        self._gates = [threading.Semaphore(0) for _ in functions]
        self._alive = list(range(len(functions)))
        threads = [threading.Thread(target=self._one, args=(n, f), daemon=True) for n, f in enumerate(functions)]
        for thread in threads:
            thread.start()
        self._next()
        self._done.wait()
        for thread in threads:
            thread.join()
        if self._error is not None:
            raise self._error

    def turn(self) -> None:
        """Another thread may run here."""
        number = self._mine.number
        self._turns += 1
        if self._turns > PATIENCE:
            raise Stuck
        self._next()
        self._gates[number].acquire()
        if self._error is not None:
            raise _Over

    def _one(self, number: int, function: Callable[[], None]) -> None:
        self._mine.number = number
        self._gates[number].acquire()
        try:
            if self._error is None:
                sys.settrace(self._trace)
                function()
        except _Over:
            pass
        except BaseException as error:
            self._error = self._error or error
        finally:
            sys.settrace(None)
        self._alive.remove(number)
        if self._error is not None:
            for gate in self._gates:
                gate.release()
        if self._alive:
            self._next()
        else:
            self._done.set()

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "call":
            return self._trace if frame.f_code.co_filename == self._file else None
        if event == "line":
            self.turn()
        return self._trace

    def _next(self) -> None:
        count = len(self._alive)
        self._gates[self._alive[self._choose(count) if self._turns < UNFAIR else self._turns % count]].release()
