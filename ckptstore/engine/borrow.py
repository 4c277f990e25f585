"""Files that needn't be written again: those of the checkpoint before that hold the same bytes.

A borrowed file must outlive its lender's deletion without a lease. Whoever reclaims removes the lender's record first
and lists the commits after that; whoever borrows commits first and looks for that record after it. So one sees the
other.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from ckptstore.engine.buffers import BufferPool
from ckptstore.engine.commit import read_fate
from ckptstore.engine.contents import Contents, DataFile, read_contents
from ckptstore.engine.plan import PlannedFile
from ckptstore.engine.reader import BlockTask, check_blocks, open_file
from ckptstore.engine.workers import run
from ckptstore.errors import FormatError, IntegrityError, NotFoundError, SaveFailedError
from ckptstore.format import layout
from ckptstore.format.layout import CheckpointId, parse_id
from ckptstore.format.records import CommitRecord, FileEntry
from ckptstore.storage.base import Storage


class FileFacts(Protocol):
    """What a commit needs to know of a data file."""

    @property
    def name(self) -> str: ...
    @property
    def owner(self) -> str: ...
    @property
    def stored_bytes(self) -> int: ...
    @property
    def raw_bytes(self) -> int: ...
    @property
    def key(self) -> str: ...


class ReportedFile(NamedTuple):
    """A data file as another rank has reported it."""

    name: str
    owner: str
    stored_bytes: int
    raw_bytes: int

    @property
    def key(self) -> str:
        """Where the bytes lie, in its owner's folder."""
        return layout.file_key(parse_id(self.owner), self.name)


@dataclass(frozen=True)
class Lender:
    """The checkpoint that was saved before, and its data files by name: its own, and those that it borrows itself."""

    record: CommitRecord
    digest: str
    files: Mapping[str, FileEntry]

    @property
    def id(self) -> CheckpointId:
        return parse_id(self.record.id)

    @classmethod
    def of(cls, record: CommitRecord, digest: str, files: Sequence[FileEntry]) -> Lender:
        return cls(record, digest, {file.name: file for file in files})

    @classmethod
    def read(
        cls, storage: Storage, record: CommitRecord, wanted: Container[str], *, pool: BufferPool, threads: int
    ) -> Lender | None:
        """A checkpoint of an earlier process as a lender of the ``wanted`` files; None where it is damaged.

        Every byte of them is read: this process may have been started because of damage, and must not hand it on.
        """
        try:
            contents = read_contents(storage, record)
            files = contents.files
        except (IntegrityError, FormatError):
            return None
        kept = [f for f in files if f.entry.name in wanted and may_be_lent(storage, record, f.entry)]
        good = [file.entry for file in kept if _is_whole(storage, contents, file, pool, threads)]
        return cls.of(record, contents.digest, good)

    def candidate(self, file: PlannedFile, step: int) -> FileEntry | None:
        """The file here that may well hold the same bytes: of what is frozen, or of the very same step."""
        return self.files.get(file.name) if file.frozen or step == self.record.step else None


def _is_whole(storage: Storage, contents: Contents, file: DataFile, pool: BufferPool, threads: int) -> bool:
    try:
        with closing(open_file(storage, file, contents.commit.id)) as reader:
            tasks = (BlockTask(file, reader, number, []) for number in range(len(file.entry.blocks)))
            check_blocks(contents, tasks, lambda task, raw: None, pool=pool, threads=threads)
    except (IntegrityError, FormatError):
        return False
    return True


def may_be_lent(storage: Storage, record: CommitRecord, file: FileEntry) -> bool:
    """Whether ``file`` of a checkpoint of an earlier process may be borrowed from it.

    That process may have died before its own look: only an owner whose record is there even now, after that commit,
    can't be in the hands of somebody who doesn't know that it borrows.

    Raises:
        StorageError: the storage failed.
    """
    return file.owner == record.id or _is_committed(storage, file.owner)


def owners(id: CheckpointId, files: Sequence[FileFacts]) -> list[str]:
    """The other checkpoints in whose folders some of the files of ``id`` lie, in order."""
    return sorted({file.owner for file in files} - {str(id)}, key=parse_id)


def check_files(storage: Storage, id: CheckpointId, files: Sequence[FileFacts], *, requests: int = 1) -> None:
    """Nothing, if every file lies where it should; so many are asked for at a time.

    Raises:
        SaveFailedError: somebody who took this save for dead may have begun to collect it.
    """

    def check(file: FileFacts) -> None:
        key = file.key
        try:
            size = storage.size(key)
        except NotFoundError as error:
            raise SaveFailedError(
                f"{key} disappeared while {id} was being saved, as when prune takes it for a leftover; save again",
                id=str(id),
                step=id.step,
            ) from error
        if size != file.stored_bytes:
            raise SaveFailedError(f"{key} has {size} bytes, {file.stored_bytes} were written", id=str(id), step=id.step)

    run(iter(files), check, threads=requests)


def is_safe(storage: Storage, lender: CheckpointId, borrowed: Sequence[FileFacts]) -> bool:
    """Whether what ``borrowed`` names is there and nobody can be about to remove it; asked after the borrower's commit.

    Whoever removes the lender's own files lists the commits after its record is gone, and finds the borrower. Whoever
    removes what the lender borrows itself finds the lender as long as its record is there, and the borrower after that.
    A lender that is buried will be gone soon: its own files are better written anew.
    """
    buried = {entry.key for entry in storage.list(layout.TRASH)}
    if layout.tombstone_key(lender) in buried and any(file.owner == str(lender) for file in borrowed):
        return False
    return _is_committed(storage, str(lender)) and all(lies_there(storage, file) for file in borrowed)


def _is_committed(storage: Storage, id: str) -> bool:
    try:
        return isinstance(read_fate(storage, parse_id(id)), CommitRecord)
    except (NotFoundError, IntegrityError, FormatError):
        return False


def lies_there(storage: Storage, file: FileFacts) -> bool:
    """Whether an object of the right size is where ``file`` should be.

    Raises:
        StorageError: the storage failed.
    """
    try:
        return storage.size(file.key) == file.stored_bytes
    except (NotFoundError, IntegrityError):
        return False
