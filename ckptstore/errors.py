"""Every error that ckptstore raises, grouped by what the caller does next.

::

    CheckpointError                  .code, .id / .step / .key where known
    ├── NotFoundError    (+FileNotFoundError)   no such checkpoint, hold or store
    │   └── NoCheckpointError                   the store is reachable and empty: a fresh start is right
    ├── ExistsError      (+FileExistsError)     the name is taken, or the checkpoint is held
    ├── StaleWriterError                        a newer run owns the store: stop saving here
    ├── StateError       (+TypeError)           the value at .path can't be stored, or doesn't fit the target
    ├── FormatError      (+ValueError)          newer format, unknown codec, malformed or hostile record
    ├── IntegrityError                          bytes differ: .key .block .expected .actual
    ├── SaveFailedError                         certainly not committed: save again
    ├── CommitUnknownError                      may or may not exist: store.resolve(id) settles it
    ├── DivergedError                           training went astray: go on from .id, before it did
    └── StorageError     (+OSError)             the backend failed: .transient, .outcome
        ├── StorageFullError                    no space left
        └── UnavailableError                    can't be reached now: retry later

Codes are append-only. Messages name the thing, the cause and the way out.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

__all__ = [
    "CheckpointError",
    "CommitUnknownError",
    "DivergedError",
    "ExistsError",
    "FormatError",
    "IntegrityError",
    "NoCheckpointError",
    "NotFoundError",
    "SaveFailedError",
    "StaleWriterError",
    "StateError",
    "StorageError",
    "StorageFullError",
    "UnavailableError",
]


def _rebuild(cls: type[CheckpointError], message: str, fields: dict[str, Any]) -> CheckpointError:
    return cls(message, **fields)


class CheckpointError(Exception):
    """Base of all errors here.

    Attributes:
        code: stable name of the kind of error, for logs and scripts.
        id: the checkpoint concerned, where known.
        step: its step, where known.
        key: the object on storage concerned, where known.
    """

    code: ClassVar[str] = "checkpoint"
    _fields: ClassVar[tuple[str, ...]] = ("id", "step", "key")

    def __init__(
        self,
        message: str,
        *,
        id: str | None = None,
        step: int | None = None,
        key: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.id = id
        self.step = step
        self.key = key

    def __str__(self) -> str:
        # OSError would print its own arguments where it is a parent.
        return self.message

    def __reduce__(self) -> tuple[Any, ...]:
        fields = {name: getattr(self, name) for name in self._fields}
        return _rebuild, (type(self), self.message, fields)


class NotFoundError(CheckpointError, FileNotFoundError):
    """No such checkpoint, hold, object or store."""

    code = "not_found"


class NoCheckpointError(NotFoundError):
    """The store answers and holds no checkpoint. The only error after which a fresh start is right."""

    code = "no_checkpoint"


class ExistsError(CheckpointError, FileExistsError):
    """The name is taken, or a hold stands in the way."""

    code = "exists"


class StaleWriterError(CheckpointError):
    """A newer run has opened the store for writing; nothing this one saves could become ``latest``."""

    code = "stale_writer"


class StateError(CheckpointError, TypeError):
    """A value can't be stored without pickle, or what was stored doesn't fit the target.

    Attributes:
        path: where in the state, as ``model/layers.0.weight``.
    """

    code = "state"
    _fields = (*CheckpointError._fields, "path")

    def __init__(self, message: str, *, path: str | None = None, **fields: Any) -> None:
        super().__init__(message, **fields)
        self.path = path


class FormatError(CheckpointError, ValueError):
    """The record is of a newer format, malformed, over a limit, or hostile."""

    code = "format"


class IntegrityError(CheckpointError):
    """The bytes are not those that were saved.

    Attributes:
        block: number of the damaged block in the file, where known.
        expected: what the record says (digest or size).
        actual: what was read.
    """

    code = "integrity"
    _fields = (*CheckpointError._fields, "block", "expected", "actual")

    def __init__(
        self,
        message: str,
        *,
        block: int | None = None,
        expected: str | int | None = None,
        actual: str | int | None = None,
        **fields: Any,
    ) -> None:
        super().__init__(message, **fields)
        self.block = block
        self.expected = expected
        self.actual = actual


class SaveFailedError(CheckpointError):
    """The checkpoint was certainly not committed and never will be; ``__cause__`` says why."""

    code = "save_failed"


class CommitUnknownError(CheckpointError):
    """The commit may or may not have taken effect; nothing was deleted. ``store.resolve(id)`` settles it."""

    code = "commit_unknown"


class DivergedError(CheckpointError):
    """Training has gone astray. ``id`` and ``step`` are the last good checkpoint's, where there is one."""

    code = "diverged"


class StorageError(CheckpointError, OSError):
    """The backend failed.

    Attributes:
        transient: True where the same call may succeed later.
        outcome: for a failed write, "failed" (certainly no effect) or "unknown" (may have taken effect).
    """

    code = "storage"
    _fields = (*CheckpointError._fields, "transient", "outcome")

    def __init__(
        self,
        message: str,
        *,
        transient: bool = False,
        outcome: Literal["failed", "unknown"] = "failed",
        **fields: Any,
    ) -> None:
        super().__init__(message, **fields)
        self.transient = transient
        self.outcome = outcome


class StorageFullError(StorageError):
    """No space (or quota, or inodes) left on the storage."""

    code = "storage_full"


class UnavailableError(StorageError):
    """The storage can't be reached now. Never taken for "empty"."""

    code = "unavailable"

    def __init__(self, message: str, *, transient: bool = True, **fields: Any) -> None:
        super().__init__(message, transient=transient, **fields)
