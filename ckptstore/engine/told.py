"""Errors on their way from one rank to the others."""

from __future__ import annotations

from typing import Any

from ckptstore import errors
from ckptstore.errors import CheckpointError

Fields = dict[str, Any]


def error_fields(error: BaseException) -> Fields:
    """An error as plain values; the inverse of ``error_of``."""
    return {
        "kind": type(error).__name__,
        "text": str(error),
        "id": getattr(error, "id", None),
        "step": getattr(error, "step", None),
    }


def error_of(fields: Fields, fallback: type[CheckpointError], prefix: str = "") -> CheckpointError:
    """The error, of the same kind where it is one of ours, and of ``fallback`` otherwise."""
    kind = getattr(errors, str(fields["kind"]), None)
    known = isinstance(kind, type) and issubclass(kind, CheckpointError)
    made: type[CheckpointError] = kind if known else fallback  # type: ignore[assignment]
    return made(prefix + fields["text"], id=fields["id"], step=fields["step"])
