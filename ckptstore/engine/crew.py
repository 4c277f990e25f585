"""The ranks that save and load together: one question at a time is put to rank 0, and all get its answer."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ckptstore.engine import board as boards
from ckptstore.engine.board import BEHIND_PAUSE_S, CALLER_PAUSE_S, Board
from ckptstore.engine.greeting import AbsentError, greet
from ckptstore.engine.told import Fields, error_fields, error_of
from ckptstore.errors import CheckpointError, StorageError

GRACE_S = 2.0
"""How much longer the others wait for rank 0 than it waits for them, so that it is rank 0 who tells what is wrong."""

_numbers = itertools.count()


class RanksError(Exception):
    """The ranks don't get on: one is missing, has failed, or does something else. Says which.

    Attributes:
        ranks: that are to blame.
        fields: of the error of one of them, as ``told.error_fields`` gives them; None where it is another matter.
    """

    def __init__(self, message: str, ranks: Iterable[int] = (), fields: Fields | None = None) -> None:
        super().__init__(message)
        self.ranks, self.fields = sorted(ranks), fields

    def as_error(self, fallback: type[CheckpointError], text: str | None = None) -> CheckpointError:
        """The error to raise for it: of the kind that was told, or ``fallback`` with ``text``."""
        if self.fields is not None:
            return error_of(self.fields, fallback, f"{ranks_text(self.ranks)}: ")
        return fallback(text or str(self))


class Each(list[Any]):
    """An answer for each rank."""


class Crew:
    """One rank of the group that uses one store.

    Attributes:
        rank, size: of this process, and how many there are.
        timeout_s: how long one waits for another.
    """

    def __init__(self, board: Board, *, timeout_s: float, folder: str | None = None) -> None:
        """``folder`` tells this crew's messages from others' on the board; by default crews are numbered."""
        self.board = board
        self.rank, self.size = board.rank, board.size
        self.timeout_s = timeout_s
        self._number: int | None = None
        self._folder = folder
        self._turn = 0
        # Messages that everybody has read by the time that the next exchange, or the next outcome, is complete.
        self._asked: list[str] = []
        self._reported: list[str] = []

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, who decides."""
        return self.rank == 0

    def name(self, what: str = "a start") -> str:
        """Unique for ``what`` begins; the same on all ranks, as they all begin it in the same order.

        Raises:
            RanksError: the ranks have yet to greet each other, and one hasn't come.
            StorageError: whoever keeps the messages is gone.
        """
        if self._folder is None:
            self._folder = self._greet(what)
        self._turn += 1
        return f"{self._folder}/{self._turn}"

    def _greet(self, what: str) -> str:
        if self._number is None:
            # Not before: a rank may look at stores by itself.
            self._number = next(_numbers)
        try:
            return greet(self.board, f"ckptstore/{self._number}", self.timeout_s, self._longer_s)
        except AbsentError as error:
            raise self._absent(error.ranks, what) from error

    @property
    def _longer_s(self) -> float:
        """Twice: the others may have come later than this one, and rank 0 waits for them from when it came itself."""
        return 2 * self.timeout_s + GRACE_S

    def _absent(self, ranks: Sequence[int], what: str) -> RanksError:
        if not self.leads:
            return RanksError(f"rank 0 hasn't come to {what} within {self._longer_s:g} s", [0])
        return RanksError(
            f"{ranks_text(ranks)} of {self.size} hasn't come to {what} within {self.timeout_s:g} s: every rank must "
            "call it, or open the store with ranks='one' where only one saves",
            ranks,
        )

    def exchange(
        self,
        what: str,
        message: Any,
        decide: Callable[[list[Any]], Any],
        *,
        error: CheckpointError | None = None,
    ) -> Any:
        """Put ``message`` to rank 0, who decides on those of all ranks; what it answers. Every rank must call it.

        Args:
            what: is done here, for people; all must do the same.
            message, and what ``decide`` gives: plain values that JSON has words for.
            decide: on rank 0: one answer for all, or ``Each`` of them.
            error: instead of a message: what keeps this rank from it, of which all are told.

        Raises:
            RanksError: on all ranks: one hasn't come in time, does something else or has an error, or ``decide`` has
                raised one. Or whoever keeps the messages is gone.
        """
        try:
            return self._exchange(what, message, decide, error)
        except StorageError as gone:
            raise RanksError(f"at {what}: {gone}", [0]) from gone

    def _exchange(
        self, what: str, message: Any, decide: Callable[[list[Any]], Any], error: CheckpointError | None
    ) -> Any:
        name = self.name(what)
        failed = error_fields(error) if error is not None else None
        boards.put(self.board, f"{name}/ask/{self.rank}", [what, message, failed])
        if self.leads:
            return self._lead(name, what, decide)
        key = f"{name}/answer/{self.rank}"
        found = boards.wait_for(self.board, [key], self._longer_s, longest_pause_s=CALLER_PAUSE_S)
        if key not in found:
            raise self._absent([0], what)
        return _answer(found[key])

    def _lead(self, name: str, what: str, decide: Callable[[list[Any]], Any]) -> Any:
        try:
            answer = decide(self._messages(name, what))
            each = list(answer) if isinstance(answer, Each) else [answer] * self.size
            self._answer_all(name, [{"answer": one} for one in each])
        except RanksError as error:
            self._tell_error(name, error)
            raise
        except CheckpointError as error:
            told = RanksError(str(error), [0], error_fields(error))
            self._tell_error(name, told)
            raise told from error
        except BaseException as error:
            self._tell_error(name, RanksError(f"rank 0 has failed: {error!r}", [0]))
            raise
        self._drop(self._asked)
        self._asked = [f"{name}/{kind}/{rank}" for rank in range(self.size) for kind in ("ask", "answer")]
        return each[0]

    def _messages(self, name: str, what: str) -> list[Any]:
        keys = [f"{name}/ask/{rank}" for rank in range(self.size)]
        found = boards.wait_for(self.board, keys, self.timeout_s, longest_pause_s=CALLER_PAUSE_S)
        if missing := [rank for rank, key in enumerate(keys) if key not in found]:
            raise self._absent(missing, what)
        if other := [rank for rank, key in enumerate(keys) if found[key][0] != what]:
            does = found[keys[other[0]]][0]
            raise RanksError(f"{ranks_text(other)} is at {does}, rank 0 at {what}: all must do the same", other)
        failed = {rank: found[key][2] for rank, key in enumerate(keys) if found[key][2] is not None}
        for rank, fields in failed.items():
            raise RanksError(f"{ranks_text([rank])}: {fields['text']}", [rank], fields)
        return [found[key][1] for key in keys]

    def _tell_error(self, name: str, error: RanksError) -> None:
        message = {"error": str(error), "ranks": error.ranks, "fields": error.fields}
        self._answer_all(name, [message] * self.size)

    def _answer_all(self, name: str, answers: Sequence[Any]) -> None:
        for rank, answer in enumerate(answers):
            if rank:
                boards.put(self.board, f"{name}/answer/{rank}", answer)

    def _drop(self, keys: Sequence[str]) -> None:
        for key in keys:
            self.board.drop(key)

    # -- in the background: reports of what each has done, and what came of it ---------------------------

    def report(self, name: str, message: Any) -> None:
        """Tell rank 0 what this rank has done of ``name``."""
        boards.put(self.board, f"{name}/done/{self.rank}", message)

    def reports(self, name: str, *, bad: Callable[[Any], bool]) -> dict[int, Any]:
        """What the ranks reported by the deadline; all of them, unless a ``bad`` one makes the others needless."""
        keys = {f"{name}/done/{rank}": rank for rank in range(self.size)}
        found = boards.wait_for(self.board, keys, self.timeout_s, longest_pause_s=BEHIND_PAUSE_S, enough=bad)
        return {keys[key]: message for key, message in found.items()}

    def announce(self, name: str, outcome: Any) -> None:
        """Tell all what came of ``name``."""
        boards.put(self.board, f"{name}/outcome", outcome)
        self._drop(self._reported)
        self._reported = [f"{name}/outcome", *(f"{name}/done/{rank}" for rank in range(self.size))]

    def outcome(self, name: str) -> Any:
        """What rank 0 has announced; None where it hasn't by the deadline, or is gone."""
        key = f"{name}/outcome"
        try:
            found = boards.wait_for(self.board, [key], self.timeout_s + GRACE_S, longest_pause_s=BEHIND_PAUSE_S)
        except StorageError:
            return None
        return found.get(key)


def find_crew(timeout_s: float) -> Crew | None:
    """The crew of this job's ranks under ``torch.distributed``; None for a process that works by itself."""
    if "torch.distributed" not in sys.modules:
        # Listing and verifying do without torch.
        return None
    from ckptstore.state.peers import peers

    others = peers()
    return Crew(others, timeout_s=timeout_s) if others is not None else None


def ranks_text(ranks: Sequence[int]) -> str:
    """Ranks for people."""
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"


def _answer(message: Any) -> Any:
    if "error" in message:
        raise RanksError(message["error"], message["ranks"], message["fields"])
    return message["answer"]
