"""Signals that ask a run to save, or to save and end: noted when they come, minded when the running step is done."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from types import FrameType
from typing import Any

from ckptstore.engine.control import Action

_log = logging.getLogger("ckptstore")

STOP = (signal.SIGTERM, signal.SIGINT)
SAVE = signal.SIGUSR1


class Signals:
    """SIGTERM and SIGINT end a run, SIGUSR1 only saves; a second SIGINT kills it.

    Handlers that stood before are called, too, and come back with ``restore``. What was ignored stays ignored.

    Attributes:
        stop: the signal after which the run ends, None while it goes on.
        stop_at: when it came, by ``time.monotonic``.
        save: the name of what asked for a save that is pending, or None.
        before: the handlers that stood before.
    """

    def __init__(self) -> None:
        self.stop: int | None = None
        self.stop_at = 0.0
        self.save: str | None = None
        self._pid = os.getpid()
        self.before: dict[int, Any] = {}
        self._given_back = False
        self._interrupts = 0

    def install(self) -> None:
        """Begin to listen, where Python lets this thread do it: only the main one."""
        if threading.current_thread() is not threading.main_thread():
            _log.warning("signals are not minded: the Checkpointer isn't used in the main thread")
            return
        for signum in (*STOP, SAVE):
            before = signal.getsignal(signum)
            # None: of another language's making, and could not be restored.
            if before is not None and (before is not signal.SIG_IGN or signum == SAVE):
                self.before[signum] = before
                signal.signal(signum, self._note)

    def restore(self) -> None:
        """Give back the handlers that stood before. Safe to call twice."""
        self._given_back = True
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
            self._stop(signal.SIGTERM)
        else:
            self.save = "ckptstore signal"

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
            self._stop(signum)
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

    def _stop(self, signum: int) -> None:
        if self.stop is None:
            self.stop_at = time.monotonic()
            self.stop = int(signum)

    def _in_fork(self, signum: int) -> None:
        """Workers of a loader go on for their parent when Ctrl-C reaches all; whoever ends just them is obeyed."""
        if signum == signal.SIGTERM:
            _die(signum)


def name_of(signum: int) -> str:
    """SIGTERM for 15."""
    return signal.Signals(signum).name


def exit_code(signum: int) -> int:
    """What shells and schedulers see of a process that a signal ended."""
    return 128 + signum


def _die(signum: int) -> None:
    signal.signal(signum, signal.SIG_DFL)
    os.kill(os.getpid(), signum)
