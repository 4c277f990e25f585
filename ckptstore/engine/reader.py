"""Blocks from storage into memory: read, check, decode, copy; nothing unchecked reaches a tensor.

Works without torch: where bytes go is up to whoever asks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Literal, NamedTuple, Protocol, TypeVar

from ckptstore.engine.buffers import BufferPool, copy_bytes
from ckptstore.engine.workers import Meter, Progress, run
from ckptstore.errors import CheckpointError, FormatError, IntegrityError, NotFoundError, StorageError
from ckptstore.format import layout
from ckptstore.format.codecs import decode
from ckptstore.format.digest import block_digest, sha256
from ckptstore.format.layout import parse_id
from ckptstore.format.records import (
    MANIFEST_LIMIT,
    PART_LIMIT,
    BlockEntry,
    CommitRecord,
    FileEntry,
    ManifestRecord,
    PartRecord,
    Sealed256,
    parse,
)
from ckptstore.format.tensorfile import BLOCK_BYTES, Piece, TensorFile, TensorRow
from ckptstore.storage.base import ALIGNMENT, ObjectReader, Storage

T = TypeVar("T")


class Sink(Protocol):
    """Where a tensor's bytes go."""

    def host(self) -> memoryview: ...


@dataclass(frozen=True)
class DataFile:
    """One data file of a checkpoint, as its part describes it."""

    entry: FileEntry
    stream: TensorFile

    @property
    def key(self) -> str:
        return self.entry.key

    def name(self, index: int) -> str:
        """Full name in the state of tensor number ``index``."""
        return self.entry.prefix + self.entry.tensors.names[index]

    def names_in(self, block: int) -> list[str]:
        """The tensors that have bytes in block number ``block``."""
        return [self.name(piece.row) for piece in self.stream.pieces(block)]


@dataclass(frozen=True)
class Contents:
    """What a checkpoint holds, after manifest and parts were proven against the commit record."""

    commit: CommitRecord
    digest: Literal["blake3", "sha256"]
    parts: Sequence[PartRecord]

    @cached_property
    def files(self) -> list[DataFile]:
        return [self._file(part, entry) for part in self.parts for entry in part.files]

    @cached_property
    def tensors(self) -> dict[str, TensorRow]:
        """Every tensor's stored form by its full name in the state."""
        found: dict[str, TensorRow] = {}
        for file in self.files:
            for row in file.stream.rows:
                if found.setdefault(file.entry.prefix + row.name, row) is not row:
                    raise FormatError(f"{self.commit.id} lists tensor {row.name[:80]!r} twice", id=self.commit.id)
        return found

    def _file(self, part: PartRecord, entry: FileEntry) -> DataFile:
        id = self.commit.id
        key = layout.part_key(parse_id(id), part.rank)
        if entry.owner not in (id, *self.commit.lenders):
            # Only those named there are kept for its sake.
            raise FormatError(
                f"{key} borrows from {entry.owner}, which is no lender in the commit record", id=id, key=key
            )
        try:
            return DataFile(entry, entry.layout())
        except FormatError as error:
            raise FormatError(f"{key} is malformed: {error}", id=id, key=key) from error


class Rescue(Protocol):
    """Where else the bytes of a damaged object lie; see ``rescue.Rescuer``."""

    def record(self, key: str, wanted: Sealed256, id: str, *, limit: int, error: IntegrityError) -> bytes | None:
        """The manifest or part that ``key`` should be; ``error`` is what is wrong with it."""

    def readers(self, file: DataFile, id: str) -> Iterator[ObjectReader]:
        """The same data file in other places, one after the other, as long as it is asked for."""

    def rescued(self, contents: Contents, file: DataFile, block: int, error: IntegrityError) -> None:
        """Told of each block that came from such a place."""


class BlockTask(NamedTuple):
    """One block to be read, and the pieces of it that are wanted."""

    file: DataFile
    reader: ObjectReader
    number: int
    pieces: list[Piece]


