"""The ranks of one run: rank 0 leads. Where they meet, it says what to do, and the others do it."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, TypeAlias

from ckptstore.engine.board import CALLER_PAUSE_S, FIRST_PAUSE_S
from ckptstore.engine.crew import Crew
from ckptstore.engine.told import error_fields, error_of
from ckptstore.errors import CheckpointError, SaveFailedError, StorageError
from ckptstore.trainer.agreement import Agreement

_log = logging.getLogger("ckptstore")

Said: TypeAlias = dict[str, Any]

ASKS = ("save", "stop", "diverged")
"""What any rank may ask for; of several that ask for the same, one is enough."""
READ_EVERY = 64
"""After so many messages of rank 0 the others tell how many they have read, so that those can be forgotten."""


class Team:
    """One rank's view of it.

    Args:
        crew: the ranks of the store.
        position, ahead, wants, told: as for ``Agreement``.
        asks: on the other ranks: what this rank wants of all, by kind, each once. Called in the watch thread.
        heed: on rank 0: takes what another rank wants. The same.

    Attributes:
        agreement: on where all meet.
    """

    def __init__(
        self,
        crew: Crew,
        *,
        position: Callable[[], int],
        ahead: Callable[[], int],
        wants: Callable[[], Any],
        told: Callable[[Any], None],
        asks: Callable[[], Iterable[tuple[str, str]]],
        heed: Callable[[str, str], None],
    ) -> None:
        self.rank, self.size, self.leads = crew.rank, crew.size, crew.leads
        self._board, self._folder, self._timeout_s = crew.board, crew.name(), crew.timeout_s
        self._asks, self._heed = asks, heed
        # Messages of rank 0 so far, and how many of them are forgotten.
        self._count, self._forgotten = 0, 0
        self._signs = 0
        self.agreement = Agreement(
            crew.board,
            self._folder,
            position=position,
            ahead=ahead,
            wants=wants,
            told=told,
            gone=self.gone,
            timeout_s=crew.timeout_s,
        )

    # -- the training thread -----------------------------------------------------------------------------

    def say(self, what: str, **more: Any) -> None:
        """On rank 0: what all do next.

        Raises:
            StorageError: the board is gone.
        """
        self._count += 1
        # Not as strictly as what is stored: metrics may be nan.
        self._board.put(self._said(self._count), json.dumps({"what": what, **more}).encode())
        if self._count % READ_EVERY == 0:
            self._forget()

    def hear(self) -> Said:
        """On the others: what rank 0 says next. However long it does something for all: it is waited for.

        Raises:
            SaveFailedError: it says nothing, and isn't there.
            StorageError: the board is gone.
        """
        self._count += 1
        key, pause_s = self._said(self._count), FIRST_PAUSE_S
        ends, sign = time.monotonic() + self._timeout_s, self._sign()
        while (data := self._board.get(key)) is None:
            if pause_s >= CALLER_PAUSE_S and sign != (sign := self._sign()):
                ends = time.monotonic() + self._timeout_s
            if time.monotonic() > ends:
                raise SaveFailedError(
                    f"rank {self.rank} waits for rank 0, which hasn't come for {self._timeout_s:g} s: every rank must "
                    "call step(), report(), save() and the end alike; rank_timeout= of the store is how long they wait"
                )
            if pause_s >= CALLER_PAUSE_S and (why := self.gone(0)) is not None and self._board.get(key) is None:
                raise SaveFailedError(f"rank 0 has ended: {why}")
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, CALLER_PAUSE_S)
        if self._count % READ_EVERY == 0:
            self._board.put(f"{self._folder}/read/{self.rank}", str(self._count).encode())
        said: Said = json.loads(data)
        return said

    def leave(self, error: BaseException) -> None:
        """This rank ends before the others do, which shall not wait for it."""
        with suppress(StorageError):
            self._board.put(f"{self._folder}/gone/{self.rank}", f"{type(error).__name__}: {error}".encode())

    def gone(self, rank: int) -> str | None:
        """Why a rank has left, None where it hasn't."""
        data = self._board.get(f"{self._folder}/gone/{rank}")
        return None if data is None else data.decode()

    def _sign(self) -> bytes | None:
        """Another one each time that rank 0 is seen at a meeting."""
        return self._board.get(f"{self._folder}/alive")

    def _forget(self) -> None:
        """Drop what all have read."""
        counts = [self._board.get(f"{self._folder}/read/{rank}") for rank in range(1, self.size)]
        read = min(int(count or 0) for count in counts)
        for number in range(self._forgotten + 1, read + 1):
            self._board.drop(self._said(number))
        self._forgotten = max(read, self._forgotten)

    def _said(self, number: int) -> str:
        return f"{self._folder}/said/{number}"

    # -- the watch thread --------------------------------------------------------------------------------

    def tick(self) -> float:
        """Pass on what is wanted, and agree on where to meet; in how many seconds to come again.

        Raises:
            StorageError: the board is gone.
        """
        if self.leads:
            if self.agreement.meeting:
                self._signs += 1
                self._board.put(f"{self._folder}/alive", str(self._signs).encode())
            for kind in ASKS:
                key = f"{self._folder}/ask/{kind}"
                if (text := self._board.get(key)) is not None:
                    # First: who asks after this gets a meeting after this.
                    self._board.drop(key)
                    self._heed(kind, text.decode())
        else:
            for kind, what in self._asks():
                self._board.put(f"{self._folder}/ask/{kind}", what.encode())
        return self.agreement.tick()


def told_of(error: BaseException) -> Said:
    """An error of rank 0's that ends the run for all; the inverse of ``raised``."""
    if isinstance(error, SystemExit):
        return {"what": "exit", "code": error.code if isinstance(error.code, int) else 1}
    return {"what": "raise", "error": error_fields(error), "ours": isinstance(error, CheckpointError)}


def raised(said: Said) -> BaseException:
    """What the others raise for it."""
    if said["what"] == "exit":
        return SystemExit(said["code"])
    prefix = "" if said["ours"] else f"rank 0 has ended: {said['error']['kind']}: "
    return error_of(said["error"], SaveFailedError, prefix)
