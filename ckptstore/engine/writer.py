"""Blocks onto storage: fill, digest, encode, write, a few blocks at a time."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from ckptstore.engine.collector import collector_paused
from ckptstore.engine.compressor import Compressor
from ckptstore.engine.plan import Block, PlannedFile
from ckptstore.engine.stage import Stage, Taken
from ckptstore.engine.workers import Meter, Turnstile, give_way, run
from ckptstore.format import layout
from ckptstore.format.digest import block_digest, new_hasher
from ckptstore.format.layout import CheckpointId
from ckptstore.format.records import BlockEntry, FileEntry, TensorTable
from ckptstore.storage.base import ObjectWriter, Slot, Storage


def write_files(
    storage: Storage,
    id: CheckpointId,
    stage: Stage,
    files: Sequence[PlannedFile],
    *,
    digest: str,
    compressor: Compressor,
    threads: int,
    meter: Meter,
) -> list[FileEntry]:
    """Write every block that ``stage`` still has, all of ``files``; durable on return.

    Raises:
        StorageError: nothing written here may be used; whoever called removes it.
        StateMoved: so does a tear.
    """
    writings = {file: _Writing(storage, id, file, digest, compressor) for file in files}

    def work(taken: Taken) -> None:
        writing = writings[taken.block.file]
        try:
            meter.add(writing.write_block(stage, taken))
        except BaseException as error:
            writing.turnstile.break_off(error)
            raise
        finally:
            stage.give_back(taken)

    try:
        run(stage.blocks(), work, threads=threads)
    except BaseException:
        for writing in writings.values():
            writing.abort()
        raise
    with collector_paused():
        return [writing.entry() for writing in writings.values()]


def equals(stage: Stage, file: PlannedFile, entry: FileEntry, *, digest: str, threads: int) -> bool:
    """Whether ``file`` has the very bytes that ``entry`` describes; ends at the first block that differs.

    Raises:
        StateMoved: a tensor was written to meanwhile.
    """
    if [block.raw for block in entry.blocks] != file.block_lengths or entry.prefix != file.prefix:
        return False

    def work(block: Block) -> None:
        hasher = new_hasher(digest)
        with stage.peek(block) as copy:
            if copy is None:
                file.hash_in_place(block.number, hasher)
            else:
                with memoryview(copy) as view, view[: block.length] as raw:
                    hasher.update(raw)
        if hasher.hexdigest() != entry.blocks[block.number].digest:
            raise _DifferentError

    try:
        run(file.blocks, work, threads=threads)
    except _DifferentError:
        return False
    # The header is in the first block; it doesn't tell what a tensor is that safetensors has no name for.
    table = TensorTable.of(file.stream.rows, file.shards)
    return (entry.tensors.logical, entry.tensors.shards) == (table.logical, table.shards)


class _DifferentError(Exception):
    pass


class _Writing:
    """One data file on its way."""

    def __init__(
        self, storage: Storage, id: CheckpointId, file: PlannedFile, digest: str, compressor: Compressor
    ) -> None:
        self.turnstile = Turnstile()
        self._storage, self._id, self._file = storage, id, file
        self._digest, self._compressor = digest, compressor
        self._blocks: list[BlockEntry | None] = [None] * len(file.block_lengths)
        self._blocks_left = len(self._blocks)
        self._slots: list[Slot] | None = None
        self._writer: ObjectWriter | None = None
        self._stored_bytes = 0
        self._lock = threading.Lock()

    def write_block(self, stage: Stage, taken: Taken) -> int:
        """Write one block; the last one finishes the file. Returns its raw bytes."""
        number, length = taken.block.number, taken.block.length
        with memoryview(taken.buffer) as view, view[:length] as raw:
            # Hashed before it is encoded or written, so that corruption on the way down is caught too.
            raw_digest = self._take(stage, taken, raw)
            segments = self._file.stream.segments(number)
            codec, stored = self._compressor.encode(raw, segments)
            writer, slot = self._place(number, len(stored))
            stored_digest = None if codec == "none" else block_digest(self._digest, stored)
            with self._compressor.timed_write(len(stored)):
                writer.write(slot, memoryview(stored))
            del stored
        entry = BlockEntry(
            raw=length,
            digest=raw_digest,
            offset=slot.offset,
            length=slot.length,
            codec=codec,
            stored_digest=stored_digest,
        )
        self._count(number, entry, writer)
        return length

    def entry(self) -> FileEntry:
        """The finished file's entry in the part."""
        return FileEntry(
            name=self._file.name,
            owner=str(self._id),
            prefix=self._file.prefix,
            stored_bytes=self._stored_bytes,
            tensors=TensorTable.of(self._file.stream.rows, self._file.shards),
            blocks=[block for block in self._blocks if block is not None],
        )

    def abort(self) -> None:
        if self._writer is not None:
            self._writer.abort()

    def _take(self, stage: Stage, taken: Taken, raw: memoryview) -> str:
        """Fill ``raw`` where it isn't yet, and return its digest."""
        hasher = new_hasher(self._digest)
        if taken.staged:
            # It has time, and training needs the cores. What lies in live memory must be read before the next step.
            give_way()
            hasher.update(raw)
        else:
            with stage.reading(taken.block):
                self._file.fill(taken.block.number, raw, hasher)
        return hasher.hexdigest()

    def _place(self, number: int, length: int) -> tuple[ObjectWriter, Slot]:
        fixed = not self._compressor.encodes
        with self._lock:
            if self._writer is None:
                size = self._file.stream.raw_bytes if fixed else None
                self._writer = self._storage.open_writer(layout.file_key(self._id, self._file.name), size=size)
                if fixed:
                    self._slots = [self._writer.reserve(n) for n in self._file.block_lengths]
            writer = self._writer
        if self._slots is not None:
            return writer, self._slots[number]
        return writer, self.turnstile.pass_in_turn(number, lambda: writer.reserve(length))

    def _count(self, number: int, entry: BlockEntry, writer: ObjectWriter) -> None:
        with self._lock:
            self._blocks[number] = entry
            self._blocks_left -= 1
            last = self._blocks_left == 0
        if last:
            self._stored_bytes = writer.finish()