def read_contents(storage: Storage, commit: CommitRecord, rescue: Rescue | None = None) -> Contents:
    """Manifest and parts of a committed checkpoint, each checked against who points at it.

    ``rescue`` is asked for what is damaged or missing.

    Raises:
        IntegrityError: missing, or other bytes than were committed.
        FormatError: malformed or of a newer format.
    """
    id = parse_id(commit.id)
    key = layout.manifest_key(id)
    data = read_or_rescue(storage, key, commit.manifest, commit.id, MANIFEST_LIMIT, rescue)
    manifest = parse(data, key, ManifestRecord, limit=MANIFEST_LIMIT)
    if (manifest.id, manifest.store_id, manifest.world_size) != (commit.id, commit.store_id, commit.world_size):
        raise IntegrityError(f"{key} belongs to checkpoint {manifest.id}", id=commit.id, key=key)
    parts = []
    for wanted in manifest.parts:
        key = layout.part_key(id, wanted.rank)
        data = read_or_rescue(storage, key, wanted, commit.id, PART_LIMIT, rescue)
        part = parse(data, key, PartRecord, limit=PART_LIMIT)
        if (part.id, part.rank) != (commit.id, wanted.rank):
            raise IntegrityError(f"{key} belongs to rank {part.rank} of {part.id}", id=commit.id, key=key)
        parts.append(part)
    return Contents(commit, manifest.digest, parts)


def read_or_rescue(storage: Storage, key: str, wanted: Sealed256, id: str, limit: int, rescue: Rescue | None) -> bytes:
    """``read_sealed``, or what ``rescue`` has where it is missing or damaged.

    Raises:
        IntegrityError, FormatError: as ``read_sealed``, and nobody else has it.
    """
    try:
        return read_sealed(storage, key, wanted, id, limit=limit)
    except IntegrityError as error:
        data = rescue.record(key, wanted, id, limit=limit, error=error) if rescue is not None else None
        if data is None:
            raise
        return data


def read_sealed(storage: Storage, key: str, wanted: Sealed256, id: str, *, limit: int) -> bytes:
    """The record under ``key``, if it is the one that is ``wanted``.

    Raises:
        IntegrityError: missing, or it has other bytes.
        FormatError: it is said to have more than ``limit`` bytes.
    """
    if wanted.size > limit:
        raise FormatError(f"{key} is said to have {wanted.size} bytes, more than the {limit} allowed", id=id, key=key)
    try:
        data, size = _read_at_most(storage, key, wanted.size)
        if size == wanted.size and sha256(data) != wanted.sha256:
            # A flip on the way up heals by itself, one on the disk does not.
            data, size = _read_at_most(storage, key, wanted.size)
    except NotFoundError as error:
        raise IntegrityError(f"{key} is missing", id=id, key=key) from error
    if size != wanted.size:
        raise IntegrityError(
            f"{key} has {size} bytes, {wanted.size} were saved", id=id, key=key, expected=wanted.size, actual=size
        )
    actual = sha256(data)
    if actual != wanted.sha256:
        raise IntegrityError(
            f"{key} is damaged: its SHA-256 differs", id=id, key=key, expected=wanted.sha256, actual=actual
        )
    return data


def _read_at_most(storage: Storage, key: str, limit: int) -> tuple[bytes, int]:
    """An object and its size; nothing of one that is longer than ``limit``."""
    try:
        # Its size is not asked for beforehand: that would be a second request, and may take as long as the first.
        data = storage.read(key, limit=limit)
    except FormatError:
        return b"", storage.size(key)
    return data, len(data)


class _Lost:
    """A data file of which nothing can be had here."""

    def __init__(self, error: IntegrityError) -> None:
        self.size, self._error = 0, error

    def read_into(self, offset: int, buffer: memoryview) -> int:
        raise self._error

    def close(self) -> None:
        pass


def open_file(
    storage: Storage, file: DataFile, id: str, rescue: Rescue | None = None, *, at_once: bool = True
) -> ObjectReader:
    """A data file, opened; one that is lost, too, where there is a ``rescue`` for each of its blocks.

    Without ``at_once`` the first read may tell what is wrong, which spares a request.

    Raises:
        IntegrityError: missing, or longer or shorter than it was saved.
    """
    try:
        return _open_whole(storage, file, id, at_once, partly=rescue is not None)
    except IntegrityError as error:
        if rescue is None:
            raise
        return _Lost(error)


