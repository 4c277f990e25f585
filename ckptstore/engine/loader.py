"""One load: from a commit record to live objects, torch imported only here and now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ckptstore.engine.buffers import BufferPool
from ckptstore.engine.catalogue import Checkpoint
from ckptstore.engine.collector import collector_paused
from ckptstore.engine.compare import Suspect, mark_differing
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
        missing: names the target has and the checkpoint lacks (only with ``strict=False`` or ``"parts"``).
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
        strict: bool | Literal["parts"],
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

    def differing(self, checkpoint: Checkpoint, state: object, only: Sequence[str] | None) -> list[str]:
        """The names of all in ``state`` that is not what the checkpoint holds."""
        from ckptstore.state.capture import capture
        from ckptstore.state.compare import compare_trees

        with collector_paused():
            contents = read_contents(self.storage, checkpoint.record, self.rescue)
            findings = compare_trees(_tree(contents), _specs(contents), capture(state), only=only)
            suspects = [Suspect(f.saved, f.live) if f.live is not None else None for f in findings]
        mark_differing(
            self.storage,
            contents,
            [suspect for suspect in suspects if suspect is not None],
            pool=self.pool,
            threads=self.threads,
            rescue=self.rescue,
        )
        # A name may stand for several: those of a generator's state.
        names = {f.name: None for f, s in zip(findings, suspects, strict=True) if s is None or s.differs}
        return list(names)

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
