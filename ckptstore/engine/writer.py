"""Tensors into blocks, blocks onto storage: fill, digest, encode, write, a few blocks at a time."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

from ckptstore.engine.buffers import BufferPool
from ckptstore.engine.collector import collector_paused
from ckptstore.engine.workers import Meter, Progress, Turnstile, run
from ckptstore.format import layout
from ckptstore.format.codecs import Compression, encode
from ckptstore.format.digest import block_digest
from ckptstore.format.layout import CheckpointId
from ckptstore.format.records import BlockEntry, FileEntry, TensorTable
from ckptstore.format.tensorfile import TensorFile, TensorRow, storage_order
from ckptstore.storage.base import ObjectWriter, Slot, Storage


class Spec(Protocol):
    """What a tensor is called and how it is stored."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def logical(self) -> str | None: ...


class Source(Protocol):
    """A tensor whose bytes can be taken."""

    @property
    def spec(self) -> Spec: ...
    def read_into(self, offset: int, out: memoryview) -> None: ...
    def release(self) -> None: ...


def write_files(
    storage: Storage,
    id: CheckpointId,
    sources: Sequence[Source],
    *,
    digest: str,
    compression: Compression,
    pool: BufferPool,
    threads: int,
    progress: Progress | None = None,
) -> list[FileEntry]:
    """Write one data file for each top-level component of the state; durable on return.

    Raises:
        StorageError: nothing written here may be used; whoever called removes it.
    """
    with collector_paused():
        files = _plan(id, sources, compression)
    total = sum(file.stream.raw_bytes for file in files)
    meter = Meter(total, progress)

    def work(task: tuple[_File, int]) -> None:
        file, block = task
        try:
            meter.add(file.write_block(storage, block, digest, compression, pool))
        except BaseException as error:
            file.turnstile.break_off(error)
            raise

    try:
        tasks = [(file, block) for file in files for block in range(len(file.stream.block_lengths))]
        run(tasks, work, threads=min(threads, pool.buffers))
    except BaseException:
        for file in files:
            file.abort()
        raise
    with collector_paused():
        return [file.entry() for file in files]


def _plan(id: CheckpointId, sources: Sequence[Source], compression: Compression) -> list[_File]:
    suffix = ".safetensors" if compression.codec == "none" else ".blocks"
    by_prefix: dict[str, list[Source]] = {}
    for source in sources:
        component, slash, _ = source.spec.name.partition("/")
        by_prefix.setdefault(component + slash if slash else "", []).append(source)
    taken: set[str] = set()
    return [
        _File(id, layout.file_name(prefix.rstrip("/") or "state", taken, suffix=suffix), prefix, members)
        for prefix, members in by_prefix.items()
    ]


class _File:
    """One data file on its way."""

    def __init__(self, id: CheckpointId, name: str, prefix: str, sources: Sequence[Source]) -> None:
        self.id, self.name, self.prefix = id, name, prefix
        by_name = {source.spec.name.removeprefix(prefix): source for source in sources}
        rows = storage_order(
            TensorRow(n, s.spec.dtype, tuple(s.spec.shape), s.spec.logical) for n, s in by_name.items()
        )
        self.sources = [by_name[row.name] for row in rows]
        self.stream = TensorFile.of(rows)
        self.turnstile = Turnstile()
        self._blocks: list[BlockEntry | None] = [None] * len(self.stream.block_lengths)
        self._bytes_left = [end - begin for begin, end in pairwise(self.stream.begins)]
        self._slots: list[Slot] | None = None
        self._writer: ObjectWriter | None = None
        self._blocks_left = len(self._blocks)
        self._stored_bytes = 0
        self._lock = threading.Lock()

    def write_block(
        self, storage: Storage, number: int, digest: str, compression: Compression, pool: BufferPool
    ) -> int:
        """Take block ``number`` from the live tensors and write it; the last one finishes the file."""
        length = self.stream.block_lengths[number]
        with pool.lease() as [buffer]:
            raw = buffer[:length]
            self._fill(raw, number)
            # Hashed before it is encoded or written, so that corruption on the way down is caught too.
            raw_digest = block_digest(digest)(raw)
            codec, stored = encode(raw, compression)
            writer, slot = self._place(storage, number, len(stored), fixed=compression.codec == "none")
            stored_digest = None if codec == "none" else block_digest(digest)(stored)
            writer.write(slot, memoryview(stored))
            raw.release()
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
            name=self.name,
            owner=str(self.id),
            prefix=self.prefix,
            stored_bytes=self._stored_bytes,
            tensors=TensorTable.of(self.stream.rows),
            blocks=[block for block in self._blocks if block is not None],
        )

    def abort(self) -> None:
        if self._writer is not None:
            self._writer.abort()
        for source in self.sources:
            source.release()

    def _fill(self, raw: memoryview, number: int) -> None:
        head = self.stream.header_part(number)
        raw[: len(head)] = head
        pieces = self.stream.pieces(number)
        for index, begin, length, offset in pieces:
            self.sources[index].read_into(begin, raw[offset : offset + length])
        with self._lock:
            for index, _, length, _ in pieces:
                self._bytes_left[index] -= length
        for index, *_ in pieces:
            if self._bytes_left[index] == 0:
                self.sources[index].release()

    def _place(self, storage: Storage, number: int, length: int, *, fixed: bool) -> tuple[ObjectWriter, Slot]:
        with self._lock:
            if self._writer is None:
                size = self.stream.raw_bytes if fixed else None
                self._writer = storage.open_writer(layout.file_key(self.id, self.name), size=size)
                if fixed:
                    self._slots = [self._writer.reserve(n) for n in self.stream.block_lengths]
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