def _open_whole(storage: Storage, file: DataFile, id: str, at_once: bool, *, partly: bool) -> ObjectReader:
    """``partly``: also what is left of one that was cut off, whose end is found to be damaged when it is read."""
    try:
        reader = storage.open_reader(file.key, size=None if at_once else file.entry.stored_bytes)
    except NotFoundError as error:
        raise IntegrityError(f"{file.key} is missing", id=id, key=file.key) from error
    if reader.size != file.entry.stored_bytes and not (partly and reader.size < file.entry.stored_bytes):
        size = reader.size
        reader.close()
        raise IntegrityError(
            f"{file.key} has {size} bytes, {file.entry.stored_bytes} were saved",
            id=id,
            key=file.key,
            expected=file.entry.stored_bytes,
            actual=size,
        )
    return reader


def read_tensors(
    storage: Storage,
    contents: Contents,
    wanted: Mapping[str, Sink],
    *,
    pool: BufferPool,
    threads: int,
    progress: Progress | None = None,
    rescue: Rescue | None = None,
) -> None:
    """Bring the bytes of the ``wanted`` tensors into their sinks, reading only the blocks that hold them.

    Raises:
        IntegrityError: a block is damaged, also when read a second time; sinks may be partly filled.
        StorageError: the backend failed.
    """

    def put(sink: Sink, begin: int, data: memoryview) -> None:
        copy_bytes(sink.host()[begin : begin + len(data)], data)

    read_pieces(storage, contents, wanted, put, pool=pool, threads=threads, progress=progress, rescue=rescue)


def read_pieces(
    storage: Storage,
    contents: Contents,
    wanted: Mapping[str, T],
    take: Callable[[T, int, memoryview], None],
    *,
    pool: BufferPool,
    threads: int,
    progress: Progress | None = None,
    rescue: Rescue | None = None,
) -> None:
    """Read the blocks that hold the ``wanted`` tensors, and call ``take`` for each piece of one, from any thread.

    It gets what stands for the tensor in ``wanted``, and which bytes of the tensor these are: where they begin, and
    they themselves, which are gone when it returns.

    Raises:
        IntegrityError: a block is damaged, also when read a second time.
        StorageError: the backend failed.
    """
    plan = []
    for file in contents.files:
        takers = [wanted.get(file.name(row)) for row in range(len(file.stream.rows))]
        if blocks := _wanted_blocks(file, takers):
            plan.append((file, takers, blocks))
    total = sum(file.entry.blocks[number].length for file, _, blocks in plan for number, _ in blocks)
    meter = Meter(total, progress)
    for file, takers, blocks in plan:
        with closing(open_file(storage, file, contents.commit.id, rescue, at_once=False)) as reader:
            tasks = (BlockTask(file, reader, number, pieces) for number, pieces in blocks)
            deliver = partial(_deliver, takers, take, meter)
            check_blocks(contents, tasks, deliver, pool=pool, threads=threads, rescue=rescue)


def _wanted_blocks(file: DataFile, takers: Sequence[object]) -> list[tuple[int, list[Piece]]]:
    if all(taker is None for taker in takers):
        return []
    numbered = ((number, file.stream.pieces(number)) for number in range(len(file.entry.blocks)))
    found = [(number, [piece for piece in pieces if takers[piece.row] is not None]) for number, pieces in numbered]
    return [(number, pieces) for number, pieces in found if pieces]


def _deliver(
    takers: Sequence[T | None],
    take: Callable[[T, int, memoryview], None],
    meter: Meter,
    task: BlockTask,
    raw: memoryview,
) -> None:
    for row, begin, length, offset in task.pieces:
        taker = takers[row]
        assert taker is not None
        take(taker, begin, raw[offset : offset + length])
    meter.add(task.file.entry.blocks[task.number].length)


