"""Objects in this process's memory: for tests, and for trying things out."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ckptstore.errors import ExistsError, FormatError, NotFoundError, StorageError
from ckptstore.storage.base import Capabilities, Entry, Slot, Upload, check_key, check_prefix


class StoredObject(NamedTuple):
    """The bytes of one object."""

    data: bytes
    modified: float


Space = dict[str, StoredObject]
"""All objects of one memory storage by key. Each access is one atomic operation of the dictionary."""

_spaces: dict[str, Space] = {}


class MemoryStorage:
    """Objects in a dictionary.

    Args:
        name: all storages of one name in this process hold the same objects; "" has none to share with.
        read_only: refuse every write; the name must be in use then.

    Raises:
        NotFoundError: opened read-only, and nobody in this process has opened ``name`` for writing.
    """

    def __init__(self, name: str = "", *, read_only: bool = False) -> None:
        self.url = f"memory://{name}"
        if read_only and name not in _spaces:
            raise NotFoundError(f"{self.url} doesn't exist in this process; open it for writing first")
        self._objects = _spaces.setdefault(name, {}) if name else {}
        self._read_only = read_only
        self._closed = False
        self.capabilities = Capabilities(durability="none", atomic_create=True, direct_io=False, kind="memory")

    def list(self, prefix: str) -> list[Entry]:
        """All objects under ``prefix``, sorted by key; see ``Storage.list``."""
        check_prefix(prefix)
        found = self._opened().copy().items()
        return sorted(Entry(key, len(it.data), it.modified) for key, it in found if key.startswith(prefix))

    def size(self, key: str) -> int:
        """Size in bytes; see ``Storage.size``."""
        return len(self._find(key).data)

    def read(self, key: str, *, limit: int) -> bytes:
        """The whole object; see ``Storage.read``."""
        data = self._find(key).data
        if len(data) > limit:
            raise FormatError(f"{self.url}/{key} has {len(data)} bytes; at most {limit} are accepted here", key=key)
        return data

    def create(self, key: str, data: bytes) -> None:
        """Put a small object unless the key is taken; see ``Storage.create``."""
        self._put_new(key, StoredObject(bytes(data), time.time()))

    def open_writer(self, key: str, *, size: int | None = None) -> MemoryWriter:
        """Begin a large object; see ``Storage.open_writer``."""
        placeholder = StoredObject(b"", time.time())
        self._put_new(key, placeholder)
        return MemoryWriter(self._objects, key, placeholder)

    def open_reader(self, key: str, *, size: int | None = None) -> MemoryReader:
        """Open an object for reading; see ``Storage.open_reader``."""
        return MemoryReader(self._find(key).data)

    def delete(self, keys: Iterable[str]) -> None:
        """Remove objects; see ``Storage.delete``."""
        names = [check_key(key.removesuffix("/")) for key in keys if not key.endswith("/") or check_prefix(key)]
        objects = self._writable()
        for name in names:
            objects.pop(name, None)

    def replace(self, key: str, by: str) -> None:
        """Put ``by`` in the place of ``key``; see ``Storage.replace``."""
        check_key(key)
        objects, new = self._writable(), self._find(by)
        objects[key] = new
        objects.pop(by, None)

    def probe(self, key: str, data: bytes) -> None:
        """Nothing to be tried; see ``Storage.probe``."""

    def uploads(self) -> Sequence[Upload]:
        """None; see ``Storage.uploads``."""
        return []

    def abort_uploads(self, uploads: Iterable[Upload]) -> None:
        """Nothing to drop."""

    def close(self) -> None:
        """Release nothing: the objects stay for others that use the same name. Safe to call twice."""
        self._closed = True

    def _opened(self) -> Space:
        if self._closed:
            raise StorageError(f"{self.url} was closed")
        return self._objects

    def _writable(self) -> Space:
        if self._read_only:
            raise StorageError(f"{self.url} was opened read-only; open it without read_only=True to write")
        return self._opened()

    def _find(self, key: str) -> StoredObject:
        found = self._opened().get(check_key(key))
        if found is None:
            raise NotFoundError(f"{self.url}/{key} doesn't exist", key=key)
        return found

    def _put_new(self, key: str, new: StoredObject) -> None:
        if self._writable().setdefault(check_key(key), new) is not new:
            raise ExistsError(f"{self.url}/{key} exists already, and nothing is ever overwritten", key=key)


class MemoryWriter:
    """One object in the making."""

    def __init__(self, objects: Space, key: str, placeholder: StoredObject) -> None:
        self._objects, self._key, self._placeholder = objects, key, placeholder
        self._lock = threading.Lock()
        self._slots: list[Slot] = []
        self._pieces: dict[int, bytes] = {}
        self._state = "open"

    def reserve(self, length: int) -> Slot:
        """Take the next ``length`` bytes."""
        with self._lock:
            last = self._slots[-1] if self._slots else Slot(-1, 0, 0)
            slot = Slot(last.number + 1, last.offset + last.length, length)
            self._slots.append(slot)
        return slot

    def write(self, slot: Slot, data: memoryview) -> None:
        """Keep a copy of ``data`` for its slot.

        Raises:
            StorageError: the object must be aborted.
        """
        self._check_open("write")
        if data.nbytes != slot.length:
            self._state = "failed"
            raise StorageError(f"{self._key}: {data.nbytes} bytes for a slot of {slot.length}", key=self._key)
        self._pieces[slot.number] = bytes(data)

    def finish(self) -> int:
        """Make the bytes visible and return their number.

        Raises:
            StorageError: the object must be aborted.
        """
        self._check_open("finish")
        missing = [slot.number for slot in self._slots if slot.number not in self._pieces]
        if missing:
            self._state = "failed"
            raise StorageError(f"{self._key}: slot {missing[0]} was never written", key=self._key)
        data = b"".join(self._pieces[slot.number] for slot in self._slots)
        self._objects[self._key] = StoredObject(data, time.time())
        self._state = "finished"
        return len(data)

    def abort(self) -> None:
        """Drop what was written. Does nothing after ``finish``."""
        if self._state in ("open", "failed"):
            self._state = "aborted"
            self._pieces.clear()
            # A repair may have put something good in its place.
            if self._objects.get(self._key) is self._placeholder:
                self._objects.pop(self._key, None)

    def _check_open(self, doing: str) -> None:
        if self._state != "open":
            raise StorageError(f"can't {doing} {self._key}: it is {self._state} already", key=self._key)


class MemoryReader:
    """One object opened for reading."""

    def __init__(self, data: bytes) -> None:
        self._data: bytes | None = data
        self.size = len(data)

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """Fill ``buffer`` from ``offset`` and return how many bytes there were."""
        if self._data is None:
            raise StorageError("the object was closed")
        piece = memoryview(self._data)[offset : offset + buffer.nbytes]
        buffer.cast("B")[: len(piece)] = piece
        return len(piece)

    def close(self) -> None:
        """Release the object. Safe to call twice."""
        self._data = None
