"""One save, from captured state to acknowledged checkpoint: data first, manifest next, commit record last."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

from ckptstore.engine.borrow import Lender, check_files, is_safe, may_be_lent, owners
from ckptstore.engine.buffers import BufferPool, StagingArea
from ckptstore.engine.collector import collector_paused
from ckptstore.engine.commit import bury, commit
from ckptstore.engine.compressor import Compressor
from ckptstore.engine.facts import Facts
from ckptstore.engine.plan import Change, Plan, PlannedFile, Source
from ckptstore.engine.reader import Contents, DataFile
from ckptstore.engine.stage import Stage, StateMoved
from ckptstore.engine.workers import Meter, Progress
from ckptstore.engine.writer import equals, write_files
from ckptstore.errors import (
    CheckpointError,
    CommitUnknownError,
    ExistsError,
    SaveFailedError,
    StaleWriterError,
    StateError,
    StorageError,
)
from ckptstore.format import layout
from ckptstore.format.digest import sha256
from ckptstore.format.layout import CheckpointId, parse_id
from ckptstore.format.records import (
    PART_LIMIT,
    CommitRecord,
    FileEntry,
    ManifestRecord,
    PartEntry,
    PartRecord,
    Sealed256,
    StoreRecord,
    metric,
    now,
    seal,
    to_json,
    validate,
)
from ckptstore.format.tensorfile import BLOCK_BYTES
from ckptstore.storage.base import Storage, is_key

Durable: TypeAlias = Literal["primary", "backup"]
"""When a save is done: as soon as it is durable here, or in every backup, too."""

_UNKNOWN = Sealed256(size=1 << 40, sha256="0" * 64)


class Captured(Protocol):
    """A state taken apart: what ``state.capture`` gives."""

    @property
    def tree(self) -> object: ...
    @property
    def sources(self) -> Sequence[Source]: ...
    @property
    def parameters(self) -> int: ...


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

    def plan(self, state: Captured) -> Plan:
        """The files that ``state`` makes."""
        with collector_paused():
            return Plan(state.sources, encoded=self.compressor.encodes)

    def stage(self, plan: Plan, *, safe: Change = Change.ALL) -> Stage:
        """Where the blocks of ``plan`` are taken from; ``safe`` as in ``Stage``."""
        return Stage(plan, self.pool, self.area, safe=safe)


@dataclass(frozen=True)
class Told:
    """What a commit record tells, besides what its files tell."""

    facts: Facts
    parameters: int
    tensors: int
    ranks: int = 1


@dataclass(frozen=True)
class Job:
    """What is to be saved, and why."""

    state: Captured
    facts: Facts
    durable: Durable = "primary"
    progress: Progress | None = None

    @property
    def told(self) -> Told:
        return Told(self.facts, self.state.parameters, len(self.state.sources))


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

    def save(self, id: CheckpointId, job: Job, stage: Stage) -> Lender:
        """Write and commit the state as ``id``; the new checkpoint, as the next one's lender.

        Raises:
            SaveFailedError: certainly not committed; what was written is removed as far as possible.
            CommitUnknownError: nothing was removed.
            StaleWriterError: a newer writer owns the store.
            StateMoved: a tensor was written to while it was read in place; nothing is left of this attempt.
        """
        # The record has a size limit: better told now than after writing the data.
        seal(self._record(id, job.told, [], _UNKNOWN))
        files: list[FileEntry] = []

        def write() -> Sealed256:
            files.extend(self._files(id, job, stage))
            return self._describe(id, self.store.digest, [_part(id, job, files)])

        record = self._commit(id, job.told, files, write, last_look=stage.check)
        borrowed = [file for file in files if file.owner != str(id)]
        if borrowed and self.lender is not None and not self._is_safe(id, self.lender, borrowed):
            record, files = self._rewrite(record, job, stage.plan, files)
        return Lender.of(record, self.store.digest, files)

    def _files(self, id: CheckpointId, job: Job, stage: Stage) -> list[FileEntry]:
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
            if entry is None or not is_safe(self.tools.storage, lender, [entry]):
                continue
            if equals(stage, file, entry, digest=self.store.digest, threads=self.tools.threads):
                stage.drop(file)
                found[file] = entry
                meter.add(file.stream.raw_bytes)
        return found

    def _is_safe(self, id: CheckpointId, lender: Lender, borrowed: Sequence[FileEntry]) -> bool:
        """Whether ``id``, which is committed, may keep what it borrows from ``lender``."""
        try:
            return is_safe(self.tools.storage, lender, borrowed)
        except StorageError as error:
            raise CommitUnknownError(
                f"{id} was committed, but whether what it borrows from {lender.id} will stay is unknown ({error}); "
                f"store.verify({str(id)!r}) tells once the storage answers",
                id=str(id),
                step=id.step,
            ) from error

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
            return self._describe(again, self.store.digest, [_part(again, job, entries)])

        lost = "the checkpoint from which it borrowed was deleted while it was saved"
        try:
            record = self._commit(again, job.told, entries, write, last_look=lambda: None)
            broken = Lender.of(first, self.store.digest, files)
            if own and not self._is_safe(again, broken, list(own.values())):
                self._bury(again, lost)
                raise SaveFailedError(f"{again} was not saved: {lost}; save again", id=str(again), step=again.step)
        finally:
            self._bury(id, lost)
        return record, entries

    def _bury(self, id: CheckpointId, reason: str) -> None:
        with contextlib.suppress(ExistsError):
            bury(self.tools.storage, id, self.store.store_id, reason)

    def repeat(self, id: CheckpointId, past: Contents, facts: Facts, carry: Callable[[DataFile, str], None]) -> Lender:
        """Commit as ``id`` what ``past`` holds, borrowing from it where it is the lender; the next one's lender.

        Args:
            carry: writes a data file of ``past`` under another key: those that can't be borrowed.

        Raises:
            SaveFailedError, CommitUnknownError, StaleWriterError: as ``save``.
        """
        files: list[FileEntry] = []

        def write() -> Sealed256:
            parts = [self._repeated(id, past, part, carry) for part in past.parts]
            files.extend(file for part in parts for file in part.files)
            return self._describe(id, past.digest, parts)

        record, lender = past.commit, self.lender
        told = Told(facts, record.parameters, record.tensors, record.world_size)
        made = self._commit(id, told, files, write, last_look=lambda: None)
        borrowed = [file for file in files if file.owner != str(id)]
        if borrowed and lender is not None and not self._is_safe(id, lender, borrowed):
            lost = f"{lender.id}, from which it borrows, was deleted meanwhile"
            self._bury(id, lost)
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

    # -- the order that every commit follows -------------------------------------------------------------

    def _commit(
        self,
        id: CheckpointId,
        told: Told,
        files: Sequence[FileEntry],
        write: Callable[[], Sealed256],
        last_look: Callable[[], None],
    ) -> CommitRecord:
        try:
            manifest = write()
            record = self._record(id, told, files, manifest)
            # Its numbers are longer now than in the first try.
            seal(record)
            check_files(self.tools.storage, id, files)
            last_look()
            self.check_fence()
        except BaseException as error:
            self._discard(id)
            failed = _failed(id, error)
            if failed is error:
                raise
            raise failed from error
        # From here on only a certain failure removes anything: an interrupt, too, may come after the effect.
        try:
            commit(self.tools.storage, id, record)
        except SaveFailedError:
            self._discard(id)
            raise
        except StorageError as error:
            self._discard(id)
            raise _failed(id, error) from error
        return record

    def _discard(self, id: CheckpointId) -> None:
        with contextlib.suppress(CheckpointError):
            discard(self.tools.storage, id)

    def _describe(
        self, id: CheckpointId, digest: Literal["blake3", "sha256"], parts: Sequence[PartRecord]
    ) -> Sealed256:
        """Write parts and manifest; size and digest of the manifest."""
        manifest = to_json(
            ManifestRecord(
                store_id=self.store.store_id,
                id=str(id),
                digest=digest,
                block_bytes=BLOCK_BYTES,
                world_size=len(parts),
                parts=[self._put(id, part) for part in parts],
            )
        )
        self.tools.storage.create(layout.manifest_key(id), manifest)
        return Sealed256(size=len(manifest), sha256=sha256(manifest))

    def _put(self, id: CheckpointId, part: PartRecord) -> PartEntry:
        with collector_paused():
            data = to_json(part)
        if len(data) > PART_LIMIT:
            raise StateError(
                f"{id} was not saved: what is no tensor takes {len(data)} bytes of JSON, tensor tables included, "
                f"and {PART_LIMIT} can be loaded again: store long lists and texts as tensors, arrays or bytes",
                id=str(id),
                step=id.step,
            )
        self.tools.storage.create(layout.part_key(id, part.rank), data)
        return PartEntry(rank=part.rank, size=len(data), sha256=sha256(data))

    def _record(self, id: CheckpointId, told: Told, files: Sequence[FileEntry], manifest: Sealed256) -> CommitRecord:
        facts = told.facts
        return validate(
            CommitRecord,
            {
                "store_id": self.store.store_id,
                "id": str(id),
                "step": facts.step,
                "epoch": facts.epoch,
                "metrics": {name: metric(value) for name, value in facts.metrics.items()},
                "modes": facts.modes,
                "reasons": list(facts.reasons),
                "created": now(),
                "parameters": told.parameters,
                "tensors": told.tensors,
                "files": len(files),
                "raw_bytes": sum(block.raw for file in files for block in file.blocks),
                "stored_bytes": sum(file.stored_bytes for file in files),
                "borrowed_bytes": sum(file.stored_bytes for file in files if file.owner != str(id)),
                "world_size": told.ranks,
                "manifest": manifest,
                "lenders": owners(id, files),
            },
            f"the record of {id}",
        )


def _part(id: CheckpointId, job: Job, files: Sequence[FileEntry]) -> PartRecord:
    with collector_paused():
        return PartRecord(id=str(id), rank=0, files=list(files), tree=job.state.tree)


def discard(storage: Storage, id: CheckpointId) -> None:
    """Remove every object in the folder of ``id``, one by one, by name. What has no key's name stays."""
    keys = [entry.key for entry in storage.list(layout.folder(id))]
    storage.delete([key for key in keys if is_key(key.removesuffix("/"))])
    storage.delete([layout.folder(id)])


def _failed(id: CheckpointId, error: BaseException) -> BaseException:
    """The error to raise for ``error``: the kinds that say enough, and interrupts, stay as they are."""
    says_enough = SaveFailedError | StaleWriterError | StateError | StateMoved
    if isinstance(error, says_enough) or not isinstance(error, Exception):
        return error
    return SaveFailedError(
        f"{id} was not saved: {error}. Older checkpoints are untouched; free the cause and save again",
        id=str(id),
        step=id.step,
    )
