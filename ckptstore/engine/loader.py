"""One load: from a commit record to live objects, torch imported only here and now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ckptstore.engine.buffers import BufferPool
from ckptstore.engine.catalogue import Checkpoint
from ckptstore.engine.collector import collector_paused
from ckptstore.engine.reader import Contents, Rescue, read_contents, read_tensors
from ckptstore.engine.workers import Progress
from ckptstore.errors import CheckpointError, FormatError
from ckptstore.storage.base import Storage

if TYPE_CHECKING:
    from ckptstore.state.restore import Restoration
    from ckptstore.state.tensors import TensorSpec


@dataclass(frozen=True)
class Loaded:
    """What ``load(into=…)`` did.

    Attributes:
        checkpoint: the one that was loaded.
        skipped: newer checkpoints that were damaged, with the error of each.
        missing: names the target has and the checkpoint lacks (only with ``strict=False``).
        unexpected: names the checkpoint has and the target lacks.
        mismatched: names whose shapes differ; left as they were.
        cast: names that were converted to the target's dtype.
    """

    checkpoint: Checkpoint
    skipped: Mapping[str, CheckpointError]
    missing: Sequence[str]
    unexpected: Sequence[str]
    mismatched: Sequence[str]
    cast: Sequence[str]


@dataclass(frozen=True)
class Loader:
    """Loads from one storage, and from where ``rescue`` knows what is damaged there."""

    storage: Storage
    pool: BufferPool
    threads: int
    progress: Progress | None
    rescue: Rescue | None = None

    def plain(self, checkpoint: Checkpoint, only: Sequence[str] | None) -> Any:
        """The state as plain data."""
        from ckptstore.state.restore import restore_plain

        with collector_paused():
            contents = read_contents(self.storage, checkpoint.record, self.rescue)
            restoration = restore_plain(_tree(contents), _specs(contents), only=only)
        return self._fill(contents, restoration)

    def into(
        self,
        checkpoint: Checkpoint,
        target: object,
        only: Sequence[str] | None,
        strict: bool,
        skipped: Mapping[str, CheckpointError],
    ) -> Loaded:
        """Restore ``target`` in place. Its fit is checked before anything in it changes."""
        from ckptstore.state.restore import restore_into

        with collector_paused():
            contents = read_contents(self.storage, checkpoint.record, self.rescue)
            restoration = restore_into(_tree(contents), _specs(contents), target, only=only, strict=strict)
        self._fill(contents, restoration)
        found = restoration.report
        return Loaded(checkpoint, skipped, found.missing, found.unexpected, found.mismatched, found.cast)

    def _fill(self, contents: Contents, restoration: Restoration) -> Any:
        read_tensors(
            self.storage,
            contents,
            restoration.wanted,
            pool=self.pool,
            threads=self.threads,
            progress=self.progress,
            rescue=self.rescue,
        )
        with collector_paused():
            return restoration.finish()


def _tree(contents: Contents) -> Any:
    if len(contents.parts) != 1:
        raise FormatError(
            f"{contents.commit.id} was written by {len(contents.parts)} ranks; this version loads those of one rank",
            id=contents.commit.id,
        )
    return contents.parts[0].tree


def _specs(contents: Contents) -> list[TensorSpec]:
    from ckptstore.state.tensors import TensorSpec

    return [TensorSpec(name, t.dtype, tuple(t.shape), t.logical) for name, t in contents.tensors.items()]
