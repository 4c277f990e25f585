"""Where the training threads of all ranks meet next: their watch threads agree on it, while training goes on.

A *position* counts the boundaries of a run, completed steps and epochs together, and is the same on all ranks. One
*round* agrees on one position, by messages on a board:

1. Rank 0 begins it.
2. Each other rank sets itself a *hold* ahead: its training thread won't go past it before it knows what was agreed on.
   Then it tells where.
3. Rank 0 takes the farthest of these holds, or one of its own where it is farther itself, and tells all.

All meet at the first boundary from there on. However slow a message or a thread is, nobody has passed it: a hold is
told after it was set, and it is one that the training thread hasn't come to yet. Training threads send and read no
messages. One that comes to its hold before the answer does waits for watch threads only, and these wait for nobody's
training.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from ckptstore.engine.board import Board, get, put
from ckptstore.engine.crew import ranks_text
from ckptstore.errors import SaveFailedError

_log = logging.getLogger("ckptstore")

_NEVER = 1 << 62
_IDLE_PAUSE_S = 0.2
_MANY = 256
ROUND_PAUSE_S = 0.01
"""The same while a round runs."""
_HELD_PAUSE_S = 0.002
_PATIENCE_S = 1.0
"""After so long it is looked whether those who are missing have ended."""
_GRACE_S = 2.0
"""How much longer training threads wait than watch threads, which know who is missing."""


def idle_pause_s(size: int) -> float:
    """Between two looks at the board while nobody wants to meet: of more ranks each looks less often."""
    return _IDLE_PAUSE_S * max(1.0, size / _MANY)


class Agreement:
    """One rank's part in it.

    Args:
        board: where the ranks leave messages.
        folder: of these messages.
        position: of this rank's training thread: counted before a boundary looks here.
        ahead: how many positions ahead a hold is set: those that are passed while messages go back and forth. At
            least 1; too few only keep training waiting.
        wants: on rank 0, what to meet for, as JSON has words for it; None where there is nothing.
        told: on the others: takes what rank 0 wants, as soon as it is heard of.
        gone: why a rank has left the others, None while it hasn't.
        timeout_s: how long one rank waits for another.
        pause: lets a thread wait so many seconds.

    Attributes:
        meeting: whether all meet just now.
    """

    def __init__(
        self,
        board: Board,
        folder: str,
        *,
        position: Callable[[], int],
        ahead: Callable[[], int],
        wants: Callable[[], Any],
        told: Callable[[Any], None],
        gone: Callable[[int], str | None],
        timeout_s: float,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._board, self._folder = board, folder
        self._position, self._ahead, self._wants, self._told = position, ahead, wants, told
        self._gone, self._timeout_s, self._pause = gone, timeout_s, pause
        # All that the training thread looks at where nothing is going on.
        self._next = _NEVER
        # Whether ``_next`` is a hold; else it is what was agreed on, or never.
        self._held = False
        # Whether the training thread has yet to come to what was agreed on.
        self._ahead_of_us = False
        self._number = 1
        # Rank 0: who hasn't answered in this round; None between two rounds.
        self._missing: list[int] | None = None
        self._farthest = 0
        self._began = 0.0
        self._problem: str | None = None
        self._finished, self.meeting = False, False

    # -- the training thread -----------------------------------------------------------------------------

    def is_time(self, position: int) -> bool:
        """Whether all ranks meet at this boundary. True once for each round, and then they meet until ``end_meeting``.

        Raises:
            SaveFailedError: they can't agree: one is missing.
        """
        if position < self._next:
            return False
        self._wait(lambda: self._held)
        if self._problem is not None:
            raise SaveFailedError(self._problem)
        if position < self._next:
            return False
        # In this order: as soon as it isn't ahead any more, the watch thread may set the next hold.
        self.meeting, self._next = True, _NEVER
        self._ahead_of_us = False
        return True

    def begin_meeting(self) -> None:
        """They meet where all know it by themselves: what is wanted is minded now, and needs no round of its own."""
        self.meeting = True

    def end_meeting(self) -> None:
        """They go on."""
        self.meeting = False

    def finish(self) -> None:
        """On rank 0, before it meets the others for the last time: no further round begins, and a running one ends.

        Raises:
            SaveFailedError: it doesn't end.
        """
        self._finished = True
        self._wait(lambda: self._missing is not None)

    def _wait(self, condition: Callable[[], bool]) -> None:
        """For the watch thread, while there is no other way."""
        ends = time.monotonic() + self._timeout_s + _GRACE_S
        while condition() and self._problem is None:
            if time.monotonic() > ends:
                raise SaveFailedError(f"the ranks haven't agreed within {self._timeout_s:g} s where to meet and save")
            self._pause(_HELD_PAUSE_S)

    # -- the watch thread --------------------------------------------------------------------------------

    def tick(self) -> float:
        """Look at the board, and answer; in how many seconds to look again.

        Raises:
            StorageError: the board is gone.
        """
        if self._board.rank == 0:
            self._lead()
        else:
            self._follow()
        is_round = self._held or self._missing is not None
        return ROUND_PAUSE_S if is_round else idle_pause_s(self._board.size)

    def _lead(self) -> None:
        is_free = self._missing is None and not self._ahead_of_us and not self.meeting
        if is_free and (wanted := self._wants()) is not None:
            self._farthest, self._began = 0, time.monotonic()
            self._missing = list(range(1, self._board.size))
            # After it is set: ``finish`` either sees it, or was called before and is seen here.
            if self._finished:
                self._missing = None
                return
            put(self._board, self._key("round"), [wanted])
        if self._missing is not None:
            self._gather()

    def _gather(self) -> None:
        assert self._missing is not None
        for rank in list(self._missing):
            answer = get(self._board, self._key(f"hold/{rank}"))
            if answer is not None:
                self._farthest = max(self._farthest, answer)
                self._missing.remove(rank)
        if not self._missing:
            # The last to be set: rank 0 itself never waits here.
            hold = self._hold(self._farthest)
            put(self._board, self._key("meet"), hold)
            self._forget()
            self._agreed(hold)
            self._missing = None
        elif (problem := self._trouble(self._missing)) is not None:
            put(self._board, self._key("meet"), problem)
            self._give_up(problem)

    def _trouble(self, ranks: Sequence[int]) -> str | None:
        """Why it is no use to wait for ``ranks`` any longer, if so."""
        waited_s = time.monotonic() - self._began
        if waited_s < _PATIENCE_S:
            return None
        left = {rank: why for rank in ranks if (why := self._gone(rank)) is not None}
        for rank, why in left.items():
            return f"rank {rank} of {self._board.size} has ended: {why}"
        if waited_s < self._timeout_s:
            return None
        return f"{ranks_text(ranks)} of {self._board.size} hasn't answered for {waited_s:.0f} s where to meet and save"

    def _forget(self) -> None:
        """All have read the messages of this round but the last one, and all of the round before."""
        for what in ("round", *(f"hold/{rank}" for rank in range(1, self._board.size))):
            self._board.drop(self._key(what))
        self._board.drop(f"{self._folder}/meet/{self._number - 1}")

    def _follow(self) -> None:
        is_free = not self._held and not self._ahead_of_us
        if is_free and (wanted := get(self._board, self._key("round"))) is not None:
            self._told(wanted[0])
            self._began = time.monotonic()
            put(self._board, self._key(f"hold/{self._board.rank}"), self._hold(0))
        if self._held:
            # Before the answer is looked for: rank 0 may have given it, and ended.
            trouble = self._trouble([0])
            answer = get(self._board, self._key("meet"))
            if isinstance(answer, int):
                self._agreed(answer)
            elif (problem := answer or trouble) is not None:
                self._give_up(problem)

    def _hold(self, least: int) -> int:
        """Set one at ``least`` or later, where the training thread hasn't been yet."""
        self._held = True
        ahead = max(self._ahead(), 1)
        while True:
            hold = max(least, self._position() + ahead)
            self._next = hold
            # Whoever counts this position later than here finds the hold. Who was faster may have passed it unseen.
            if self._position() < hold:
                return hold
            ahead *= 2

    def _agreed(self, position: int) -> None:
        self._number += 1
        self._next, self._ahead_of_us = position, True
        # The last: it lets the training thread go on.
        self._held = False

    def _give_up(self, problem: str) -> None:
        _log.debug("%s", problem)
        self._problem, self._missing = problem, None
        self._next, self._held = -1, False

    def _key(self, what: str) -> str:
        head, _, tail = what.partition("/")
        return f"{self._folder}/{head}/{self._number}" + (f"/{tail}" if tail else "")
