"""One checkpoint to another storage: the same keys, the same bytes, in the order in which a save writes."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ckptstore.engine.borrow import lies_there
from ckptstore.engine.catalogue import Checkpoint, Damage
from ckptstore.engine.commit import commit, parse_fate
from ckptstore.engine.contents import Contents, DataFile, Rescue, read_contents, read_or_rescue
from ckptstore.engine.workers import Meter, Progress
from ckptstore.errors import ExistsError, FormatError, IntegrityError, NotFoundError, SaveFailedError, StorageError
from ckptstore.format import layout
from ckptstore.format.records import (
    MANIFEST_LIMIT,
    PART_LIMIT,
    SMALL_LIMIT,
    CommitRecord,
    CopyingRecord,
    ManifestRecord,
    now,
    parse,
    seal,
)
from ckptstore.maintenance.heal import Healer
from ckptstore.maintenance.transfer import Carrier
from ckptstore.storage.base import Storage

Method = Literal["readback", "checksum", "found"]


class Copied(NamedTuple):
    """What a copy did."""

    method: Method
    """How it was proven: read back, by a checksum that the server checked, or it was there already."""
    written_bytes: int
    """Of data files; what lay there already, and was good, is not written again."""


@dataclass(frozen=True)
class CopyReport:
    """What ``Store.copy`` did.

    Attributes:
        checkpoints: those that are in the target now, oldest first.
        found: ids of those that were there already.
        written_bytes: of data files.
        damages: what kept a checkpoint from being copied.
        seconds: time it took.
    """

    checkpoints: Sequence[Checkpoint]
    found: Sequence[str]
    written_bytes: int
    damages: Sequence[Damage]
    seconds: float

    @property
    def ok(self) -> bool:
        return not self.damages


def copy_each(
    copier_of: Callable[[Checkpoint], Copier], chosen: Sequence[Checkpoint], progress: Progress | None
) -> CopyReport:
    """Copy ``chosen``, oldest first. One that is damaged is left out, and told.

    Raises:
        StorageError: a storage failed; another call goes on where this one ended.
    """
    begin = time.perf_counter()
    meter = Meter(sum(c.stored_bytes for c in chosen), progress)
    copied, found, written, damages = [], [], 0, []
    for checkpoint in chosen:
        try:
            done = copier_of(checkpoint).copy(checkpoint, meter.add)
        except (IntegrityError, FormatError, SaveFailedError) as error:
            damages.append(Damage(error.key or layout.folder(checkpoint.order), str(error), checkpoint.id))
            continue
        copied.append(checkpoint)
        written += done.written_bytes
        if done.method == "found":
            found.append(checkpoint.id)
    return CopyReport(copied, found, written, damages, time.perf_counter() - begin)


@dataclass(frozen=True)
class Copier:
    """Copies checkpoints from ``source`` to ``target``.

    A copy that was broken off is taken up again: what arrived whole is read there, and not sent once more.

    Attributes:
        check_fence: called before each commit; raises where this run must not commit there any more.
    """

    source: Storage
    target: Storage
    carrier: Carrier
    check_fence: Callable[[], None] = lambda: None
    rescue: Rescue | None = None

    def copy(self, checkpoint: Checkpoint, done: Callable[[int], None] = lambda count: None) -> Copied:
        """Copy ``checkpoint``, with the files that it borrows; ``done`` is told the stored bytes dealt with.

        Raises:
            IntegrityError, FormatError: it is damaged in ``source``. Nothing was committed.
            SaveFailedError: its id was given up in ``target``.
            StorageError: either failed; another call goes on where this one ended.
        """
        record = checkpoint.record
        if self._is_committed(record):
            done(checkpoint.stored_bytes)
            return Copied("found", 0)
        contents = read_contents(self.source, record, self.rescue)
        with self._marked(record):
            written = sum(self._bring(contents, file, done) for file in contents.files)
            for name, data in self._records(record):
                self._put(name, data)
            self.check_fence()
            self._commit(record)
            # From now on it is a borrower that prune sees; one that was under way may have removed a lender's file.
            lent = [file for file in contents.files if file.entry.owner != record.id]
            written += sum(self._bring(contents, file) for file in lent if not lies_there(self.target, file.entry))
        return Copied("checksum" if self.target.capabilities.checks_writes else "readback", written)

    @contextmanager
    def _marked(self, record: CommitRecord) -> Iterator[None]:
        """While the block runs, nobody takes the files for what a dead save left; those of its lenders neither."""
        keys = []
        for id in (record.id, *record.lenders):
            marker = CopyingRecord(
                store_id=record.store_id, id=id, host=socket.gethostname()[:200], pid=os.getpid(), created=now()
            )
            keys.append(layout.copying_key(layout.parse_id(id)))
            # Anew, as its age counts.
            self.target.delete([keys[-1]])
            with suppress(ExistsError):
                self.target.create(keys[-1], seal(marker))
        yield
        self.target.delete(keys)

    def _bring(self, contents: Contents, file: DataFile, done: Callable[[int], None] = lambda count: None) -> int:
        """Have ``file`` in the target, proven; how many bytes were written."""
        if not self._lies_there(file):
            try:
                self.carrier.carry(contents, file, self.source, self.target, file.key, rescue=self.rescue, done=done)
                self._prove(contents, file)
                return file.entry.stored_bytes
            except ExistsError:
                # Another process copies the same.
                pass
        try:
            self.carrier.prove(contents, file, self.target, file.key)
        except (IntegrityError, NotFoundError):
            # Never removed first: a checkpoint there may borrow the good part of it.
            Healer(self.target, self.carrier).file(contents, file, self.source, self.rescue)
            written = file.entry.stored_bytes
        else:
            written = 0
        done(file.entry.stored_bytes)
        return written

    def _prove(self, contents: Contents, file: DataFile) -> None:
        if self.target.capabilities.checks_writes:
            return
        try:
            self.carrier.prove(contents, file, self.target, file.key)
        except IntegrityError as error:
            raise self._damaged_on_its_way(file.key) from error

    def _damaged_on_its_way(self, key: str) -> StorageError:
        message = f"{self.target.url}/{key} was read back with other bytes than were written; copy again"
        return StorageError(message, transient=True, key=key)

    def _lies_there(self, file: DataFile) -> bool:
        try:
            self.target.size(file.key)
        except NotFoundError:
            return False
        except IntegrityError:
            pass
        return True

    def _records(self, record: CommitRecord) -> Iterator[tuple[str, bytes]]:
        """Parts and manifest, the manifest last, with the very bytes that the commit record proves."""
        id = layout.parse_id(record.id)
        key = layout.manifest_key(id)
        data = read_or_rescue(self.source, key, record.manifest, record.id, MANIFEST_LIMIT, self.rescue)
        for part in parse(data, key, ManifestRecord, limit=MANIFEST_LIMIT).parts:
            name = layout.part_key(id, part.rank)
            yield name, read_or_rescue(self.source, name, part, record.id, PART_LIMIT, self.rescue)
        yield key, data

    def _put(self, key: str, data: bytes) -> None:
        try:
            self.target.create(key, data)
        except ExistsError:
            if not self._holds(key, data):
                Healer(self.target, self.carrier).record(key, data)
        else:
            if not self._holds(key, data):
                raise self._damaged_on_its_way(key)

    def _holds(self, key: str, data: bytes) -> bool:
        try:
            # A flip on the way up heals by itself.
            return any(self.target.read(key, limit=len(data)) == data for _ in range(2))
        except (NotFoundError, IntegrityError, FormatError):
            return False

    def _is_committed(self, record: CommitRecord) -> bool:
        """Whether the target has the very record already.

        Raises:
            SaveFailedError: what it has says that the id never may be committed.
        """
        key = layout.commit_key(layout.parse_id(record.id))
        try:
            found = parse_fate(self.target.read(key, limit=SMALL_LIMIT), key)
        except (NotFoundError, IntegrityError, FormatError):
            return False
        if not isinstance(found, CommitRecord):
            raise SaveFailedError(
                f"{self.target.url} gave up {record.id}, as prune does with what it takes for a dead save's: it can't "
                "be copied there any more",
                id=record.id,
                key=key,
            )
        return found == record

    def _commit(self, record: CommitRecord) -> None:
        id = layout.parse_id(record.id)
        try:
            commit(self.target, id, record)
        except IntegrityError:
            # What stood there was damaged; of this very id, as nobody else makes its like.
            Healer(self.target, self.carrier).record(layout.commit_key(id), seal(record))
