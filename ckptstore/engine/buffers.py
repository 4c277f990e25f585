"""The bounded pool of aligned buffers through which every byte goes, both ways."""

from __future__ import annotations

import mmap
import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from ckptstore.errors import StorageError
from ckptstore.format.tensorfile import BLOCK_BYTES

POOL_BYTES = 64 << 20
_GIL_WORTH_RELEASING_BYTES = 1 << 16


class BufferPool:
    """Buffers of one block each, page-aligned, allocated when first needed and used again.

    Args:
        total_bytes: upper bound of the memory held; at least two blocks.
    """

    def __init__(self, total_bytes: int = POOL_BYTES) -> None:
        self.buffers = max(2, total_bytes // BLOCK_BYTES)
        self.forget()
        _pools.add(self)

    def forget(self) -> None:
        """Begin anew, with no buffer allocated and none on lease."""
        self._unallocated = self.buffers
        self._free: list[mmap.mmap] = []
        self._changed = threading.Condition()

    @contextmanager
    def lease(self, count: int = 1) -> Iterator[list[memoryview]]:
        """``count`` buffers of 16 MiB, taken all at once so that two leases can't wait for each other."""
        maps = self._take(count)
        views = [memoryview(m) for m in maps]
        try:
            yield views
        finally:
            for view in views:
                view.release()
            with self._changed:
                self._free += maps
                self._changed.notify_all()

    def _take(self, count: int) -> list[mmap.mmap]:
        with self._changed:
            self._changed.wait_for(lambda: len(self._free) + self._unallocated >= count)
            while len(self._free) < count:
                # Anonymous maps begin on a page, as direct I/O demands. Counted only when it is there: memory may lack.
                self._free.append(_allocated())
                self._unallocated -= 1
            return [self._free.pop() for _ in range(count)]


def _allocated() -> mmap.mmap:
    try:
        return mmap.mmap(-1, BLOCK_BYTES)
    except OSError as error:
        raise StorageError(
            f"there is no memory for a buffer of {BLOCK_BYTES} bytes: {error}", transient=True
        ) from error


_pools: weakref.WeakSet[BufferPool] = weakref.WeakSet()


def _forget_all() -> None:
    for pool in list(_pools):
        pool.forget()


# The maps stay shared with a forked child: what it loads would overwrite the blocks that its parent is saving.
os.register_at_fork(after_in_child=_forget_all)


def copy_bytes(target: memoryview, source: memoryview) -> None:
    """Copy equally many bytes; NumPy for long runs, because it lets other threads go on meanwhile."""
    if len(source) < _GIL_WORTH_RELEASING_BYTES:
        target[:] = source
    else:
        np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))
