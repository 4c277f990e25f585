"""How fast blocks go to a storage and come back, with several in flight: plain random bytes, nothing hashed."""

from __future__ import annotations

import mmap
import secrets
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from ckptstore.engine.buffers import BufferPool
from ckptstore.errors import IntegrityError, NotFoundError
from ckptstore.format.tensorfile import BLOCK_BYTES
from ckptstore.storage.base import ALIGNMENT, Storage

# Each block is another window on the same random bytes, a page further.
_WINDOWS = 256

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Speed:
    """What one object took.

    Attributes:
        in_flight: blocks under way at once.
        write_s: seconds until it was durable.
        read_s: seconds to read it cold, or None where it didn't come back as written.
    """

    in_flight: int
    write_s: float
    read_s: float | None


class BlockObject:
    """Random bytes in blocks of 16 MiB, as one large object; the last block may be shorter.

    Args:
        size_bytes: of the object.
        in_flight: most blocks ever under way at once.
    """

    def __init__(self, size_bytes: int, in_flight: int) -> None:
        self.size_bytes = size_bytes
        self._numbers = range(-(-size_bytes // BLOCK_BYTES))
        random = mmap.mmap(-1, BLOCK_BYTES + _WINDOWS * ALIGNMENT)
        random[:] = secrets.token_bytes(len(random))
        self._random = memoryview(random)
        self._pool = BufferPool(in_flight * BLOCK_BYTES)

    def measure(self, storage: Storage, key: str, marker: str, in_flight: int) -> Speed:
        """Write it at ``key``, compare it, read it.

        Args:
            marker: a free key in the same folder.

        Raises:
            StorageError: the storage failed.
            ExistsError: a key is taken.
        """
        cached = storage.capabilities.in_flight is None
        begin = time.perf_counter()
        self._write(storage, key, in_flight)
        # An object's name is durable only after the next creation in its folder.
        storage.create(marker, b"")
        written_s = time.perf_counter() - begin
        begin = time.perf_counter()
        # Where the page cache is not bypassed, this read also empties it: the storage keeps nothing that it read.
        if not self._is_whole(storage, key, in_flight):
            return Speed(in_flight, written_s, None)
        if cached:
            begin = time.perf_counter()
            self._read(storage, key, in_flight, lambda number, block: True)
        # What is far away is never cached, and each byte that it sends may cost money: there the first read counts.
        return Speed(in_flight, written_s, time.perf_counter() - begin)

    def _block(self, number: int) -> memoryview:
        begin = number % _WINDOWS * ALIGNMENT
        return self._random[begin : begin + min(BLOCK_BYTES, self.size_bytes - number * BLOCK_BYTES)]

    def _write(self, storage: Storage, key: str, in_flight: int) -> None:
        writer = storage.open_writer(key, size=self.size_bytes)
        try:
            slots = [writer.reserve(self._block(number).nbytes) for number in self._numbers]
            _in_parallel(in_flight, lambda slot: writer.write(slot, self._block(slot.number)), slots)
            writer.finish()
        except BaseException:
            writer.abort()
            raise

    def _is_whole(self, storage: Storage, key: str, in_flight: int) -> bool:
        def is_same(number: int, block: memoryview) -> bool:
            expected = np.frombuffer(self._block(number), np.uint8)
            return np.array_equal(np.frombuffer(block, np.uint8), expected)

        try:
            return storage.size(key) == self.size_bytes and self._read(storage, key, in_flight, is_same)
        except (NotFoundError, IntegrityError):
            return False

    def _read(self, storage: Storage, key: str, in_flight: int, is_right: Callable[[int, memoryview], bool]) -> bool:
        """Whether every block had its full length and ``is_right(number, block)``."""
        reader = storage.open_reader(key)

        def read(number: int) -> bool:
            length = self._block(number).nbytes
            with self._pool.lease() as (buffer,):
                count = reader.read_into(number * BLOCK_BYTES, buffer[:length])
                return count == length and is_right(number, buffer[:length])

        try:
            return all(_in_parallel(in_flight, read, self._numbers))
        finally:
            reader.close()


def _in_parallel(threads: int, work: Callable[[_T], object], items: Iterable[_T]) -> list[object]:
    with ThreadPoolExecutor(threads) as pool:
        try:
            return list(pool.map(work, items))
        finally:
            # After an error or Ctrl-C only what is under way comes to its end.
            pool.shutdown(wait=False, cancel_futures=True)
