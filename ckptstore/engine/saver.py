"""One save, from captured state to acknowledged checkpoint: data first, manifest next, commit record last."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ckptstore.engine.buffers import BufferPool
from ckptstore.engine.collector import collector_paused
from ckptstore.engine.commit import commit
from ckptstore.engine.select import default_mode
from ckptstore.engine.workers import Progress
from ckptstore.engine.writer import Source, write_files
from ckptstore.errors import (
    CheckpointError,
    NotFoundError,
    SaveFailedError,
    StaleWriterError,
    StateError,
    StorageError,
)
from ckptstore.format import layout
from ckptstore.format.codecs import Compression
from ckptstore.format.digest import sha256
from ckptstore.format.layout import CheckpointId
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


class Captured(Protocol):
    """A state taken apart: what ``state.capture`` gives."""

    @property
    def tree(self) -> object: ...
    @property
    def sources(self) -> Sequence[Source]: ...
    @property
    def parameters(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Facts:
    """What a person says of a checkpoint; it stands in the commit record."""

    step: int
    epoch: int | None
    metrics: dict[str, float]
    modes: dict[str, str]
    reasons: Sequence[str]

    @classmethod
    def of(
        cls,
        step: int,
        epoch: int | None = None,
        metrics: Mapping[str, Any] | None = None,
        modes: Mapping[str, str] | None = None,
        reasons: Iterable[str] = (),
    ) -> Facts:
        """What the user said, checked.

        Raises:
            StateError: naming what is no step, no number, no mode.
        """
        values, modes = {name: _number(name, value) for name, value in (metrics or {}).items()}, modes or {}
        for name, mode in modes.items():
            if mode not in ("min", "max") or name not in values:
                raise StateError(f"modes: {name!r}: {mode!r} must be 'min' or 'max', for a metric given", path="modes")
        texts = [] if isinstance(reasons, str) else list(reasons)
        if isinstance(reasons, str) or not all(isinstance(text, str) for text in texts):
            raise StateError("reasons must be a list of texts", path="reasons")
        return cls(
            _whole(step, "step"),
            None if epoch is None else _whole(epoch, "epoch"),
            values,
            {name: modes.get(name) or default_mode(name) for name in values},
            texts,
        )


@dataclass(frozen=True)
class Saver:
    """Saves into one storage under one writer's number."""

    storage: Storage
    store: StoreRecord
    pool: BufferPool
    threads: int
    compression: Compression
    check_fence: Callable[[], None]

    def save(self, id: CheckpointId, state: Captured, facts: Facts, progress: Progress | None = None) -> CommitRecord:
        """Write and commit ``state`` as ``id``.

        Raises:
            SaveFailedError: certainly not committed; what was written is removed as far as possible.
            CommitUnknownError: nothing was removed.
            StaleWriterError: a newer writer owns the store.
        """
        # The record has a size limit: better told now than after writing the data.
        seal(self._record(id, state, facts, [], Sealed256(size=1 << 40, sha256="0" * 64)))
        try:
            files, manifest = self._write(id, state, progress)
            record = self._record(id, state, facts, files, manifest)
            # Its numbers are longer now than in the first try.
            seal(record)
            self._recheck(id, files)
            self.check_fence()
        except BaseException as error:
            self._discard(id)
            failed = _failed(id, error)
            if failed is error:
                raise
            raise failed from error
        self._commit(id, record)
        return record

    def _commit(self, id: CheckpointId, record: CommitRecord) -> None:
        # From here on only a certain failure removes anything: an interrupt, too, may come after the effect.
        try:
            commit(self.storage, id, record)
        except SaveFailedError:
            self._discard(id)
            raise
        except StorageError as error:
            self._discard(id)
            raise _failed(id, error) from error

    def _discard(self, id: CheckpointId) -> None:
        with contextlib.suppress(CheckpointError):
            discard(self.storage, id)

    def _write(self, id: CheckpointId, state: Captured, progress: Progress | None) -> tuple[list[FileEntry], Sealed256]:
        files = write_files(
            self.storage,
            id,
            state.sources,
            digest=self.store.digest,
            compression=self.compression,
            pool=self.pool,
            threads=self.threads,
            progress=progress,
        )
        with collector_paused():
            part = to_json(PartRecord(id=str(id), rank=0, files=files, tree=state.tree))
        if len(part) > PART_LIMIT:
            raise StateError(
                f"{id} was not saved: what is no tensor takes {len(part)} bytes of JSON, tensor tables included, "
                f"and {PART_LIMIT} can be loaded again: store long lists and texts as tensors, arrays or bytes",
                id=str(id),
                step=id.step,
            )
        self.storage.create(layout.part_key(id, 0), part)
        manifest = to_json(
            ManifestRecord(
                store_id=self.store.store_id,
                id=str(id),
                digest=self.store.digest,
                block_bytes=BLOCK_BYTES,
                world_size=1,
                parts=[PartEntry(rank=0, size=len(part), sha256=sha256(part))],
            )
        )
        self.storage.create(layout.manifest_key(id), manifest)
        return files, Sealed256(size=len(manifest), sha256=sha256(manifest))

    def _recheck(self, id: CheckpointId, files: Iterable[FileEntry]) -> None:
        """Somebody who took this save for dead may have begun to collect it."""
        for file in files:
            key = layout.file_key(id, file.name)
            try:
                size = self.storage.size(key)
            except NotFoundError as error:
                raise SaveFailedError(
                    f"{key} disappeared while it was being saved, as when prune takes it for a leftover; save again",
                    id=str(id),
                    step=id.step,
                ) from error
            if size != file.stored_bytes:
                raise SaveFailedError(
                    f"{key} has {size} bytes, {file.stored_bytes} were written", id=str(id), step=id.step
                )

    def _record(
        self, id: CheckpointId, state: Captured, facts: Facts, files: Sequence[FileEntry], manifest: Sealed256
    ) -> CommitRecord:
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
                "parameters": state.parameters,
                "tensors": len(state.sources),
                "files": len(files),
                "raw_bytes": sum(block.raw for file in files for block in file.blocks),
                "stored_bytes": sum(file.stored_bytes for file in files),
                "world_size": 1,
                "manifest": manifest,
                "lenders": [],
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
    if isinstance(error, SaveFailedError | StaleWriterError | StateError) or not isinstance(error, Exception):
        return error
    return SaveFailedError(
        f"{id} was not saved: {error}. Older checkpoints are untouched; free the cause and save again",
        id=str(id),
        step=id.step,
    )


def _whole(value: int, name: str) -> int:
    try:
        number = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = -1
    if not 0 <= number < 10**15:
        raise StateError(f"{name}={value!r} must be an int from 0 to 10**15 - 1", path=name)
    return number


def _number(name: object, value: Any) -> float:
    if not isinstance(name, str):
        raise StateError(f"metrics: the name {name!r:.100} is no text", path="metrics")
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise StateError(f"metric {name!r} is {value!r:.100}, no number", path=f"metrics/{name}") from error
