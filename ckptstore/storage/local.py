"""Objects as files below one folder, durable on return."""

from __future__ import annotations

import errno
import logging
import os
import secrets
import stat
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from ckptstore.errors import FormatError, NotFoundError, StorageError
from ckptstore.storage import posix
from ckptstore.storage.base import ALIGNMENT, Capabilities, Entry, Upload, check_key, check_prefix, is_key
from ckptstore.storage.localio import FileReader, FileWriter, OpenFile
from ckptstore.storage.mounts import VOLATILE, bucket_url, filesystem_of, is_remote
from ckptstore.storage.posix import Descriptor, open_at, open_regular, os_errors

_log = logging.getLogger("ckptstore")
_T = TypeVar("_T")

TEMPORARY = "tmp-"

# The user's own path to the root may lead through symlinks; nothing below it may.
_ROOT = os.O_RDONLY | os.O_DIRECTORY
_VANISHED_FOLDER_TRIES = 16


class LocalStorage:
    """A folder of the local machine, or of a file server that is mounted.

    Args:
        root: the folder. Made, with those above it, by the first write.
        read_only: refuse every write; the folder must exist then.
        direct: False: never bypass the page cache.

    Raises:
        NotFoundError: opened read-only, and there is no such folder.
        StorageError: it is no folder, can't be written to, or is a bucket mounted as a file system.
    """

    def __init__(self, root: str | os.PathLike[str], *, read_only: bool = False, direct: bool = True) -> None:
        self._path = os.path.abspath(root)
        self.url = Path(self._path).as_uri()
        self._read_only = read_only
        self._closed = False
        self._prepared = False
        # Folders whose own name this object knows to be durable.
        self._named: set[str] = set()
        existing = _nearest_existing(self._path)
        _check_usable(self._path, existing, read_only=read_only)
        kind = filesystem_of(existing)
        url = bucket_url(kind)
        if url is not None:
            raise StorageError(
                f"{self._path} is a bucket mounted with {kind}, where a file may be lost although every write to it "
                f"succeeded. Use the bucket's own URL, {url}, with a ckptstore that opens it, or a disk of this machine"
            )
        self._preallocate = not is_remote(kind)
        # What a disk can't read is lost, as if it had other bytes; a file server's EIO may be the network.
        self._damage = posix.FOREIGN if is_remote(kind) else posix.FOREIGN | {errno.EIO}
        self.capabilities = Capabilities(
            durability="process-crash" if kind in VOLATILE else "power-cut",
            atomic_create=True,
            direct_io=direct and hasattr(os, "O_DIRECT") and not is_remote(kind) and kind not in VOLATILE,
            kind=kind,
        )
        with self._errors("open", ""):
            self._root = open_at(None, self._path, _ROOT) if existing == self._path else None

    def list(self, prefix: str) -> list[Entry]:
        """All objects under ``prefix``, sorted by key; see ``Storage.list``.

        What is no regular file has size 0. A folder whose name is no part of a key is listed, with its "/", and not
        entered (``lost+found/`` can't be, and ``.snapshot/`` holds everything once more).
        """
        pending, found = [Entry(check_prefix(prefix), 0, 0.0)], []
        with self._errors("list", prefix):
            while pending:
                folder = pending.pop()
                inside = self._scan(folder.key)
                if inside == [] and folder.key != prefix:
                    found.append(folder)
                for entry in inside or ():
                    enter = entry.key.endswith("/") and is_key(entry.key[:-1])
                    (pending if enter else found).append(entry)
        return sorted(found)

    def size(self, key: str) -> int:
        """Size in bytes; see ``Storage.size``."""
        folder, name = _split(key)
        with self._reading("find", key), self._open_folder(folder) as parent:
            return posix.regular_size(os.stat(name, dir_fd=parent.fd, follow_symlinks=False))

    def read(self, key: str, *, limit: int) -> bytes:
        """The whole object; see ``Storage.read``."""
        with self._reading("read", key):
            file, size = self._open_regular(key)
            with file:
                pieces, left = [], limit + 1
                while size <= limit and left and (piece := os.read(file.fd, min(left, size + 1))):
                    pieces.append(piece)
                    left -= len(piece)
        if size > limit or not left:
            raise FormatError(f"{self._where(key)} has {size} bytes; at most {limit} are accepted here", key=key)
        return b"".join(pieces)

    def create(self, key: str, data: bytes) -> None:
        """Put a small object, whole and durable, unless the key is taken; see ``Storage.create``."""
        folder, name = _split(key)
        with self._errors("create", key):
            self._in_folder(folder, lambda parent: self._create(parent, name, key, data))

    def open_writer(self, key: str, *, size: int | None = None) -> FileWriter:
        """Begin a large object; see ``Storage.open_writer``. With ``size``, writes bypass the page cache."""
        folder, name = _split(key)
        with self._errors("create", key):
            file = self._in_folder(folder, lambda parent: open_at(parent, name, posix.NEW_FILE))
            try:
                # Direct writes that make a file longer wait for each other; those within its size run in parallel.
                if size and self._preallocate:
                    posix.preallocate(file.fd, -(-size // ALIGNMENT) * ALIGNMENT)
                direct = size is not None and self._make_direct(file)
                it = os.fstat(file.fd)
            except BaseException:
                file.close()
                self._discard(key, None)
                raise
        return FileWriter(
            file,
            self._where(key),
            key,
            direct=direct,
            sync=self._sync,
            discard=lambda: self._discard(key, it),
            direct_refused=lambda: self._learn(direct_io=False),
        )

    def open_reader(self, key: str, *, size: int | None = None) -> FileReader:
        """Open an object for reading; see ``Storage.open_reader``."""
        check_key(key)
        return FileReader(key, lambda: self._open_for_blocks(key), lambda: self._reading("read", key))

    def delete(self, keys: Iterable[str]) -> None:
        """Remove objects, and the folders left empty; see ``Storage.delete``.

        A key that ends in "/" is a folder, removed if it is empty.
        """
        names: dict[str, list[str]] = {}
        for key in keys:
            folder, name = _split(key.removesuffix("/"))
            if key.endswith("/"):
                names.setdefault(key[:-1], [])
            else:
                names.setdefault(folder, []).append(name)
        self._check_writable()
        # Deepest first, so that a folder is empty when its turn comes.
        for folder in sorted(names, key=lambda name: name.count("/"), reverse=True):
            with self._errors("delete in", folder), suppress(FileNotFoundError):
                self._unlink(folder, names[folder])
                self._remove_if_empty(folder)

    def replace(self, key: str, by: str) -> None:
        """Put ``by`` in the place of ``key``; see ``Storage.replace``."""
        folder, name = _split(key)
        other_folder, other = _split(by)
        self._check_writable()
        if folder != other_folder:
            raise StorageError(f"{by} can't take the place of {key}: it lies in another folder", key=key)
        with self._errors("replace", key), self._open_folder(folder) as parent:
            os.rename(other, name, src_dir_fd=parent.fd, dst_dir_fd=parent.fd)
            self._sync(parent)

    def probe(self, key: str, data: bytes) -> None:
        """Nothing to be tried: what a file system can't do, it says when it is asked to; see ``Storage.probe``."""

    def uploads(self) -> Sequence[Upload]:
        """None: what killed writes leave is listed; see ``Storage.uploads``."""
        return []

    def abort_uploads(self, uploads: Iterable[Upload]) -> None:
        """Nothing to drop."""

    def close(self) -> None:
        """Release the folder. Safe to call twice."""
        self._closed = True
        self._root = None

    def _where(self, key: str) -> str:
        return os.path.join(self._path, key)

    def _errors(self, doing: str, key: str, *, outcome: posix.Outcome = "failed") -> AbstractContextManager[None]:
        return os_errors(doing, self._where(key), key, outcome=outcome)

    def _reading(self, doing: str, key: str) -> AbstractContextManager[None]:
        return os_errors(doing, self._where(key), key, damage=self._damage)

    def _learn(self, **found: Any) -> None:
        # Without a lock, which a forked child might find held: a race costs one more probe, or one more warning.
        self.capabilities = replace(self.capabilities, **found)

    def _sync(self, file: Descriptor) -> None:
        if posix.sync(file.fd) or self.capabilities.durability != "power-cut":
            return
        self._learn(durability="process-crash")
        self._warn_volatile()

    def _warn_volatile(self) -> None:
        _log.warning(
            "%s lies on a file system (%s) that can't make files and folders durable on demand: "
            "checkpoints there survive the end of the process, but not a power cut",
            self._path,
            self.capabilities.kind,
        )

    def _open_root(self) -> Descriptor:
        if self._closed:
            raise StorageError(f"{self.url} was closed")
        root = self._root
        if root is None:
            root = self._root = open_at(None, self._path, _ROOT)
        if os.fstat(root.fd).st_nlink == 0:
            raise StorageError(f"{self._path} was removed while it was open")
        # A descriptor of its own: threads that share one would also share their place in a listing.
        return open_at(root, ".", posix.FOLDER)

    def _open_folder(self, folder: str) -> Descriptor:
        current = self._open_root()
        for name in folder.split("/") if folder else ():
            with current:
                current = open_at(current, name, posix.FOLDER)
        return current

    def _open_regular(self, key: str) -> tuple[Descriptor, int]:
        folder, name = _split(key)
        with self._open_folder(folder) as parent:
            return open_regular(parent, name)

    def _open_for_blocks(self, key: str) -> OpenFile:
        with self._reading("open", key):
            file, size = self._open_regular(key)
            direct = None
            if self.capabilities.direct_io and size >= ALIGNMENT:
                direct = posix.reopen_direct(file)
                self._learn(direct_io=direct is not None)
            return OpenFile(file, direct, size)

    def _make_direct(self, file: Descriptor) -> bool:
        if not self.capabilities.direct_io:
            return False
        direct = posix.set_direct(file.fd, True)
        self._learn(direct_io=direct)
        return direct

    def _check_writable(self) -> None:
        if self._read_only:
            raise StorageError(f"{self.url} was opened read-only; open it without read_only=True to write")
        if self._closed:
            raise StorageError(f"{self.url} was closed")

    def _in_folder(self, folder: str, action: Callable[[Descriptor], _T]) -> _T:
        """Run ``action`` in ``folder``, made if need be, and again if somebody removes it as empty meanwhile."""
        self._check_writable()
        for _ in range(_VANISHED_FOLDER_TRIES):
            with suppress(FileNotFoundError), self._make_folder(folder) as parent:
                return action(parent)
        with self._make_folder(folder) as parent:
            return action(parent)

    def _make_folder(self, folder: str) -> Descriptor:
        """The open folder. That it exists, and all above it, is durable, whoever made it."""
        self._make_root()
        current, path = self._open_root(), ""
        for name in folder.split("/") if folder else ():
            path = f"{path}/{name}"
            with current:
                inner, made = posix.enter_folder(current, name)
                if made or path not in self._named:
                    self._sync(current)
                    self._named.add(path)
            current = inner
        return current

    def _make_root(self) -> None:
        if self._prepared:
            return
        missing: list[str] = []
        at = self._path
        while not os.path.isdir(at) and at != os.path.dirname(at):
            missing.append(at)
            at = os.path.dirname(at)
        for path in reversed(missing):
            with open_at(None, os.path.dirname(path), _ROOT) as parent:
                posix.make_folder(parent, os.path.basename(path))
                self._sync(parent)
        if self.capabilities.durability != "power-cut":
            self._warn_volatile()
        with self._open_root() as root:
            # A process that was killed may have left names here that are seen and not yet durable.
            with suppress(PermissionError), open_at(root, "..", posix.FOLDER) as parent:
                self._sync(parent)
            self._sync(root)
        self._prepared = True

    def _create(self, parent: Descriptor, name: str, key: str, data: bytes) -> None:
        if self.capabilities.atomic_create and self._create_by_link(parent, name, key, data):
            return
        self._learn(atomic_create=False)
        file = open_at(parent, name, posix.NEW_FILE)
        try:
            self._write_small(file, data)
            self._sync(parent)
        except BaseException:
            with self._errors("remove the unfinished", key, outcome="unknown"):
                os.unlink(name, dir_fd=parent.fd)
                self._sync(parent)
            raise

    def _create_by_link(self, parent: Descriptor, name: str, key: str, data: bytes) -> bool:
        """Write under another name, then link: the object appears whole. False: there are no hard links here."""
        temp = f"{TEMPORARY}{secrets.token_hex(8)}"
        file = open_at(parent, temp, posix.NEW_FILE)
        linked = False
        try:
            self._write_small(file, data)
            linked = posix.link_new(parent, temp, name, path=self._where(key), key=key)
        finally:
            if not linked:
                with suppress(OSError):
                    os.unlink(temp, dir_fd=parent.fd)
        if linked:
            with self._errors("make durable", key, outcome="unknown"):
                with suppress(FileNotFoundError):
                    os.unlink(temp, dir_fd=parent.fd)
                self._sync(parent)
        return linked

    def _write_small(self, file: Descriptor, data: bytes) -> None:
        with file:
            posix.write_all(file.fd, data)
            self._sync(file)
            file.close()

    def _discard(self, key: str, it: os.stat_result | None) -> None:
        """Remove an unfinished file, and its folder if that is empty now; durability doesn't matter.

        Only if ``it`` still stands there, where that is given: a repair may have put a good file in its place.
        """
        folder, name = _split(key)
        with suppress(OSError), self._open_folder(folder) as parent:
            if it is None or os.path.samestat(it, os.stat(name, dir_fd=parent.fd, follow_symlinks=False)):
                os.unlink(name, dir_fd=parent.fd)
        with suppress(OSError):
            self._remove_if_empty(folder)

    def _unlink(self, folder: str, names: Sequence[str]) -> None:
        with self._open_folder(folder) as parent:
            for name in names:
                with suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=parent.fd)
            if names:
                self._sync(parent)

    def _remove_if_empty(self, folder: str) -> None:
        """Remove ``folder`` and those above it, up to the first one that isn't empty; never the root."""
        while folder:
            above, name = folder.rpartition("/")[::2]
            with self._open_folder(above) as parent:
                if not posix.remove_empty_folder(parent, name):
                    return
                self._named.discard(f"/{folder}")
                self._sync(parent)
            folder = above

    def _scan(self, prefix: str) -> Sequence[Entry] | None:
        """What stands in one folder; None: it isn't there."""
        try:
            folder = self._open_folder(prefix.removesuffix("/"))
        except FileNotFoundError:
            return None
        with folder, os.scandir(folder.fd) as found:
            return [entry for item in found if (entry := _entry(prefix, item)) is not None]


def _entry(prefix: str, item: os.DirEntry[str]) -> Entry | None:
    try:
        found = item.stat(follow_symlinks=False)
    except FileNotFoundError:
        return None
    name = f"{prefix}{item.name}/" if stat.S_ISDIR(found.st_mode) else prefix + item.name
    return Entry(name, found.st_size if stat.S_ISREG(found.st_mode) else 0, found.st_mtime)


def _split(key: str) -> tuple[str, str]:
    folder, _, name = check_key(key).rpartition("/")
    return folder, name


def _nearest_existing(path: str) -> str:
    # lexists: below a symlink that leads nowhere no folder can be made. On a dead disk not even "/" seems to exist.
    while not os.path.lexists(path) and path != os.path.dirname(path):
        path = os.path.dirname(path)
    return path


def _check_usable(path: str, existing: str, *, read_only: bool) -> None:
    if not os.path.isdir(existing):
        raise StorageError(f"{path} can't hold checkpoints: {existing} is no folder. Choose another path")
    if read_only:
        if existing != path:
            raise NotFoundError(f"{path} doesn't exist. Check the path; the first save makes it")
        return
    if os.statvfs(existing).f_flag & os.ST_RDONLY:
        raise StorageError(
            f"{existing} is on a read-only file system. It can be looked at (read_only=True), not written to"
        )
    if not os.access(existing, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        raise StorageError(
            f"{existing} isn't writable for this user. Check permissions; it can be looked at with read_only=True"
        )
