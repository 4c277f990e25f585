"""Any bytes of any tensor of a checkpoint, in any order: verified, a few blocks in memory at a time.

Works without torch. Who reads tensors in the order in which they are stored, reads each block once.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

from ckptstore.engine.buffers import Buffer, BufferPool, copy_bytes
from ckptstore.engine.contents import Contents, DataFile, Rescue
from ckptstore.engine.reader import BlockTask, open_file, read_block
from ckptstore.errors import NotFoundError
from ckptstore.format.regions import Region, runs
from ckptstore.format.tensorfile import BLOCK_BYTES, ITEM_BYTES, TensorRow
from ckptstore.storage.base import ObjectReader, Storage

CACHE_BYTES = 256 << 20
_ENCODED_BYTES = 64 << 20
"""For blocks that are being decoded."""

_Key: TypeAlias = tuple[int, str, int]


class _Slot:
    """A block in the cache."""

    def __init__(self, buffer: Buffer) -> None:
        self.buffer = buffer
        self.users = 1
        self.filled = self.lost = False


class BlockCache:
    """Decoded blocks, the least recently used of which give way to others; any thread.

    Args:
        total_bytes: upper bound of the memory for them; at least one block.
    """

    def __init__(self, total_bytes: int = CACHE_BYTES) -> None:
        self.encoded = BufferPool(_ENCODED_BYTES)
        self._room = max(1, total_bytes // BLOCK_BYTES)
        self._pool = BufferPool(max(2, self._room) * BLOCK_BYTES)
        self._slots: OrderedDict[_Key, _Slot] = OrderedDict()
        self._changed = threading.Condition()

    @contextmanager
    def block(self, key: _Key, fill: Callable[[memoryview], None]) -> Iterator[memoryview]:
        """The block ``key``, which ``fill`` reads where it isn't here. A thread may use one at a time."""
        slot = self._enter(key)
        try:
            if not slot.filled:
                self._fill(key, slot, fill)
            with memoryview(slot.buffer) as view:
                yield view
        finally:
            self._leave(slot)

    def drop(self, reader: int) -> None:
        """Forget all that a reader has read."""
        with self._changed:
            for key in [key for key in self._slots if key[0] == reader]:
                self._pool.give_back(self._slots.pop(key).buffer)

    def _enter(self, key: _Key) -> _Slot:
        with self._changed:
            while True:
                slot = self._slots.get(key)
                if slot is None:
                    if self._has_room():
                        slot = self._slots[key] = _Slot(self._pool.take())
                        return slot
                elif slot.filled:
                    self._slots.move_to_end(key)
                    slot.users += 1
                    return slot
                # It is being read, or all are in use.
                self._changed.wait()

    def _has_room(self) -> bool:
        if len(self._slots) < self._room:
            return True
        idle = next((key for key, slot in self._slots.items() if not slot.users), None)
        if idle is not None:
            self._pool.give_back(self._slots.pop(idle).buffer)
        return idle is not None

    def _fill(self, key: _Key, slot: _Slot, fill: Callable[[memoryview], None]) -> None:
        try:
            with memoryview(slot.buffer) as view:
                fill(view)
        except BaseException:
            with self._changed:
                # Whoever waits for it tries by himself.
                del self._slots[key]
                slot.lost = True
                self._changed.notify_all()
            raise
        with self._changed:
            slot.filled = True
            self._changed.notify_all()

    def _leave(self, slot: _Slot) -> None:
        with self._changed:
            slot.users -= 1
            if slot.lost:
                self._pool.give_back(slot.buffer)
            self._changed.notify_all()


class Place(NamedTuple):
    """A stored tensor: all of one, or a shard."""

    file: DataFile
    row: int
    region: Region


