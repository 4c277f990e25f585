"""One save, from captured state to acknowledged checkpoint: data first, manifest next, commit record last."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

from ckptstore.engine.borrow import Lender, is_safe, may_be_lent
from ckptstore.engine.buffers import BufferPool, StagingArea
from ckptstore.engine.collector import collector_paused
from ckptstore.engine.committer import Committer, Told
from ckptstore.engine.compressor import Compressor
from ckptstore.engine.contents import Contents, DataFile
from ckptstore.engine.facts import Facts
from ckptstore.engine.plan import Change, Plan, PlannedFile, Source
from ckptstore.engine.share import Share
from ckptstore.engine.stage import Stage
from ckptstore.engine.stopwatch import Stopwatch
from ckptstore.engine.workers import Meter, Progress
from ckptstore.engine.writer import equals, write_files
from ckptstore.errors import (
    SaveFailedError,
)
from ckptstore.format.layout import CheckpointId, parse_id
from ckptstore.format.records import (
    CommitRecord,
    FileEntry,
    PartRecord,
    Sealed256,
    StoreRecord,
)
from ckptstore.storage.base import Storage

Durable: TypeAlias = Literal["primary", "backup"]
"""When a save is done: as soon as it is durable here, or in every backup, too."""


class Captured(Protocol):
    """A state taken apart: what ``state.capture`` gives."""

    @property
    def tree(self) -> object: ...
    @property
    def sources(self) -> Sequence[Source]: ...
    @property
    def parameters(self) -> int: ...
    @property
    def elements(self) -> Mapping[str, int]: ...
    def divided(
        self, skip: Collection[int], rename: Mapping[str, str], cut: Mapping[str, tuple[int, int]]
    ) -> Captured: ...


@dataclass
class Tools:
    """What saves into one storage share.

    Attributes:
        pool: buffers for blocks on their way.
        area: room for copies of the state.
        threads: that work at a time.
    """

    storage: Storage
    pool: BufferPool
    area: StagingArea
    threads: int
    compressor: Compressor

    def plan(self, state: Captured, share: Share | None = None) -> Plan:
        """The files that ``state`` makes, or this rank's share of it."""
        with collector_paused():
            return Plan(state.sources, encoded=self.compressor.encodes, label=share.label if share is not None else "")

    def stage(self, plan: Plan, *, safe: Change = Change.ALL) -> Stage:
        """Where the blocks of ``plan`` are taken from; ``safe`` as in ``Stage``."""
        return Stage(plan, self.pool, self.area, safe=safe)


@dataclass(frozen=True)
class Job:
    """What is to be saved, and why."""

    state: Captured
    facts: Facts
    durable: Durable = "primary"
    progress: Progress | None = None
    share: Share | None = None
    """Where several ranks save together."""
    watch: Stopwatch | None = None

    @property
    def told(self) -> Told:
        return Told(self.facts, self.state.parameters, len(self.state.sources), watch=self.watch)


