"""A command as the test of ``bisect``: run on an export of one checkpoint after the other."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TypeAlias

import ckptstore
from ckptstore.engine.catalogue import Checkpoint
from ckptstore.errors import CheckpointError, FormatError, IntegrityError
from ckptstore.view import View

Format: TypeAlias = Literal["torch", "safetensors", "hf", "dcp"]
SKIP = 125
"""The exit code of a command that can't test a checkpoint."""
_HIGHEST = 127
# Where the command's own output goes: the answer has stdout for itself.
_STDERR = 2
_FIELD = re.compile(r"\{(path|id|step|url)\}")
_NAMES = {"torch": "checkpoint.pt", "safetensors": "checkpoint.safetensors"}


class CommandTest:
    """Runs ``command`` for a checkpoint: 0 is good, 125 skips it, every other code up to 127 is bad.

    ``{path}`` in it stands for an export of the checkpoint, which is removed afterwards, ``{id}``, ``{step}`` and
    ``{url}`` for what they say. No shell is involved.

    Args:
        to, only: as ``export``; nothing is exported where ``command`` has no ``{path}``.
        folder: where exports lie meanwhile; the system's folder for temporary files by default.
    """

    def __init__(
        self, store: View, command: Sequence[str], *, to: Format = "torch", only: Sequence[str] = (), folder: str | None
    ) -> None:
        if not command:
            raise FormatError("bisect needs a command to test with, as: -- python evaluate.py {path}")
        self._store, self._command, self._to, self._only = store, command, to, list(only)
        self._folder = folder
        self._exports = any("{path}" in word for word in command)

    def __call__(self, checkpoint: Checkpoint) -> bool | None:
        """Whether the command finds the checkpoint good; None where it says that it can't tell.

        Raises:
            IntegrityError: it is damaged.
            CheckpointError: the command can't be run, or a signal ended it.
        """
        fields = {"id": checkpoint.id, "step": str(checkpoint.step), "url": self._store.url}
        if not self._exports:
            good = self._run(checkpoint, fields)
            if good is False:
                # The command may have failed for no other reason.
                self._require_whole(checkpoint)
            return good
        with _folder(self._folder) as folder:
            path = folder / _NAMES.get(self._to, "checkpoint")
            ckptstore.export(self._store, checkpoint.id, path, to=self._to, only=self._only or None)
            return self._run(checkpoint, {**fields, "path": str(path)})

    def _run(self, checkpoint: Checkpoint, fields: Mapping[str, str]) -> bool | None:
        words = [_FIELD.sub(lambda match: fields[match[1]], word) for word in self._command]
        try:
            code = subprocess.call(words, stdout=_STDERR)  # noqa: S603 - what the user gave to be run
        except OSError as error:
            raise FormatError(f"{words[0]} can't be run: {error.strerror or error}") from error
        if not 0 <= code <= _HIGHEST:
            how = f"signal {-code} ended it" if code < 0 else f"its exit code was {code}"
            raise CheckpointError(
                f"{words[0]} broke off on {checkpoint.id} (step {checkpoint.step}): {how}, which says neither good nor "
                "bad",
                id=checkpoint.id,
                step=checkpoint.step,
            )
        return None if code == SKIP else code == 0

    def _require_whole(self, checkpoint: Checkpoint) -> None:
        for damage in self._store.verify(checkpoint.id).damages:
            raise IntegrityError(damage.problem, id=checkpoint.id, step=checkpoint.step, key=damage.key)


@contextmanager
def _folder(parent: str | None) -> Iterator[Path]:
    """A folder for one export, removed at the end whatever ends it."""
    try:
        made = tempfile.TemporaryDirectory(prefix="ckptstore-bisect-", dir=parent)
    except OSError as error:
        raise FormatError(f"{parent or 'the system'} has no room for exports: {error.strerror or error}") from error
    with made as folder:
        yield Path(folder)