class TensorReader:
    """Reads tensors of one checkpoint; made by ``Store.reader``.

    Attributes:
        contents: what the checkpoint holds.
        tree: all that is no tensor; of several ranks, as one.
    """

    def __init__(
        self, storage: Storage, contents: Contents, tree: Any, cache: BlockCache, rescue: Rescue | None = None
    ) -> None:
        self.contents, self.tree = contents, tree
        self._storage, self._cache, self._rescue = storage, cache, rescue
        self._open: dict[str, ObjectReader] = {}
        self._lock = threading.Lock()
        self._read_bytes = 0

    @property
    def tensors(self) -> Mapping[str, TensorRow]:
        """All of them by their names, as stored; those in shards as a whole."""
        return self.contents.tensors

    @property
    def read_bytes(self) -> int:
        """Stored bytes that were read so far; a block that had to be read anew counts twice."""
        return self._read_bytes

    def close(self) -> None:
        """Close the files, and give back the memory."""
        self._cache.drop(id(self))
        for reader in self._open.values():
            reader.close()
        self._open.clear()

    def places(self, name: str) -> Sequence[Place]:
        """Where a tensor is stored: in one place, or its shards in several."""
        return self._places[name]

    def read_into(self, name: str, offset: int, out: memoryview) -> None:
        """Copy bytes ``[offset, offset + len(out))`` of a tensor's C-order image into ``out``; any thread.

        Raises:
            NotFoundError: there is no such tensor.
            ValueError: it has fewer bytes.
            IntegrityError: a block is damaged.
            StorageError: the storage failed.
        """
        for at, view in self.views(name, offset, len(out)):
            copy_bytes(out[at - offset : at - offset + len(view)], view)

    def views(self, name: str, offset: int, length: int) -> Generator[tuple[int, memoryview], None, None]:
        """The same bytes where they lie, piece by piece, with the place of each piece's first byte in the image.

        In order, but for a tensor in shards. A piece is gone when the next one is asked for, and until then its thread
        may read nothing else from the same cache.

        Raises:
            NotFoundError, ValueError, IntegrityError, StorageError: as ``read_into``.
        """
        row = self.tensors.get(name)
        if row is None:
            raise NotFoundError(f"{self.contents.commit.id} has no tensor {name!r:.100}", id=self.contents.commit.id)
        if not 0 <= offset <= offset + length <= row.nbytes:
            raise ValueError(f"{name}: {length} bytes at {offset} are outside of {row.nbytes}")
        places = self._places[name]
        if places[0].region.shape == row.shape:
            yield from self._pieces(places[0], offset, length, offset)
            return
        whole, item = Region.whole(row.shape), ITEM_BYTES[row.dtype]
        for place in places:
            for source, target, count in runs(whole, place.region, item, offset, offset + length):
                yield from self._pieces(place, target, count, source)

    @cached_property
    def _places(self) -> dict[str, list[Place]]:
        found: dict[str, list[Place]] = {}
        for file in self.contents.files:
            for row in range(len(file.stream.rows)):
                found.setdefault(file.name(row), []).append(Place(file, row, file.region(row)))
        return found

    def _pieces(self, place: Place, offset: int, length: int, first: int) -> Iterator[tuple[int, memoryview]]:
        """Bytes of a stored tensor from ``offset`` on; the first one is number ``first`` to whoever asks."""
        at, done = place.file.stream.begins[place.row] + offset, 0
        while done < length:
            number, begin = divmod(at + done, BLOCK_BYTES)
            count = min(BLOCK_BYTES - begin, length - done)
            with self._cache.block((id(self), place.file.key, number), self._filler(place.file, number)) as raw:
                yield first + done, raw[begin : begin + count]
            done += count

    def _filler(self, file: DataFile, number: int) -> Callable[[memoryview], None]:
        def fill(buffer: memoryview) -> None:
            task = BlockTask(file, self._opened(file), number, [])
            entry = file.entry.blocks[number]
            if entry.codec == "none":
                read_block(self.contents, task, [buffer], self._rescue).release()
            else:
                with self._cache.encoded.lease() as (encoded,):
                    read_block(self.contents, task, [encoded, buffer], self._rescue).release()
            with self._lock:
                self._read_bytes += entry.length

        return fill

    def _opened(self, file: DataFile) -> ObjectReader:
        with self._lock:
            if file.key not in self._open:
                self._open[file.key] = open_file(
                    self._storage, file, self.contents.commit.id, self._rescue, at_once=False
                )
            return self._open[file.key]
