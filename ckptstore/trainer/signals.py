"""Signals that ask a run to save, or to save and end: noted when they come, minded when the running step is done."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from types import FrameType
from typing import Any
from weakref import WeakSet

from ckptstore.engine.control import Action

_log = logging.getLogger("ckptstore")

STOP = (signal.SIGTERM, signal.SIGINT)
SAVE = signal.SIGUSR1


class Signals:
    """SIGTERM and SIGINT end a run, SIGUSR1 only saves; a second SIGINT kills it.

    Handlers that stood before are called, too, and come back with ``restore``. What was ignored stays ignored.

    Attributes:
        stop: the signal after which the run ends, None while it goes on.
        came: that signal, and when it came by ``time.monotonic``; known before, where the main thread is busy.
        save: the name of what asked for a save that is pending, or None.
        before: the handlers that stood before.
    """

    def __init__(self) -> None:
        self.stop: int | None = None
        self.came: tuple[int, float] | None = None
        self.save: str | None = None
        self._pid = os.getpid()
        self.before: dict[int, Any] = {}
        self._given_back = False
        self._interrupts = 0
        self._ear: Ear | None = None

    def install(self, *, with_ear: bool = False) -> None:
        """Begin to listen, where Python lets this thread do it: only the main one. With an ear ``hear`` works."""
        if threading.current_thread() is not threading.main_thread():
            _log.warning("signals are not minded: the Checkpointer isn't used in the main thread")
            return
        for signum in (*STOP, SAVE):
            before = signal.getsignal(signum)
            # None: of another language's making, and could not be restored.
            if before is not None and (before is not signal.SIG_IGN or signum == SAVE):
                self.before[signum] = before
                signal.signal(signum, self._note)
        if with_ear:
            self._ear = Ear.lent()

    def hear(self) -> None:
        """Learn of a signal whose handler Python hasn't run yet: the main thread is in the midst of something long.

        For the thread that watches. The running step still completes before anything else is done.
        """
        for signum in self._ear.heard() if self._ear is not None else b"":
            if signum in STOP and self.came is None and signal.getsignal(signum) == self._note:
                self.came = signum, time.monotonic()

    def restore(self) -> None:
        """Give back the handlers that stood before. Safe to call twice."""
        self._given_back = True
        if self._ear is not None:
            self._ear.close()
            self._ear = None
        for signum, before in self.before.items():
            # Somebody who came later and chained to this one goes on calling it, which calls the one before.
            if signal.getsignal(signum) == self._note:
                signal.signal(signum, before)

    def take_back(self) -> None:
        """Listen again where somebody installed a handler of their own after ``install``; theirs is dropped."""
        for signum in self.before:
            signal.signal(signum, self._note)

    def ask(self, action: Action) -> None:
        """The same by ``ckptstore signal``, from any thread."""
        if action == "stop":
            self.end_by(signal.SIGTERM)
        else:
            self.save = "ckptstore signal"

    def end_by(self, signum: int) -> None:
        """As if that signal had come, from any thread."""
        if self.stop is None:
            self.came = self.came or (int(signum), time.monotonic())
            self.stop = int(signum)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        # Only plain attributes are set here: a lock might be held by the very code that is interrupted.
        if os.getpid() != self._pid:
            self._in_fork(signum)
            return
        if self._given_back:
            self._pass_on(signum, frame)
            return
        if signum == SAVE:
            self.save = signal.Signals(signum).name
        else:
            self.end_by(signum)
        if signum == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                _die(signum)
        before = self.before.get(signum)
        if callable(before) and before is not signal.default_int_handler:
            before(signum, frame)

    def _pass_on(self, signum: int, frame: FrameType | None) -> None:
        """Somebody who remembers handlers has put this one back after the end of its run."""
        before = self.before[signum]
        if callable(before):
            before(signum, frame)
        elif before == signal.SIG_DFL:
            _die(signum)

    def _in_fork(self, signum: int) -> None:
        """Workers of a loader go on for their parent when Ctrl-C reaches all; whoever ends just them is obeyed."""
        if signum == signal.SIGTERM:
            _die(signum)


class Ear:
    """Hears signals at once, by the pipe that Python's own handler in C writes their numbers to.

    A handler in Python waits until the main thread comes back from what it does; a signal that comes right before it
    falls asleep waits as long as it sleeps.
    """

    def __init__(self, reads: int, writes: int) -> None:
        self._reads, self._writes = reads, writes
        self._lock, self._open = threading.Lock(), True

    @classmethod
    def lent(cls) -> Ear | None:
        """One, unless somebody else has the only pipe that Python writes to, as a running event loop."""
        reads, writes = os.pipe()
        for end in (reads, writes):
            os.set_blocking(end, False)
        taken = signal.set_wakeup_fd(writes, warn_on_full_buffer=False)
        ear = cls(reads, writes)
        if taken == -1:
            _ears.add(ear)
            return ear
        signal.set_wakeup_fd(taken)
        ear.close()
        return None

    def heard(self) -> bytes:
        """The numbers of the signals that came since the last call, from any thread."""
        with self._lock:
            try:
                return os.read(self._reads, 1000) if self._open else b""
            except BlockingIOError:
                return b""

    def close(self) -> None:
        """Hear no more."""
        _ears.discard(self)
        if threading.current_thread() is threading.main_thread():
            current = signal.set_wakeup_fd(-1)
            if current not in (-1, self._writes):
                signal.set_wakeup_fd(current)
        # The other thread must not read what somebody else opens under these numbers.
        with self._lock:
            self._open = False
            os.close(self._reads)
            os.close(self._writes)


_ears: WeakSet[Ear] = WeakSet()


def _deafen() -> None:
    """A forked child would tell its parent of its own signals."""
    if _ears:
        signal.set_wakeup_fd(-1)
        _ears.clear()


os.register_at_fork(after_in_child=_deafen)


def name_of(signum: int) -> str:
    """SIGTERM for 15."""
    return signal.Signals(signum).name


def exit_code(signum: int) -> int:
    """What shells and schedulers see of a process that a signal ended."""
    return 128 + signum


def _die(signum: int) -> None:
    signal.signal(signum, signal.SIG_DFL)
    os.kill(os.getpid(), signum)
