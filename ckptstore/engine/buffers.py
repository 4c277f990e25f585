"""Aligned buffers of one block: the bounded pool through which every byte goes, and room for copies of the state."""

from __future__ import annotations

import mmap
import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TypeAlias

import numpy as np

from ckptstore.errors import StorageError
from ckptstore.format.tensorfile import BLOCK_BYTES

POOL_BYTES = 64 << 20
_GIL_WORTH_RELEASING_BYTES = 1 << 16

Buffer: TypeAlias = mmap.mmap
"""16 MiB that begin on a page, as direct I/O demands."""


class BufferPool:
    """Buffers of one block each, page-aligned, allocated when first needed and used again.

    Args:
        total_bytes: upper bound of the memory held; at least two blocks.
    """

    def __init__(self, total_bytes: int = POOL_BYTES) -> None:
        self.buffers = max(2, total_bytes // BLOCK_BYTES)
        self.forget()
        _forgetful.add(self)

    def forget(self) -> None:
        """Begin anew, with no buffer allocated and none on lease."""
        self._unallocated = self.buffers
        self._free: list[Buffer] = []
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
            self._give_back(maps)

    def take(self) -> Buffer:
        """One buffer, as soon as one is free; ``give_back`` must follow."""
        return self._take(1)[0]

    def give_back(self, buffer: Buffer) -> None:
        """The inverse of ``take``."""
        self._give_back([buffer])

    def _take(self, count: int) -> list[Buffer]:
        with self._changed:
            self._changed.wait_for(lambda: len(self._free) + self._unallocated >= count)
            while len(self._free) < count:
                # Counted only when it is there: memory may lack.
                self._free.append(_in_huge_pages())
                self._unallocated -= 1
            return [self._free.pop() for _ in range(count)]

    def _give_back(self, buffers: list[Buffer]) -> None:
        with self._changed:
            self._free += buffers
            self._changed.notify_all()


class StagingArea:
    """Room for copies of a state, one buffer a block, used again from save to save.

    Args:
        limit_bytes: upper bound of the memory held, at least one block; None: as much as the state takes.

    Attributes:
        changed: notified when a buffer is given back; hold it around ``try_take``.
    """

    def __init__(self, limit_bytes: int | None = None) -> None:
        self._limit = None if limit_bytes is None else max(1, limit_bytes // BLOCK_BYTES)
        self.forget()
        _forgetful.add(self)

    def forget(self) -> None:
        """Begin anew, with no buffer allocated and none taken."""
        self.changed = threading.Condition()
        self._free: list[Buffer] = []
        self._taken = self._most = 0

    def try_take(self) -> Buffer | None:
        """A buffer, or None where the bound is reached or the machine has no more memory: wait for ``changed``."""
        with self.changed:
            if self._limit is not None and self._taken >= self._limit:
                return None
            try:
                buffer = self._free.pop() if self._free else _allocated()
            except StorageError:
                return None
            self._taken += 1
            self._most = max(self._most, self._taken)
            return buffer

    def give_back(self, buffer: Buffer) -> None:
        """The inverse of ``try_take``."""
        with self.changed:
            self._free.append(buffer)
            self._taken -= 1
            self.changed.notify_all()

    def trim(self) -> None:
        """Give back to the system what was not needed since the last call, and is not in use.

        What was needed will be needed again: a machine may take longer to find memory than to copy into it.
        """
        with self.changed:
            del self._free[max(0, self._most - self._taken) :]
            self._most = self._taken

    def clear(self) -> None:
        """Give all memory that is not in use back to the system."""
        with self.changed:
            self._free.clear()


def _in_huge_pages() -> Buffer:
    """A buffer that is moved through again and again: with few pages, that costs a tenth less.

    Its memory is private, as pages of shared memory are small everywhere: where the process forks, the child's side of
    what is written to here after that takes as much memory again. That is little, as opposed to copies of a state.
    """
    buffer = _allocated(private=True)
    # Without an effect where it isn't known.
    with suppress(AttributeError, OSError):
        buffer.madvise(mmap.MADV_HUGEPAGE)
    return buffer


def _allocated(*, private: bool = False) -> Buffer:
    try:
        if private:
            return mmap.mmap(-1, BLOCK_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return mmap.mmap(-1, BLOCK_BYTES)
    except OSError as error:
        raise StorageError(
            f"there is no memory for a buffer of {BLOCK_BYTES} bytes: {error}", transient=True
        ) from error


_forgetful: weakref.WeakSet[BufferPool | StagingArea] = weakref.WeakSet()


def _forget_all() -> None:
    for holder in list(_forgetful):
        holder.forget()


# Copies of the state stay shared with a forked child: what it saves would overwrite what its parent is saving.
os.register_at_fork(after_in_child=_forget_all)


def copy_bytes(target: memoryview, source: memoryview) -> None:
    """Copy equally many bytes; NumPy for long runs, because it lets other threads go on meanwhile."""
    if len(source) < _GIL_WORTH_RELEASING_BYTES:
        target[:] = source
    else:
        np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))
