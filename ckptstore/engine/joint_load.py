"""One load by several ranks: rank 0 says which checkpoint, all read what is theirs, and all end alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, TypeVar

from ckptstore.engine.candidates import Candidates
from ckptstore.engine.catalogue import Checkpoint
from ckptstore.engine.crew import Crew, RanksError
from ckptstore.engine.loader import LoadDraft, Loaded, Loader
from ckptstore.engine.told import Fields, error_of
from ckptstore.errors import CheckpointError, FormatError, IntegrityError, StorageError
from ckptstore.format.records import CommitRecord, validate

T = TypeVar("T")

_DAMAGE = (IntegrityError.__name__, FormatError.__name__)


class JointLoad:
    """One call of ``load`` on one rank."""

    def __init__(
        self,
        crew: Crew,
        candidates: Callable[[], Candidates],
        open_loader: Callable[[Checkpoint, bool], AbstractContextManager[Loader]],
        lies_elsewhere: Callable[[Checkpoint], bool],
    ) -> None:
        """What to load from.

        Args:
            candidates: what may be meant; called on rank 0 only.
            open_loader: of a checkpoint, and whether that lies in a backup.
            lies_elsewhere: whether it does; called on rank 0 only.
        """
        self._crew, self._candidates = crew, candidates
        self._open, self._lies_elsewhere = open_loader, lies_elsewhere
        self._skipped: dict[str, CheckpointError] = {}
        self._found: Candidates | None = None

    def run(
        self, target: object, only: Sequence[str] | None, strict: bool | Literal["parts"], *, goes_on: bool
    ) -> Loaded:
        """Load the first checkpoint that is good for all.

        Args:
            target, only, strict: as for ``View.load``.
            goes_on: with the one before, where one is damaged for any rank.

        Raises:
            CheckpointError: of the same kind on all ranks; on the one whom it befell with more in it.
        """
        while True:
            checkpoint, elsewhere = self._agree_on_one()
            try:
                with self._open(checkpoint, elsewhere) as loader:
                    return self._load(loader, checkpoint, target, only, strict)
            except _DamagedError as damaged:
                if not goes_on:
                    raise damaged.error from damaged
                self._skipped[checkpoint.id] = damaged.error
                if self._found is not None:
                    self._found.give_up(checkpoint, damaged.error)

    def _agree_on_one(self) -> tuple[Checkpoint, bool]:
        def decide(_: list[Any]) -> Any:
            self._found = self._found or self._candidates()
            checkpoint = next(iter(self._found), None)
            if checkpoint is None:
                raise self._found.none_left()
            return {"record": checkpoint.record.model_dump(), "elsewhere": self._lies_elsewhere(checkpoint)}

        answer = self._exchange("a load", None, decide)
        record = validate(CommitRecord, answer["record"], "the record that rank 0 has told")
        return Checkpoint.of(record), bool(answer["elsewhere"])

    def _load(
        self,
        loader: Loader,
        checkpoint: Checkpoint,
        target: object,
        only: Sequence[str] | None,
        strict: bool | Literal["parts"],
    ) -> Loaded:
        draft, error = _tried(lambda: loader.draft(checkpoint, target, only, strict))
        self._settle_unexpected(draft, error)
        assert draft is not None
        restoration, error = _tried(draft.fit.close)
        self._exchange("the judgement of a load", None, lambda _: None, error)
        assert restoration is not None
        skipped = self._found.skipped if self._found is not None else self._skipped
        loaded, error = _tried(lambda: loader.fill(draft, restoration, skipped))
        self._exchange("the end of a load", None, lambda _: None, error)
        assert loaded is not None
        return loaded

    def _settle_unexpected(self, draft: LoadDraft | None, error: CheckpointError | None) -> None:
        """What one rank doesn't expect may be another's: unexpected is only what nobody takes."""
        names = sorted(draft.fit.report.unexpected) if draft is not None else []
        common = self._exchange("the plan of a load", names, _in_all, error)
        if draft is not None and draft.fit.union:
            draft.fit.report.unexpected = [name for name in names if name in common]

    def _exchange(
        self, what: str, message: Any, decide: Callable[[list[Any]], Any], error: CheckpointError | None = None
    ) -> Any:
        try:
            return self._crew.exchange(what, message, decide, error=error)
        except RanksError as told:
            own = error or told.as_error(StorageError)
            fields: Fields | None = told.fields
            if fields is not None and fields["kind"] in _DAMAGE:
                # For all ranks alike, whatever else may be wrong on some.
                raise _DamagedError(own if error is not None else error_of(fields, IntegrityError)) from told
            raise own from told


class _DamagedError(Exception):
    def __init__(self, error: CheckpointError) -> None:
        super().__init__(str(error))
        self.error = error


def _in_all(messages: list[list[str]]) -> list[str]:
    return sorted(set(messages[0]).intersection(*messages[1:]))


def _tried(work: Callable[[], T]) -> tuple[T | None, CheckpointError | None]:
    """What ``work`` gives, or its error."""
    try:
        return work(), None
    except CheckpointError as error:
        return None, error
