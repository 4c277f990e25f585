"""One object on its way down, by ranges."""

from __future__ import annotations

from ckptstore.errors import IntegrityError, NotFoundError, StorageError
from ckptstore.storage.generic.failures import Incomplete
from ckptstore.storage.generic.remote import Remote


def fetch(remote: Remote, path: str, offset: int, length: int, size: int) -> bytes:
    """``length`` bytes from ``offset`` of an object of ``size`` bytes.

    Raises:
        Incomplete: the answer has another length.
    """
    if not length:
        return b""
    data = remote.read(path, offset, offset + length)
    if len(data) == size != length:
        # A web server that doesn't know ranges sends everything.
        data = data[offset : offset + length]
    if len(data) != length:
        raise Incomplete(f"{len(data)} of {length} bytes came")
    return data


class FileReader:
    """An object opened for reading.

    Attributes:
        size: in bytes.
    """

    def __init__(self, remote: Remote, path: str, key: str, size: int) -> None:
        self.size = size
        self._remote, self._path, self._key = remote, path, key
        self._closed = False

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """Fill ``buffer`` from ``offset``; how many bytes there were.

        Raises:
            IntegrityError: the object was removed, or replaced by one of another size.
            StorageError: the read failed.
        """
        if self._closed:
            raise StorageError(f"{self._key} was closed", key=self._key)
        raw = buffer.cast("B")
        wanted = max(0, min(len(raw), self.size - offset))
        try:
            raw[:wanted] = self._remote.run(lambda: self._fetch(offset, wanted), "read", self._key)
        except NotFoundError as error:
            raise IntegrityError(f"{self._key} was removed while it was read", key=self._key) from error
        return wanted

    def close(self) -> None:
        """Release nothing. Safe to call twice."""
        self._closed = True

    def _fetch(self, offset: int, length: int) -> bytes:
        try:
            return fetch(self._remote, self._path, offset, length, self.size)
        except Exception:
            if self._remote.info(self._path).get("size") != self.size:
                raise IntegrityError(f"{self._key} was replaced while it was read", key=self._key) from None
            raise
