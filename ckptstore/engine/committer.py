"""The order that every commit follows: data first, manifest next, commit record last; and what is left if it fails."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from ckptstore.engine.borrow import FileFacts, check_files, owners
from ckptstore.engine.collector import collector_paused
from ckptstore.engine.commit import bury, commit
from ckptstore.engine.facts import Facts
from ckptstore.engine.stage import StateMoved
from ckptstore.engine.stopwatch import Stopwatch
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
from ckptstore.format.layout import CheckpointId
from ckptstore.format.records import (
    PART_LIMIT,
    CommitRecord,
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

_UNKNOWN = Sealed256(size=1 << 40, sha256="0" * 64)


@dataclass(frozen=True)
class Told:
    """What a commit record tells, besides what its files tell."""

    facts: Facts
    parameters: int
    tensors: int
    ranks: int = 1
    watch: Stopwatch | None = None
    """Read right before the commit; None where nobody measures."""


RANK_REQUESTS = 16
"""Of rank 0 at a time, when it looks at what the others have written."""


@dataclass(frozen=True)
class Committer:
    """Commits under one writer's number."""

    storage: Storage
    store: StoreRecord
    check_fence: Callable[[], None]

    def check_size(self, id: CheckpointId, told: Told) -> None:
        """Nothing, if the record won't be too large (FormatError): better told now than after writing the data."""
        seal(self._record(id, told, [], _UNKNOWN))

    def commit(
        self,
        id: CheckpointId,
        told: Told,
        files: Sequence[FileFacts],
        write: Callable[[], Sealed256],
        *,
        last_look: Callable[[CommitRecord], None] = lambda record: None,
        requests: int = 1,
        give_up: Callable[[BaseException], None] = lambda error: None,
    ) -> CommitRecord:
        """Write, look, commit.

        Args:
            files: filled by ``write``.
            write: writes data, parts and manifest, and gives size and digest of that.
            last_look: is asked right before the commit.
            requests: at a time, to see whether each file lies where it should.
            give_up: is told of a failure before anything is removed.

        Raises:
            SaveFailedError: certainly not committed; what was written is removed as far as possible.
            CommitUnknownError: nothing was removed.
        """
        try:
            manifest = write()
            check_files(self.storage, id, files, requests=requests)
            record = self._record(id, told, files, manifest)
            # Its numbers are longer now than in the first try.
            seal(record)
            last_look(record)
            self.check_fence()
        except BaseException as error:
            give_up(error)
            self.discard(id)
            failed = _failed(id, error)
            if failed is error:
                raise
            raise failed from error
        # From here on only a certain failure removes anything: an interrupt, too, may come after the effect.
        try:
            commit(self.storage, id, record)
        except SaveFailedError:
            self.discard(id)
            raise
        except StorageError as error:
            give_up(error)
            self.discard(id)
            raise _failed(id, error) from error
        return record

    def discard(self, id: CheckpointId) -> None:
        """Remove what was written, as far as possible."""
        with contextlib.suppress(CheckpointError):
            discard(self.storage, id)

    def bury(self, id: CheckpointId, reason: str) -> None:
        """Put a tombstone beside what was committed."""
        with contextlib.suppress(ExistsError):
            bury(self.storage, id, self.store.store_id, reason)

    def stays(self, id: CheckpointId, ask: Callable[[], bool]) -> bool:
        """Whether ``id``, which is committed, may keep what it borrows, as ``ask`` finds out."""
        try:
            return ask()
        except StorageError as error:
            raise CommitUnknownError(
                f"{id} was committed, but whether what it borrows will stay is unknown ({error}); "
                f"store.verify({str(id)!r}) tells once the storage answers",
                id=str(id),
                step=id.step,
            ) from error

    def describe(self, id: CheckpointId, digest: Literal["blake3", "sha256"], parts: Sequence[PartRecord]) -> Sealed256:
        """Write parts and manifest; size and digest of the manifest."""
        return self.put_manifest(id, digest, [self.put_part(id, part) for part in parts])

    def put_manifest(
        self, id: CheckpointId, digest: Literal["blake3", "sha256"], parts: Sequence[PartEntry]
    ) -> Sealed256:
        """Write the manifest; its size and digest."""
        manifest = to_json(
            ManifestRecord(
                store_id=self.store.store_id,
                id=str(id),
                digest=digest,
                block_bytes=BLOCK_BYTES,
                world_size=len(parts),
                parts=list(parts),
            )
        )
        self.storage.create(layout.manifest_key(id), manifest)
        return Sealed256(size=len(manifest), sha256=sha256(manifest))

    def put_part(self, id: CheckpointId, part: PartRecord) -> PartEntry:
        """Write one part."""
        with collector_paused():
            data = to_json(part)
        if len(data) > PART_LIMIT:
            raise StateError(
                f"{id} was not saved: what is no tensor takes {len(data)} bytes of JSON, tensor tables included, "
                f"and {PART_LIMIT} can be loaded again: store long lists and texts as tensors, arrays or bytes",
                id=str(id),
                step=id.step,
            )
        self.storage.create(layout.part_key(id, part.rank), data)
        return PartEntry(rank=part.rank, size=len(data), sha256=sha256(data))

    def _record(self, id: CheckpointId, told: Told, files: Sequence[FileFacts], manifest: Sealed256) -> CommitRecord:
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
                "raw_bytes": sum(file.raw_bytes for file in files),
                "stored_bytes": sum(file.stored_bytes for file in files),
                "borrowed_bytes": sum(file.stored_bytes for file in files if file.owner != str(id)),
                "world_size": told.ranks,
                "manifest": manifest,
                "lenders": owners(id, files),
                "timing": told.watch.read() if told.watch is not None else None,
            },
            f"the record of {id}",
        )


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
