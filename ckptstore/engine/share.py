"""What one rank knows of a save that several have agreed upon, and how its end is told."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from ckptstore.engine.crew import Crew
from ckptstore.engine.told import error_fields, error_of
from ckptstore.errors import SaveFailedError, StorageError
from ckptstore.format.layout import CheckpointId
from ckptstore.format.records import CommitRecord, StoreRecord, validate


@dataclass(frozen=True)
class Share:
    """What one rank knows of a save that all have agreed upon.

    Attributes:
        name: of the messages about it.
        latest: the checkpoint from which something may be borrowed; only at the first save of a run.
        plan: digest of what was agreed.
        tensors, parameters: of the state, in all.
    """

    crew: Crew
    name: str
    id: CheckpointId
    store: StoreRecord
    latest: str | None
    plan: str
    tensors: int
    parameters: int
    _reported: list[bool] = field(default_factory=list, compare=False, repr=False)

    @property
    def label(self) -> str:
        """What tells this rank's files from the others'."""
        return f"-r{self.crew.rank:05d}"

    def announce(self, error: BaseException | None, record: CommitRecord | None) -> None:
        """On rank 0: tell the others how it ended."""
        outcome = {
            "record": record.model_dump() if record is not None else None,
            "error": error_fields(error) if error is not None else None,
        }
        with suppress(StorageError):
            self.crew.announce(self.name, outcome)

    def report(self, message: dict[str, Any]) -> None:
        """Tell rank 0 what this rank has written, or why it hasn't; once."""
        if self._reported:
            return
        self._reported.append(True)
        # Where nobody takes reports any more, rank 0 is gone: then the register decides.
        with suppress(StorageError):
            self.crew.report(self.name, message)


def told_outcome(outcome: dict[str, Any], id: CheckpointId) -> CommitRecord:
    """What rank 0 has told: the record of the checkpoint, or its error."""
    if outcome["error"] is not None:
        raise error_of(outcome["error"], SaveFailedError)
    return validate(CommitRecord, outcome["record"], f"the record of {id} that rank 0 has told")
