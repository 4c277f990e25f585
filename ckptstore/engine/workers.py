"""A few threads that work through one list of tasks in order and stop at the first error."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Generic, TypeVar

T = TypeVar("T")

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all), from any thread, one call at a time."""


_LOWEST_PRIORITY = 19
_NAME = "ckptstore-"


def cores() -> int:
    """Processor cores that this process may use, at most 8: more don't copy faster."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, allowed)


def default_threads() -> int:
    """One more than the cores, so that the disk has work while every core hashes; 2 to 8."""
    return max(2, min(8, cores() + 1))


def run(tasks: Iterable[T], work: Callable[[T], None], *, threads: int) -> None:
    """``work`` on every task; tasks are taken in order. With one thread, in the caller's own.

    Raises:
        BaseException: the first error of any task, after all threads have stopped.
    """
    if threads == 1:
        for task in tasks:
            work(task)
        return
    shift = _Shift(tasks, work)
    # Daemons, as all that are waited for are: see bounded.apart.
    members = [threading.Thread(target=shift.member, name=f"{_NAME}{n}", daemon=True) for n in range(threads)]
    try:
        # Where the system has no room for more threads, those that run do all the work, or this one does.
        with suppress(RuntimeError):
            for member in members:
                member.start()
        if members[0].ident is None:
            shift.member()
        for member in members:
            if member.ident is not None:
                member.join()
    except BaseException:
        shift.stop = True
        for member in members:
            if member.ident is not None:
                member.join()
        raise
    if shift.error is not None:
        raise shift.error


def give_way() -> None:
    """Let all other threads of the machine have the processor before the calling one, for good, if it is one of ours.

    Linux only: elsewhere the priority belongs to the process, which must not change.
    """
    if sys.platform == "linux" and threading.current_thread().name.startswith(_NAME):
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)


class _Shift(Generic[T]):
    def __init__(self, tasks: Iterable[T], work: Callable[[T], None]) -> None:
        self.stop = False
        self.error: BaseException | None = None
        self._tasks: Iterator[T] = iter(tasks)
        self._work = work
        self._lock = threading.Lock()

    def member(self) -> None:
        try:
            while not self.stop:
                with self._lock:
                    task = next(self._tasks)
                self._work(task)
        except StopIteration:
            return
        except BaseException as error:
            # The first error is the cause; those that follow it are its consequences.
            self.error = self.error or error
            self.stop = True


class Meter:
    """Counts bytes done by several threads and tells whoever wants to know."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.done, self._total, self._progress = 0, total, progress
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        """``count`` more bytes are done."""
        with self._lock:
            self.done += count
            if self._progress is not None:
                self._progress(self.done, max(self._total, self.done))


class Turnstile:
    """Lets numbered callers pass one by one, 0 first, whatever order they come in."""

    def __init__(self) -> None:
        self._next = 0
        self._error: BaseException | None = None
        self._changed = threading.Condition()

    def pass_in_turn(self, number: int, action: Callable[[], T]) -> T:
        """Run ``action`` when all lower numbers have passed.

        Raises:
            BaseException: the error of somebody before, after which this turn never comes.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None or self._next == number)
            if self._error is not None:
                raise self._error
            result = action()
            self._next += 1
            self._changed.notify_all()
            return result

    def break_off(self, error: BaseException) -> None:
        """Send everybody who waits home with ``error``."""
        with self._changed:
            self._error = error
            self._changed.notify_all()
