"""Large objects on a local file system: blocks past the page cache where possible."""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import NamedTuple

import numpy as np

from ckptstore.errors import StorageError
from ckptstore.storage.base import ALIGNMENT, Slot
from ckptstore.storage.posix import Descriptor, os_errors, pwrite_all, set_direct

_BOUNCE_BYTES = 1 << 20
_DROP_CACHE_FROM_BYTES = 1 << 20
_STALE_TRIES = 3


class FileWriter:
    """One new file. Direct writes are whole aligned pages; pages that slots share are put together in memory.

    Buffered and direct writes never mix in one page, whatever the order in which threads write their slots.
    """

    def __init__(
        self,
        file: Descriptor,
        path: str,
        key: str,
        *,
        direct: bool,
        sync: Callable[[Descriptor], None],
        discard: Callable[[], None],
        direct_refused: Callable[[], None],
    ) -> None:
        self._file, self._path, self._key = file, path, key
        self._direct, self._direct_refused = direct, direct_refused
        self._sync, self._discard = sync, discard
        self._lock = threading.Lock()
        self._state = "open"
        self._active = 0
        self._slots = 0
        self._total = 0
        self._unwritten: set[int] = set()
        self._shared_pages: dict[int, tuple[mmap.mmap, int]] = {}

    def reserve(self, length: int) -> Slot:
        """Take the next ``length`` bytes."""
        with self._lock:
            slot = Slot(self._slots, self._total, length)
            self._slots += 1
            self._total += length
            self._unwritten.add(slot.number)
        return slot

    def write(self, slot: Slot, data: memoryview) -> None:
        """Write ``data`` at its slot; any thread, any order.

        Raises:
            StorageError: the file is lost and must be aborted.
        """
        with self._using("write") as fd:
            if data.nbytes != slot.length:
                raise StorageError(f"{self._path}: {data.nbytes} bytes for a slot of {slot.length}", key=self._key)
            if slot.length:
                self._put(fd, slot.offset, data.cast("B"))
            with self._lock:
                self._unwritten.discard(slot.number)

    def finish(self) -> int:
        """Make the bytes durable, close the file, return its size.

        Raises:
            StorageError: the file is lost and must be aborted.
        """
        with self._using("finish") as fd:
            if self._unwritten:
                raise StorageError(f"{self._path}: slot {min(self._unwritten)} was never written", key=self._key)
            for offset, (page, _) in self._shared_pages.items():
                pwrite_all(fd, memoryview(page), offset)
            self._shared_pages.clear()
            # Cuts off the padding of the last page and what was reserved beyond the end.
            os.ftruncate(fd, self._total)
            self._sync(self._file)
            size = os.fstat(fd).st_size
            if size != self._total:
                raise StorageError(f"{self._path}: {size} bytes on disk, {self._total} written", key=self._key)
            self._file.close()
            self._state = "finished"
        return size

    def abort(self) -> None:
        """Remove the file, as far as possible. Never raises; does nothing after ``finish``."""
        with self._lock:
            if self._state in ("finished", "aborted"):
                return
            self._state = "aborted"
            self._close_if_unused()
        with suppress(Exception):
            self._discard()

    @contextmanager
    def _using(self, doing: str) -> Iterator[int]:
        with self._lock:
            if self._state != "open":
                raise StorageError(f"can't {doing} {self._path}: it is {self._state} already", key=self._key)
            self._active += 1
        try:
            with os_errors(doing, self._path, self._key):
                yield self._file.fd
        except BaseException:
            with self._lock:
                self._state = "failed" if self._state == "open" else self._state
            raise
        finally:
            with self._lock:
                self._active -= 1
                self._close_if_unused()

    def _close_if_unused(self) -> None:
        # Closing under a writing thread would let its bytes go into the next file that gets the number.
        if self._state == "aborted" and not self._active:
            self._shared_pages.clear()
            with suppress(OSError):
                self._file.close()

    def _put(self, fd: int, offset: int, data: memoryview) -> None:
        if not self._direct:
            pwrite_all(fd, data, offset)
            return
        begin = min(-offset % ALIGNMENT, len(data))
        end = begin + (len(data) - begin) // ALIGNMENT * ALIGNMENT
        if begin:
            self._put_shared(fd, offset, data[:begin])
        self._put_pages(fd, offset + begin, data[begin:end])
        if end < len(data):
            self._put_shared(fd, offset + end, data[end:])

    def _put_shared(self, fd: int, offset: int, data: memoryview) -> None:
        """A piece of a page; the one that completes the page writes it, ``finish`` writes the last."""
        at = offset % ALIGNMENT
        start = offset - at
        with self._lock:
            page, filled = (
                self._shared_pages.pop(start) if start in self._shared_pages else (mmap.mmap(-1, ALIGNMENT), 0)
            )
            page[at : at + len(data)] = data
            filled += len(data)
            if filled < ALIGNMENT:
                self._shared_pages[start] = page, filled
                return
        self._put_pages(fd, start, memoryview(page))

    def _put_pages(self, fd: int, offset: int, data: memoryview) -> None:
        if is_aligned(data):
            self._pwrite(fd, data, offset)
            return
        bounce = memoryview(mmap.mmap(-1, _BOUNCE_BYTES))
        for begin in range(0, len(data), _BOUNCE_BYTES):
            piece = data[begin : begin + _BOUNCE_BYTES]
            bounce[: len(piece)] = piece
            self._pwrite(fd, bounce[: len(piece)], offset + begin)

    def _pwrite(self, fd: int, data: memoryview, offset: int) -> None:
        try:
            pwrite_all(fd, data, offset)
        except OSError as error:
            # Some file systems accept the flag and refuse the transfer, before any byte of it is written.
            if error.errno != errno.EINVAL or not set_direct(fd, False):
                raise
            self._direct_refused()
            pwrite_all(fd, data, offset)


