"""A thread that looks for requests from outside, agrees with other ranks, and ends a process that takes too long."""

from __future__ import annotations

import logging
import os
import threading
import time

from ckptstore.engine.control import Action
from ckptstore.errors import CheckpointError
from ckptstore.store import Store
from ckptstore.trainer.signals import Signals, exit_code, name_of
from ckptstore.trainer.team import Team

_log = logging.getLogger("ckptstore")
_LOOK_S = 0.1
"""How often a deadline is looked at."""
_JOIN_S = 5.0
"""How long the end waits for a last look at the messages of other ranks."""


class Watch:
    """Looks every ``poll_s`` seconds for requests in the store, and for the deadline all the time.

    Of several ranks only the first looks for requests.
    """

    def __init__(self, signals: Signals, store: Store, poll_s: float | None, deadline_s: float | None) -> None:
        self._signals, self._store = signals, store
        self._poll_s, self._deadline_s = poll_s, deadline_s
        self._team: Team | None = None
        self._ended, self._quiet = threading.Event(), threading.Event()
        self._quiet.set()
        self._pause_s = _LOOK_S if deadline_s is not None else poll_s
        self._thread = threading.Thread(target=self._look, name="ckptstore-watch", daemon=True)

    @property
    def has_deadline(self) -> bool:
        """Whether it ends a process that takes too long."""
        return self._deadline_s is not None

    def start(self, team: Team | None = None) -> None:
        """Begin, as one of several ranks where there is a ``team``."""
        self._team = team
        if team is not None:
            self._pause_s = _LOOK_S
            if not team.leads:
                self._poll_s = None
        if self._poll_s is not None or self._deadline_s is not None or team is not None:
            self._thread.start()

    def end(self) -> None:
        """Look no more. Safe to call twice; where a signal came, the deadline still holds."""
        self._poll_s = None
        team, self._team = self._team, None
        if self._signals.came is None or self._deadline_s is None:
            self._ended.set()
        if team is not None and self._thread.is_alive():
            # Whoever ends the job's process group now finds nobody talking.
            self._quiet.wait(_JOIN_S)

    def _look(self) -> None:
        # What lies there before the first look was meant for another run.
        self._requests()
        looked = time.monotonic()
        while not self._ended.wait(self._pause_s):
            self._mind_deadline()
            self._meet()
            if self._poll_s is not None and time.monotonic() - looked >= self._poll_s:
                for action in self._requests():
                    self._signals.ask(action)
                looked = time.monotonic()

    def _meet(self) -> None:
        self._quiet.clear()
        team = self._team
        if team is not None:
            self._signals.hear()
            try:
                self._pause_s = team.tick()
            except CheckpointError as error:
                # Who waits for an answer by it waits only so long.
                _log.debug("the other ranks can't be asked now: %s", error)
            if self._deadline_s is not None:
                self._pause_s = min(self._pause_s or _LOOK_S, _LOOK_S)
        self._quiet.set()

    def _requests(self) -> list[Action]:
        try:
            return self._store.requests() if self._poll_s is not None else []
        except CheckpointError as error:
            # A network that is away for a while is no reason to stop looking.
            _log.debug("requests can't be looked for now: %s", error)
            return []

    def _mind_deadline(self) -> None:
        if self._deadline_s is None:
            return
        self._signals.hear()
        if self._signals.came is not None:
            signum, at = self._signals.came
            if time.monotonic() > at + self._deadline_s:
                give_up(signum, self._deadline_s)


def give_up(signum: int, deadline_s: float) -> None:
    """End the process at once, as if it had been killed: what was saved before is there."""
    message = f"ckptstore: {name_of(signum)} came {deadline_s:g} s ago and the step isn't saved: the process ends now\n"
    os.write(2, message.encode())
    os._exit(exit_code(signum))