@dataclass(frozen=True)
class Saver:
    """Saves under one writer's number.

    Attributes:
        lender: the checkpoint saved before, whose unchanged files are borrowed; None to write everything.
        another_id: a fresh id, where one does not suffice.
    """

    tools: Tools
    store: StoreRecord
    lender: Lender | None
    check_fence: Callable[[], None]
    another_id: Callable[[], CheckpointId]

    @property
    def committer(self) -> Committer:
        """What it commits with."""
        return Committer(self.tools.storage, self.store, self.check_fence)

    def save(self, id: CheckpointId, job: Job, stage: Stage) -> Lender:
        """Write and commit the state as ``id``; the new checkpoint, as the next one's lender.

        Raises:
            SaveFailedError: certainly not committed; what was written is removed as far as possible.
            CommitUnknownError: nothing was removed.
            StaleWriterError: a newer writer owns the store.
            StateMoved: a tensor was written to while it was read in place; nothing is left of this attempt.
        """
        self.committer.check_size(id, job.told)
        files: list[FileEntry] = []

        def write() -> Sealed256:
            files.extend(self.files(id, job, stage))
            return self.committer.describe(id, self.store.digest, [_part(id, job, files)])

        record = self.committer.commit(id, job.told, files, write, last_look=lambda record: stage.check())
        borrowed = [file for file in files if file.owner != str(id)]
        if borrowed and self.lender is not None and not self._is_safe(id, self.lender, borrowed):
            record, files = self._rewrite(record, job, stage.plan, files)
        return Lender.of(record, self.store.digest, files)

    def files(self, id: CheckpointId, job: Job, stage: Stage) -> list[FileEntry]:
        """Write the data files, but for those that can be borrowed; all of them.

        Raises:
            StorageError: what was written here may not be used.
            StateMoved: so does a tear.
        """
        meter = Meter(stage.plan.raw_bytes, job.progress)
        borrowed = self._borrow(job, stage, meter)
        files = [file for file in stage.plan.files if file not in borrowed]
        written = self._write(id, job, stage, files, meter)
        entries = borrowed | dict(zip(files, written, strict=True))
        return [entries[file] for file in stage.plan.files]

    def _write(
        self, id: CheckpointId, job: Job, stage: Stage, files: Sequence[PlannedFile], meter: Meter
    ) -> list[FileEntry]:
        return write_files(
            self.tools.storage,
            id,
            stage,
            files,
            digest=self.store.digest,
            compressor=self.tools.compressor,
            threads=self.tools.threads,
            meter=meter,
        )

    def _borrow(self, job: Job, stage: Stage, meter: Meter) -> dict[PlannedFile, FileEntry]:
        """The files that the lender has already."""
        found: dict[PlannedFile, FileEntry] = {}
        lender = self.lender
        if lender is None or lender.digest != self.store.digest:
            return found
        for file in stage.plan.files:
            entry = lender.candidate(file, job.facts.step)
            if entry is None or not is_safe(self.tools.storage, lender.id, [entry]):
                continue
            if equals(stage, file, entry, digest=self.store.digest, threads=self.tools.threads):
                stage.drop(file)
                found[file] = entry
                meter.add(file.stream.raw_bytes)
        return found

    def _is_safe(self, id: CheckpointId, lender: Lender, borrowed: Sequence[FileEntry]) -> bool:
        return self.committer.stays(id, lambda: is_safe(self.tools.storage, lender.id, borrowed))

    def _rewrite(
        self, first: CommitRecord, job: Job, plan: Plan, files: Sequence[FileEntry]
    ) -> tuple[CommitRecord, list[FileEntry]]:
        """The lender was deleted while ``first`` borrowed from it: what was borrowed is written after all.

        Under an id of its own, as nothing is overwritten. That borrows in turn what ``first`` wrote itself, whose live
        tensors may have changed since; then ``first`` is buried.
        """
        id, again = parse_id(first.id), self.another_id()
        part = plan.only([file for file, entry in zip(plan.files, files, strict=True) if entry.owner != str(id)])
        own = {entry.name: entry for entry in files if entry.owner == str(id)}
        entries: list[FileEntry] = []

        def write() -> Sealed256:
            stage = self.tools.stage(part)
            fresh = self._write(again, job, stage, part.files, Meter(part.raw_bytes, None))
            before = {entry.name: [block.digest for block in entry.blocks] for entry in files}
            if any([block.digest for block in entry.blocks] != before[entry.name] for entry in fresh):
                raise SaveFailedError(
                    f"{id} was not saved: the checkpoint from which it borrowed unchanged files was deleted meanwhile, "
                    "and they have changed since; save again",
                    id=str(id),
                    step=id.step,
                )
            found = own | {entry.name: entry for entry in fresh}
            entries.extend(found[file.name] for file in files)
            return self.committer.describe(again, self.store.digest, [_part(again, job, entries)])

        lost = "the checkpoint from which it borrowed was deleted while it was saved"
        try:
            record = self.committer.commit(again, job.told, entries, write)
            broken = Lender.of(first, self.store.digest, files)
            if own and not self._is_safe(again, broken, list(own.values())):
                self.committer.bury(again, lost)
                raise SaveFailedError(f"{again} was not saved: {lost}; save again", id=str(again), step=again.step)
        finally:
            self.committer.bury(id, lost)
        return record, entries

    def repeat(
        self,
        id: CheckpointId,
        past: Contents,
        facts: Facts,
        carry: Callable[[DataFile, str], None],
        watch: Stopwatch | None = None,
    ) -> Lender:
        """Commit as ``id`` what ``past`` holds, borrowing from it where it is the lender; the next one's lender.

        Args:
            carry: writes a data file of ``past`` under another key: those that can't be borrowed.
            watch: began when the caller was called.

        Raises:
            SaveFailedError, CommitUnknownError, StaleWriterError: as ``save``.
        """
        files: list[FileEntry] = []

        def write() -> Sealed256:
            parts = [self._repeated(id, past, part, carry) for part in past.parts]
            files.extend(file for part in parts for file in part.files)
            return self.committer.describe(id, past.digest, parts)

        record, lender = past.commit, self.lender
        told = Told(facts, record.parameters, record.tensors, record.world_size, watch)
        made = self.committer.commit(id, told, files, write)
        borrowed = [file for file in files if file.owner != str(id)]
        if borrowed and lender is not None and not self._is_safe(id, lender, borrowed):
            lost = f"{lender.id}, from which it borrows, was deleted meanwhile"
            self.committer.bury(id, lost)
            raise SaveFailedError(f"{id} was not saved: {lost}", id=str(id), step=id.step)
        return Lender.of(made, past.digest, files)

    def _repeated(
        self, id: CheckpointId, past: Contents, part: PartRecord, carry: Callable[[DataFile, str], None]
    ) -> PartRecord:
        sources, files = {file.key: file for file in past.files}, []
        for entry in part.files:
            file = entry
            if self.lender is None or not may_be_lent(self.tools.storage, self.lender.record, entry):
                file = entry.model_copy(update={"owner": str(id)})
                carry(sources[entry.key], file.key)
            files.append(file)
        return part.model_copy(update={"id": str(id), "files": files})


def _part(id: CheckpointId, job: Job, files: Sequence[FileEntry]) -> PartRecord:
    with collector_paused():
        return PartRecord(id=str(id), rank=0, files=list(files), tree=job.state.tree)