class OpenFile(NamedTuple):
    """A file opened for reading, once or twice."""

    buffered: Descriptor
    direct: Descriptor | None
    size: int


class FileReader:
    """One file. Aligned reads bypass the page cache; the others leave nothing behind in it."""

    def __init__(
        self, key: str, open_file: Callable[[], OpenFile], errors: Callable[[], AbstractContextManager[None]]
    ) -> None:
        """``errors`` turns the system's errors into ours."""
        self._key, self._open, self._errors = key, open_file, errors
        self._file: OpenFile | None = open_file()
        self.size = self._file.size

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """Fill ``buffer`` from ``offset`` and return how many bytes there were (fewer only at the end).

        Raises:
            IntegrityError: the disk can't read it.
            StorageError: the read failed.
        """
        if not buffer.nbytes:
            return 0
        with self._errors():
            for _ in range(_STALE_TRIES):
                try:
                    return _fill(self._opened(), offset, buffer.cast("B"))
                except OSError as error:
                    if error.errno != errno.ESTALE:
                        raise
                    self._file = self._reopened()
            return _fill(self._opened(), offset, buffer.cast("B"))

    def close(self) -> None:
        """Release the file, as soon as no other thread reads from it. Safe to call twice."""
        self._file = None

    def _opened(self) -> OpenFile:
        file = self._file
        if file is None:
            raise StorageError(f"{self._key} was closed", key=self._key)
        return file

    def _reopened(self) -> OpenFile:
        # By name: a file server forgets handles when it restarts, and nothing is ever overwritten.
        file = self._open()
        if file.size != self.size:
            raise StorageError(f"{self._key} had {self.size} bytes and has {file.size} now", key=self._key)
        return file


def _fill(file: OpenFile, offset: int, buffer: memoryview) -> int:
    done = 0
    while done < len(buffer) and offset + done < file.size:
        count = _read_some(file, offset + done, buffer[done:])
        if not count:
            break
        done += count
    return done


def _read_some(file: OpenFile, offset: int, buffer: memoryview) -> int:
    whole_pages = len(buffer) // ALIGNMENT * ALIGNMENT
    if file.direct and whole_pages and offset % ALIGNMENT == 0 and is_aligned(buffer):
        try:
            return os.preadv(file.direct.fd, [buffer[:whole_pages]], offset)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
    count = os.preadv(file.buffered.fd, [buffer], offset)
    if count >= _DROP_CACHE_FROM_BYTES and hasattr(os, "posix_fadvise"):
        # Verifying a large store must not push the training data out of the page cache.
        os.posix_fadvise(file.buffered.fd, offset, count, os.POSIX_FADV_DONTNEED)
    return count


def is_aligned(data: memoryview) -> bool:
    """Whether the memory begins at a multiple of ``ALIGNMENT``; that of nothing does."""
    return not len(data) or np.frombuffer(data, np.uint8).ctypes.data % ALIGNMENT == 0
