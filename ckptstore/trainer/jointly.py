"""What all ranks of a job do at the same time, well or not at all; of one process, just that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from ckptstore.engine.crew import Crew, RanksError
from ckptstore.errors import CheckpointError, StateError

T = TypeVar("T")


class Jointly:
    """The ranks of ``crew``, or one process by itself where there is none."""

    def __init__(self, crew: Crew | None) -> None:
        self._crew = crew

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return self._crew is None or self._crew.leads

    def do(self, what: str, work: Callable[[], T]) -> T:
        """What ``work`` gives on this rank, once it is done on all.

        Raises:
            CheckpointError: it has failed somewhere; here the error of this rank, if there is one.
        """
        if self._crew is None:
            return work()
        result: list[T] = []
        failed: Exception | None = None
        try:
            result.append(work())
        except Exception as error:
            failed = error
        try:
            self._crew.exchange(what, None, lambda _: None, error=_as_ours(failed))
        except RanksError as error:
            raise (failed or error.as_error(StateError)) from error
        return result[0]

    def lead(self, what: str, work: Callable[[], T]) -> T:
        """What ``work`` gives on rank 0, to all.

        Args:
            work: gives what JSON has words for.

        Raises:
            CheckpointError: it has failed.
        """
        if self._crew is None:
            return work()
        try:
            answer: dict[str, Any] = self._crew.exchange(what, None, lambda _: {"is": work()})
        except RanksError as error:
            raise error.as_error(StateError) from error
        found: T = answer["is"]
        return found


def _as_ours(error: Exception | None) -> CheckpointError | None:
    if error is None or isinstance(error, CheckpointError):
        return error
    return StateError(f"{type(error).__name__}: {error}")
