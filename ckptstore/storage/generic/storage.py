"""Objects in a folder of any file system that fsspec knows."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace as changed
from tempfile import TemporaryDirectory
from typing import Any

from ckptstore.errors import ExistsError, FormatError, IntegrityError, NotFoundError, StorageError
from ckptstore.storage.base import Capabilities, Entry, Upload, check_key, check_prefix
from ckptstore.storage.generic.failures import is_taken, may_be_applied
from ckptstore.storage.generic.listing import listed
from ckptstore.storage.generic.publish import beside, create_by_open, publish, remove_quietly
from ckptstore.storage.generic.reader import FileReader, fetch
from ckptstore.storage.generic.remote import Remote
from ckptstore.storage.generic.writer import FileWriter

_IN_FLIGHT = 8

_looking = threading.Lock()
"""Held from looking whether a key is taken to having written it, where the storage can't do both at once."""


class GenericStorage:
    """Objects below one folder.

    Args:
        protocol: as ``gs`` or ``sftp``.
        place: what follows ``protocol://``.
        options: of the file system's class in fsspec.
        read_only: refuse every write.
        patient: try calls again for minutes, as a run does that must not end with its network.

    Raises:
        StorageError: see ``Remote``.
    """

    def __init__(
        self,
        protocol: str,
        place: str,
        options: Mapping[str, Any],
        *,
        read_only: bool = False,
        patient: bool = False,
    ) -> None:
        self._remote = Remote(protocol, place, options, patient=patient)
        self.url = self._remote.url
        self._traits = traits = self._remote.traits
        self.capabilities = Capabilities(
            durability=traits.durability,
            atomic_create=traits.create != "exclusive open",
            direct_io=False,
            kind=protocol,
            exclusive_create=traits.create != "look first",
            in_flight=_IN_FLIGHT if traits.bucket or traits.by_links else None,
        )
        self._read_only = read_only
        self._closed = False

    def list(self, prefix: str) -> list[Entry]:
        """All objects under ``prefix``, sorted by key; see ``Storage.list``."""
        self._check_opened()
        check_prefix(prefix)
        return self._remote.run(lambda: listed(self._remote, prefix), "list", prefix)

    def size(self, key: str) -> int:
        """Size in bytes; see ``Storage.size``."""
        path = self._path(key)
        return self._remote.run(lambda: self._size(path, key), "look at", key)

    def read(self, key: str, *, limit: int) -> bytes:
        """The whole object; see ``Storage.read``."""
        path = self._path(key)

        def get() -> bytes:
            size = self._size(path, key)
            if size > limit:
                raise FormatError(f"{self.url}/{key} has {size} bytes; at most {limit} are accepted here", key=key)
            return fetch(self._remote, path, 0, size, size)

        return self._remote.run(get, "read", key)

    def create(self, key: str, data: bytes) -> None:
        """Put a small object unless the key is taken; see ``Storage.create``.

        A try whose answer was lost may have been applied: where the very same bytes are found then, they are its own.
        """
        path = self._path(key, writing=True)
        unsure = False

        def put() -> None:
            nonlocal unsure
            try:
                self._put_new(path, data)
            except Exception as error:
                if unsure and is_taken(error) and self._holds(path, data):
                    return
                unsure = unsure or may_be_applied(error)
                raise

        try:
            self._remote.run(put, "create", key, writing=True)
        except NotFoundError as error:
            raise self._no_place(key) from error

    def open_writer(self, key: str, *, size: int | None = None) -> FileWriter:
        """Begin a large object; see ``Storage.open_writer``."""
        path = self._path(key, writing=True)
        if self._remote.run(lambda: self._remote.exists(path), "look at", key):
            raise ExistsError(f"{self.url}/{key} exists already, and nothing is ever overwritten", key=key)

        def send(local: str, size: int) -> None:
            def put() -> None:
                publish(self._remote, path, size, lambda target: self._remote.call("put_file", local, target))

            try:
                self._remote.run(put, "write", key, writing=True)
            except NotFoundError as error:
                raise self._no_place(key) from error

        return FileWriter(key, size, send)

    def open_reader(self, key: str, *, size: int | None = None) -> FileReader:
        """Open an object for reading; see ``Storage.open_reader``."""
        return FileReader(self._remote, self._path(key), key, self.size(key))

    def delete(self, keys: Iterable[str]) -> None:
        """Remove objects; see ``Storage.delete``. Empty folders go where they are there by themselves."""
        names = [check_key(key.removesuffix("/")) for key in keys if not key.endswith("/") or check_prefix(key)]
        self._check_writable()
        if names:
            with ThreadPoolExecutor(_IN_FLIGHT if self._traits.threads else 1) as pool:
                for _ in pool.map(self._remove, names):
                    pass
        if self._traits.folders:
            self._remove_folders(names)

    def replace(self, key: str, by: str) -> None:
        """Put ``by`` in the place of ``key``; see ``Storage.replace``."""
        target, source = self._path(key, writing=True), self._path(by)
        size = self.size(by)
        if self._traits.publish == "rename":
            self._remote.run(lambda: self._remote.call("mv", source, target), "replace", key, writing=True)
            return
        if self._traits.copies:
            self._remote.run(lambda: self._remote.call("cp_file", source, target), "replace", key, writing=True)
        else:
            self._carry(source, target, size, key)
        self._remove(by)

    def probe(self, key: str, data: bytes) -> None:
        """Try reading back, ranges, and creating what exists, beside ``key``; see ``Storage.probe``."""
        path = self._path(key, writing=True)
        if self.read(key, limit=len(data)) != data:
            raise StorageError(f"{self.url}/{key} was written and read back with other bytes", key=key)
        first, last, size = len(data) // 3, len(data) // 2, len(data)
        part = self._remote.run(lambda: fetch(self._remote, path, first, last - first, size), "read a range of", key)
        if part != data[first:last]:
            raise StorageError(f"{self.url}: no ranges of an object can be read", key=key)
        if self.capabilities.exclusive_create:
            exclusive = self._remote.run(lambda: self._refuses(beside(path), data), "try", key, writing=True)
            self.capabilities = changed(self.capabilities, exclusive_create=exclusive)

    def uploads(self) -> Sequence[Upload]:
        """None that could be listed; see ``Storage.uploads``."""
        self._check_opened()
        return []

    def abort_uploads(self, uploads: Iterable[Upload]) -> None:
        """Nothing to drop."""

    def close(self) -> None:
        """Release nothing that others don't share. Safe to call twice."""
        self._closed = True

    def _put_new(self, path: str, data: bytes) -> None:
        create = self._traits.create if self.capabilities.exclusive_create else "look first"
        if create == "conditional":
            self._remote.call("pipe_file", path, data, mode="create")
        elif create == "exclusive open":
            create_by_open(self._remote, path, data)
        else:
            with _looking:
                if self._remote.exists(path):
                    raise FileExistsError(path)
                publish(
                    self._remote, path, len(data), lambda target: self._remote.call("pipe_file", target, bytes(data))
                )

    def _refuses(self, path: str, data: bytes) -> bool:
        """Whether a second creation at ``path``, which is temporary, is refused."""
        try:
            self._put_new(path, data)
            try:
                self._put_new(path, data)
            except Exception as error:
                if not is_taken(error):
                    raise
                return True
            return False
        finally:
            remove_quietly(self._remote, path)

    def _holds(self, path: str, data: bytes) -> bool:
        size = self._remote.info(path).get("size")
        return size == len(data) and fetch(self._remote, path, 0, size, size) == data

    def _carry(self, source: str, target: str, size: int, key: str) -> None:
        with TemporaryDirectory(prefix="ckptstore-") as folder:
            local = f"{folder}/object"
            self._remote.run(lambda: self._remote.call("get_file", source, local), "read", key)

            def put() -> None:
                publish(self._remote, target, size, lambda place: self._remote.call("put_file", local, place))

            self._remote.run(put, "replace", key, writing=True)

    def _remove(self, key: str) -> None:
        with suppress(NotFoundError):
            self._remote.run(lambda: self._rm(self._path(key)), "delete", key, writing=True)

    def _rm(self, path: str) -> None:
        try:
            self._remote.call("rm_file", path)
        except FileNotFoundError:
            raise
        except Exception:
            # Nothing, or no more than a folder: not every class says it by the right error.
            if self._remote.exists(path):
                raise

    def _remove_folders(self, names: Iterable[str]) -> None:
        folders = {
            "/".join(parts[:depth]) for parts in (n.split("/") for n in names) for depth in range(1, len(parts) + 1)
        }
        for folder in sorted(folders, key=len, reverse=True):
            # Not empty, not there, or an object by now.
            with suppress(OSError):
                self._remote.call("rmdir", f"{self._remote.root}/{folder}")

    def _size(self, path: str, key: str) -> int:
        found = self._remote.info(path)
        if found.get("type", "file") != "file":
            raise IntegrityError(f"{self.url}/{key} is no object but {found['type']}", key=key)
        if not isinstance(found.get("size"), int):
            raise StorageError(f"{self.url}/{key}: the storage doesn't tell its size", key=key)
        return int(found["size"])

    def _no_place(self, key: str) -> StorageError:
        return StorageError(f"{self.url}: {key} can't be written, as there is no such bucket or folder", key=key)

    def _path(self, key: str, *, writing: bool = False) -> str:
        check_key(key)
        if writing:
            self._check_writable()
        self._check_opened()
        return f"{self._remote.root}/{key}"

    def _check_opened(self) -> None:
        if self._closed:
            raise StorageError(f"{self.url} was closed")

    def _check_writable(self) -> None:
        if self._read_only:
            raise StorageError(f"{self.url} was opened read-only; open it without read_only=True to write")
        if self._traits.publish == "never":
            raise StorageError(f"{self.url} is read-only: nothing can be written to {self.capabilities.kind}://")
        self._check_opened()