def check_blocks(
    contents: Contents,
    tasks: Iterator[BlockTask],
    deliver: Callable[[BlockTask, memoryview], None],
    *,
    pool: BufferPool,
    threads: int,
    damaged: Callable[[BlockTask, CheckpointError], None] | None = None,
    rescue: Rescue | None = None,
) -> None:
    """Read and check blocks in parallel; ``deliver`` gets each one's raw bytes, ``damaged`` each one's error.

    What ``rescue`` finds elsewhere is delivered, and no error.

    Raises:
        IntegrityError, FormatError: the first damaged block, where ``damaged`` isn't given.
    """

    def work(task: BlockTask) -> None:
        encoded = task.file.entry.blocks[task.number].codec != "none"
        with pool.lease(2 if encoded else 1) as buffers:
            try:
                raw = _read_block(contents, task, buffers, rescue)
            except (IntegrityError, FormatError) as error:
                # Storage doesn't know whose bytes they are.
                error.id = error.id or contents.commit.id
                if damaged is None:
                    raise
                damaged(task, error)
                return
            deliver(task, raw)
            raw.release()

    run(tasks, work, threads=min(threads, pool.buffers))


def _read_block(contents: Contents, task: BlockTask, buffers: list[memoryview], rescue: Rescue | None) -> memoryview:
    entry = task.file.entry.blocks[task.number]
    stored = read_stored(contents, task, buffers[0], rescue)
    raw = stored if entry.codec == "none" else buffers[1][: entry.raw]
    if raw is not stored:
        _decode(contents, task, stored, raw)
        _check(contents, task, entry.digest, raw)
    head = task.file.stream.header_part(task.number)
    if raw[: len(head)] != head:
        raise FormatError(
            f"{task.file.key} begins with another header than its part describes",
            id=contents.commit.id,
            key=task.file.key,
        )
    return raw


def read_stored(contents: Contents, task: BlockTask, buffer: memoryview, rescue: Rescue | None = None) -> memoryview:
    """A block as it is stored, checked, in ``buffer`` of 16 MiB; ``rescue`` is asked where it is damaged here.

    Raises:
        IntegrityError: it is damaged everywhere.
        StorageError: the backend failed.
    """
    entry, id = task.file.entry.blocks[task.number], contents.commit.id
    # A flip on the way up heals by itself, one on the disk does not.
    with suppress(IntegrityError):
        return _read_checked(contents, task, entry, buffer)
    try:
        return _read_checked(contents, task, entry, buffer)
    except IntegrityError as error:
        for reader in rescue.readers(task.file, id) if rescue is not None else ():
            with suppress(IntegrityError, StorageError):
                stored = _read_checked(contents, task._replace(reader=reader), entry, buffer)
                assert rescue is not None
                rescue.rescued(contents, task.file, task.number, error)
                return stored
        raise


def _decode(contents: Contents, task: BlockTask, stored: memoryview, raw: memoryview) -> None:
    try:
        decode(task.file.entry.blocks[task.number].codec, stored, raw, task.file.stream.segments(task.number))
    except FormatError as error:
        key = task.file.key
        raise FormatError(f"block {task.number} of {key}: {error}", id=contents.commit.id, key=key) from error


def _read_checked(contents: Contents, task: BlockTask, entry: BlockEntry, buffer: memoryview) -> memoryview:
    # Whole pages, so that direct I/O serves the last block too; a block is at most the buffer.
    padded = min(-(-entry.length // ALIGNMENT) * ALIGNMENT, BLOCK_BYTES)
    count = task.reader.read_into(entry.offset, buffer[:padded])
    if count < entry.length:
        raise _damage(contents, task, entry.length, count, f"ends after {count} of {entry.length} bytes")
    stored = buffer[: entry.length]
    _check(contents, task, entry.stored_digest or entry.digest, stored)
    return stored


def _check(contents: Contents, task: BlockTask, expected: str, data: memoryview) -> None:
    actual = block_digest(contents.digest, data)
    if actual != expected:
        raise _damage(contents, task, expected, actual, "has other bytes than were saved")


def _damage(contents: Contents, task: BlockTask, expected: str | int, actual: str | int, what: str) -> IntegrityError:
    names = task.file.names_in(task.number)
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return IntegrityError(
        f"block {task.number} of {task.file.key} {what}; it holds {shown or 'the header'}",
        id=contents.commit.id,
        key=task.file.key,
        block=task.number,
        expected=expected,
        actual=actual,
    )
