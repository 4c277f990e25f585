"""One large object on its way up: collected in a local file without a name, then sent whole."""

from __future__ import annotations

import errno
import os
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress

from ckptstore.errors import StorageError, StorageFullError
from ckptstore.storage.base import Slot


class FileWriter:
    """An object in the making; nothing of it is on the storage until ``finish``.

    Args:
        key: of the object, for messages.
        size: in bytes, where known: room is reserved for it in the folder for temporary files.
        send: puts the local file at this path, of this many bytes, in its place.
    """

    def __init__(self, key: str, size: int | None, send: Callable[[str, int], None]) -> None:
        self._key, self._send = key, send
        self._lock = threading.Lock()
        self._slots: list[Slot] = []
        self._written: set[int] = set()
        self._state = "open"
        try:
            self._file = tempfile.TemporaryFile(prefix="ckptstore-", buffering=0)  # noqa: SIM115 - closed by _drop
        except OSError as error:
            raise self._local_failure(error) from error
        try:
            if size:
                self._reserve(size)
        except BaseException:
            self._file.close()
            raise

    def reserve(self, length: int) -> Slot:
        """Take the next ``length`` bytes."""
        with self._lock:
            last = self._slots[-1] if self._slots else Slot(-1, 0, 0)
            slot = Slot(last.number + 1, last.offset + last.length, length)
            self._slots.append(slot)
        return slot

    def write(self, slot: Slot, data: memoryview) -> None:
        """Write ``data`` to the local file.

        Raises:
            StorageFullError: it has no room.
            StorageError: the object must be aborted.
        """
        self._check_open("write")
        try:
            if data.nbytes != slot.length:
                raise StorageError(f"{self._key}: {data.nbytes} bytes for a slot of {slot.length}", key=self._key)
            left, offset = data.cast("B"), slot.offset
            while left:
                done = os.pwrite(self._file.fileno(), left, offset)
                left, offset = left[done:], offset + done
        except BaseException as error:
            self._state = "failed"
            if isinstance(error, OSError) and not isinstance(error, StorageError):
                raise self._local_failure(error) from error
            raise
        with self._lock:
            self._written.add(slot.number)

    def finish(self) -> int:
        """Send the object, which is durable and visible then; its size.

        Raises:
            StorageError: the object must be aborted.
        """
        self._check_open("finish")
        try:
            missing = [slot.number for slot in self._slots if slot.number not in self._written]
            if missing:
                raise StorageError(f"{self._key}: slot {missing[0]} was never written", key=self._key)
            size = sum(slot.length for slot in self._slots)
            self._file.truncate(size)
            self._file.seek(0)
            self._send(f"/dev/fd/{self._file.fileno()}", size)
        except BaseException:
            self._state = "failed"
            raise
        self._state = "finished"
        self._file.close()
        return size

    def abort(self) -> None:
        """Drop what was written. Never raises; does nothing after ``finish``."""
        if self._state in ("open", "failed"):
            self._state = "aborted"
            with suppress(OSError):
                self._file.close()

    def _reserve(self, size: int) -> None:
        try:
            os.posix_fallocate(self._file.fileno(), 0, size)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise self._local_failure(error) from error

    def _check_open(self, doing: str) -> None:
        if self._state != "open":
            raise StorageError(f"{self._key}: can't {doing}, it is {self._state} already", key=self._key)

    def _local_failure(self, error: OSError) -> StorageError:
        kind = StorageFullError if error.errno in (errno.ENOSPC, errno.EDQUOT) else StorageError
        return kind(
            f"{self._key}: {error.strerror} in {tempfile.gettempdir()}, where an object is collected before it is "
            "sent; TMPDIR names another folder",
            key=self._key,
        )
