"""One load: from a commit record to live objects, torch imported only here and now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ckptstore.engine.buffers import BufferPool
from ckptstore.engine.catalogue import Checkpoint
from ckptstore.engine.collector import collector_paused
from ckptstore.engine.compare import Suspect, mark_differing
from ckptstore.engine.contents import Contents, Rescue, read_contents
from ckptstore.engine.reader import read_tensors
from ckptstore.engine.tensorreader import BlockCache, TensorReader
from ckptstore.engine.workers import Progress
from ckptstore.errors import CheckpointError, FormatError, NotFoundError, StateError
from ckptstore.format.regions import Region
from ckptstore.storage.base import Storage

if TYPE_CHECKING:
    from ckptstore.state.restore import Draft, Restoration
    from ckptstore.state.tensors import TensorSpec


_FEW_RANKS = 2
"""Of so few the parts are read at once."""


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
    """Loads from one storage, and from where ``rescue`` knows what is damaged there, as one of ``size`` ranks."""

    storage: Storage
    pool: BufferPool
    threads: int
    progress: Progress | None
    rescue: Rescue | None = None
    rank: int = 0
    size: int = 1

    def plain(self, checkpoint: Checkpoint, only: Sequence[str] | None, rank: int | None = None) -> Any:
        """The state as plain data: what ``rank`` had, or what all had together."""
        from ckptstore.state.restore import restore_plain

        with collector_paused():
            contents = read_contents(self.storage, checkpoint.record, self.rescue)
            tree = _union(contents, 0) if rank is None else _tree_of(contents, rank)
            restoration = restore_plain(tree, _specs(contents), only=only)
        return self._fill(contents, restoration)

    def reader(self, checkpoint: Checkpoint, cache: BlockCache) -> TensorReader:
        """A reader of any bytes of its tensors."""
        with collector_paused():
            contents = read_contents(self.storage, checkpoint.record, self.rescue)
            return TensorReader(self.storage, contents, _union(contents, 0), cache, self.rescue)

    def draft(
        self, checkpoint: Checkpoint, target: object, only: Sequence[str] | None, strict: bool | Literal["parts"]
    ) -> LoadDraft:
        """What there is to do to restore ``target`` in place; nothing in it changes yet."""
        with collector_paused():
            near = self._near(checkpoint, target, only, strict)
            if near is not None:
                return near
            contents = read_contents(self.storage, checkpoint.record, self.rescue)
            return LoadDraft(self, checkpoint, contents, self._fit(contents, target, only, strict))

    def _near(
        self, checkpoint: Checkpoint, target: object, only: Sequence[str] | None, strict: bool | Literal["parts"]
    ) -> LoadDraft | None:
        """What is to be done where this rank's own part and the first one have all of it; None where they haven't.

        Or there would be as many readings of parts as the square of the number of ranks.
        """
        from ckptstore.state.restore import Draft

        if self.size <= _FEW_RANKS or checkpoint.record.world_size != self.size:
            return None
        contents = read_contents(self.storage, checkpoint.record, self.rescue, {0, self.rank})
        try:
            fit = Draft(contents.trees[self.rank], _specs(contents), target, only=only, strict=strict)
        except (StateError, FormatError):
            # With all parts it may fit, or the error is the right one.
            return None
        regions = {
            name: Region.whole(tuple(to.spec.shape)) if to.region is None else Region(*to.region)
            for name, to in fit.wanted.items()
        }
        fits = not (fit.report.missing or fit.report.unexpected or fit.report.mismatched)
        if not fits or not all(contents.covers(name, region) for name, region in regions.items()):
            return None
        return LoadDraft(self, checkpoint, contents, fit)

    def _fit(
        self, contents: Contents, target: object, only: Sequence[str] | None, strict: bool | Literal["parts"]
    ) -> Draft:
        """Beside this rank's own tree; beside that of all ranks together where there is none, or it lacks something."""
        from ckptstore.state.pairing import Newcomer
        from ckptstore.state.restore import Draft

        parts, specs = contents.parts, _specs(contents)
        if len(parts) == self.size:
            try:
                own = Draft(contents.trees[self.rank], specs, target, only=only, strict=strict)
            except StateError:
                if len(parts) == 1:
                    raise
            else:
                if len(parts) == 1 or not own.report.missing:
                    return own
        newcomer = Newcomer(self.rank, len(parts) == 1) if self.rank >= len(parts) else None
        tree = _union(contents, self.rank if newcomer is None else 0)
        return Draft(tree, specs, target, only=only, strict=strict, union=len(parts) > 1, newcomer=newcomer)

    def fill(self, draft: LoadDraft, restoration: Restoration, skipped: Mapping[str, CheckpointError]) -> Loaded:
        """Do it."""
        self._fill(draft.contents, restoration)
        found = restoration.report
        return Loaded(draft.checkpoint, skipped, found.missing, found.unexpected, found.mismatched, found.cast)

    def differing(self, checkpoint: Checkpoint, state: object, only: Sequence[str] | None) -> list[str]:
        """The names of all in ``state`` that is not what the checkpoint holds."""
        from ckptstore.state.capture import capture
        from ckptstore.state.compare import compare_trees

        with collector_paused():
            contents = read_contents(self.storage, checkpoint.record, self.rescue)
            tree = _tree_of(contents, self.rank) if len(contents.parts) == self.size else _union(contents, self.rank)
            findings = compare_trees(tree, _specs(contents), capture(state), only=only)
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


@dataclass(frozen=True)
class LoadDraft:
    """A load that is planned, and may still be given up."""

    loader: Loader
    checkpoint: Checkpoint
    contents: Contents
    fit: Draft

    def finish(self, skipped: Mapping[str, CheckpointError]) -> Loaded:
        """Judge it, and do it.

        Raises:
            StateError: the target doesn't fit; nothing was changed.
        """
        return self.loader.fill(self, self.fit.close(), skipped)


def _tree_of(contents: Contents, rank: int) -> Any:
    if not 0 <= rank < len(contents.parts):
        raise NotFoundError(
            f"{contents.commit.id} was saved by {len(contents.parts)} ranks, and has nothing of rank {rank}",
            id=contents.commit.id,
        )
    return contents.trees[rank]


def _union(contents: Contents, rank: int) -> Any:
    """The tree of ``rank``, with what only other ranks have; of rank 0 where that wasn't there."""
    from ckptstore.state.merge import merged

    trees = list(contents.trees.values())
    return trees[0] if len(trees) == 1 else merged(trees, rank if rank < len(trees) else 0)


def _specs(contents: Contents) -> list[TensorSpec]:
    from ckptstore.state.tensors import TensorSpec

    return [TensorSpec(name, t.dtype, tuple(t.shape), t.logical) for name, t in contents.tensors.items()]
