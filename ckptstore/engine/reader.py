"""Blocks from storage into memory: read, check, decode, copy; nothing unchecked reaches a tensor.

Works without torch: where bytes go is up to whoever asks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from functools import partial
from typing import NamedTuple, Protocol, TypeVar

from ckptstore.engine.buffers import BufferPool, copy_bytes
from ckptstore.engine.contents import Contents, DataFile, Rescue
from ckptstore.engine.workers import Meter, Progress, run
from ckptstore.errors import CheckpointError, FormatError, IntegrityError, NotFoundError, StorageError
from ckptstore.format.codecs import decode
from ckptstore.format.digest import block_digest
from ckptstore.format.records import BlockEntry
from ckptstore.format.regions import Region, Run, runs
from ckptstore.format.tensorfile import BLOCK_BYTES, ITEM_BYTES, Piece
from ckptstore.storage.base import ALIGNMENT, ObjectReader, Storage


class Taker(Protocol):
    """Who wants bytes of a tensor."""

    @property
    def region(self) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """Offset and shape of what it wants of the tensor, in stored elements; None: all of it."""


class Sink(Taker, Protocol):
    """Where a tensor's bytes go."""

    def host(self) -> memoryview: ...


T = TypeVar("T", bound=Taker)


class BlockTask(NamedTuple):
    """One block to be read, and the pieces of it that are wanted."""

    file: DataFile
    reader: ObjectReader
    number: int
    pieces: list[Piece]


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

    It gets what stands for the tensor in ``wanted``, and which bytes these are of what that wants: where they begin,
    and they themselves, which are gone when it returns.

    Raises:
        IntegrityError: a block is damaged, also when read a second time.
        StorageError: the backend failed.
    """
    plan = []
    for file in contents.files:
        takers = [wanted.get(file.name(row)) for row in range(len(file.stream.rows))]
        boxes = _boxes(contents, file, takers)
        if blocks := _wanted_blocks(file, takers, boxes):
            plan.append((file, takers, boxes, blocks))
    total = sum(file.entry.blocks[number].length for file, *_, blocks in plan for number, _ in blocks)
    meter = Meter(total, progress)
    for file, takers, boxes, blocks in plan:
        with closing(open_file(storage, file, contents.commit.id, rescue, at_once=False)) as reader:
            tasks = (BlockTask(file, reader, number, pieces) for number, pieces in blocks)
            deliver = partial(_deliver, takers, boxes, take, meter)
            check_blocks(contents, tasks, deliver, pool=pool, threads=threads, rescue=rescue)


class _Boxes(NamedTuple):
    """Where a stored tensor lies in the whole one, and what is wanted of that."""

    stored: Region
    target: Region
    item: int
    """Bytes of an element."""

    def runs(self, piece: Piece) -> Iterator[Run]:
        """Which bytes of a piece are wanted, and where they go."""
        return runs(self.stored, self.target, self.item, piece.begin, piece.begin + piece.length)


def _boxes(contents: Contents, file: DataFile, takers: Sequence[Taker | None]) -> dict[int, _Boxes]:
    """By row, what isn't a whole tensor for whom wants a whole one: of those there may be 100,000."""
    found: dict[int, _Boxes] = {}
    sharded = bool(file.entry.tensors.shards)
    for row, taker in enumerate(takers):
        if taker is None or not (sharded or taker.region is not None):
            continue
        region = taker.region
        target = Region.whole(contents.tensors[file.name(row)].shape) if region is None else Region(*region)
        found[row] = _Boxes(file.region(row), target, ITEM_BYTES[file.stream.rows[row].dtype])
    return found


def _wanted_blocks(
    file: DataFile, takers: Sequence[object], boxes: Mapping[int, _Boxes]
) -> list[tuple[int, list[Piece]]]:
    if all(taker is None for taker in takers):
        return []

    def is_wanted(piece: Piece) -> bool:
        if takers[piece.row] is None:
            return False
        return piece.row not in boxes or next(boxes[piece.row].runs(piece), None) is not None

    numbered = ((number, file.stream.pieces(number)) for number in range(len(file.entry.blocks)))
    found = [(number, [piece for piece in pieces if is_wanted(piece)]) for number, pieces in numbered]
    return [(number, pieces) for number, pieces in found if pieces]


def _deliver(
    takers: Sequence[T | None],
    boxes: Mapping[int, _Boxes],
    take: Callable[[T, int, memoryview], None],
    meter: Meter,
    task: BlockTask,
    raw: memoryview,
) -> None:
    for piece in task.pieces:
        taker = takers[piece.row]
        assert taker is not None
        if piece.row not in boxes:
            take(taker, piece.begin, raw[piece.offset : piece.offset + piece.length])
            continue
        for source, target, length in boxes[piece.row].runs(piece):
            at = piece.offset + source - piece.begin
            take(taker, target, raw[at : at + length])
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
                raw = read_block(contents, task, buffers, rescue)
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


def read_block(contents: Contents, task: BlockTask, buffers: list[memoryview], rescue: Rescue | None) -> memoryview:
    """A block's raw bytes, checked, in the last of ``buffers``, 16 MiB each: two where it is encoded.

    Raises:
        IntegrityError, FormatError: it is damaged everywhere.
        StorageError: the backend failed.
    """
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
