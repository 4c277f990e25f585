"""One file system of fsspec: made without caches, asked from any thread, asked again as long as that may help."""

from __future__ import annotations

import asyncio
import inspect
import os
import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import fsspec
from fsspec.asyn import AsyncFileSystem
from fsspec.registry import known_implementations

from ckptstore.errors import CheckpointError, StorageError
from ckptstore.storage.generic.failures import is_missing, is_transient, may_be_applied, translate
from ckptstore.storage.generic.mask import Mask
from ckptstore.storage.generic.traits import Traits, traits_of
from ckptstore.storage.retrying import Outage, deadline_s, tries

T = TypeVar("T")

PACKED = {
    *("async_wrapper", "asynclocal", "asyncwrapper", "blockcache", "cached", "data", "dir", "filecache", "generic"),
    *("libarchive", "reference", "simplecache", "tar", "zip"),
}
"""Protocols that are no places of their own, but something around another one."""


class Remote:
    """A folder of a file system.

    Args:
        protocol: its name in fsspec.
        place: what follows ``protocol://`` in the URL.
        options: of the file system's class.

    Attributes:
        url: without credentials.
        root: how the file system calls the folder, without "/" at its end.
        traits: what its class does.

    Raises:
        StorageError: no such protocol, a package that isn't installed, or options that the class doesn't take.
        UnavailableError: there is no connection, where the class makes one at once.
    """

    def __init__(self, protocol: str, place: str, options: Mapping[str, Any], *, patient: bool = False) -> None:
        place = place.rstrip("/")
        self.url = f"{protocol}://{place}"
        self._mask, self._pid = Mask(options), os.getpid()
        end_s = deadline_s(patient=patient)
        self._outage = Outage(self.url, self._mask.text, end_s)
        self._tries = tries(is_transient, end_s, self._outage)
        cls = _file_system_class(protocol)
        failed = None
        try:
            self._fs = cls(**_arguments(cls, self.url, options))
        except Exception as error:
            failed = error
        if failed is not None:
            raise self._refused(failed, options) from (failed if self._mask.is_clean(failed) else None)
        self.traits: Traits = traits_of(self._fs)
        self.root = self._root(place)
        self._turn = None if self.traits.threads else threading.Lock()

    @property
    def fs(self) -> fsspec.AbstractFileSystem:
        """The file system."""
        return self._fs

    def run(self, work: Callable[[], T], doing: str, key: str, *, writing: bool = False) -> T:
        """``work``, some calls, from any thread; again as long as what it raises is transient.

        Raises:
            CheckpointError: what it raised at last, translated, and without the values of the options.
        """
        self._check_process()
        unsure = False

        def once() -> T:
            nonlocal unsure
            try:
                return work()
            except Exception as error:
                unsure = unsure or (writing and may_be_applied(error))
                raise

        failed: Exception
        try:
            done: T = self._tries(once)
            self._outage.over()
            return done
        except CheckpointError:
            raise
        except Exception as error:
            failed = error
        where = f"{self.url}/{key}".rstrip("/")
        # Where a failure is called "not found", the cause tells what it was.
        said = self._mask.text(failed.__cause__ or failed)
        shown = translate(failed, doing, where, key, said, unsure=unsure)
        raise shown from (failed if self._mask.is_clean(failed) else None)

    def call(self, method: str, *arguments: Any, **how: Any) -> Any:
        """One method of the file system."""
        coroutine = getattr(self._fs, f"_{method}", None)
        if isinstance(self._fs, AsyncFileSystem) and inspect.iscoroutinefunction(coroutine):
            return self._wait(coroutine(*arguments, **how))
        return self.locked(lambda: getattr(self._fs, method)(*arguments, **how))

    def locked(self, work: Callable[[], T]) -> T:
        """``work``, alone where the file system can't do several things at once."""
        if self._turn is None:
            return work()
        with self._turn:
            self._revive()
            return work()

    def read(self, path: str, start: int, end: int) -> bytes:
        """The bytes from ``start`` to ``end``, or as many as the answer has."""
        if self.traits.asks_ahead:
            return self.locked(lambda: self._read_ahead(path, start, end))
        data: bytes = self.call("cat_file", path, start=start, end=end)
        return data

    def info(self, path: str) -> dict[str, Any]:
        """What the file system knows of one object, asked anew."""
        self._fs.invalidate_cache()
        found: dict[str, Any] = self.call("info", path)
        if found.get("type") == "directory":
            raise FileNotFoundError(path)
        return found

    def exists(self, path: str) -> bool:
        """Whether there is an object. fsspec's own ``exists`` takes every failure for a no."""
        try:
            self.info(path)
        except Exception as error:
            if is_missing(error):
                return False
            raise
        return True

    def _read_ahead(self, path: str, start: int, end: int) -> bytes:
        with self._fs.open(path, "rb") as file:
            return b"".join(file.readv([(start, end - start)]))

    def _revive(self) -> None:
        """Connect again where a connection was kept that is no more: SFTPFileSystem doesn't by itself."""
        client: Any = getattr(self._fs, "client", None)
        if hasattr(client, "get_transport") and hasattr(self._fs, "_connect"):
            transport = client.get_transport()
            if transport is None or not transport.is_active():
                self._fs._connect()

    def _wait(self, coroutine: Any) -> Any:
        running = asyncio.run_coroutine_threadsafe(coroutine, self._fs.loop)
        try:
            return running.result()
        except BaseException:
            # Interrupted: nothing may go on behind the caller's back.
            running.cancel()
            raise

    def _root(self, place: str) -> str:
        root = str(self._fs._strip_protocol(self.url)).rstrip("/")
        # A class that was registered under another name than its own leaves the URL as it is.
        return root if self.traits.by_links or "://" not in root else place

    def _refused(self, error: Exception, options: Mapping[str, Any]) -> CheckpointError:
        said = self._mask.text(error)
        if isinstance(error, ImportError):
            return StorageError(f"{self.url}: {said}. pip install what it names")
        if isinstance(error, TypeError | ValueError):
            return StorageError(f"{self.url}: storage_options={sorted(options)} don't suffice or don't fit: {said}")
        return translate(error, "open", self.url, "", said, unsure=False)

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise StorageError(
                f"{self.url} was opened in process {self._pid}; its connections can't be used in the fork "
                f"{os.getpid()}: open it again there"
            )


def _file_system_class(protocol: str) -> Any:
    known = {*fsspec.available_protocols(), *fsspec.registry}
    if protocol in PACKED or protocol not in known:
        names = ", ".join(sorted(known - PACKED - {"file", "local", "memory", "s3", "s3a"}))
        raise StorageError(
            f"{protocol}:// is not supported. Give a path, file:///absolute/path, memory://name, s3://bucket/prefix, "
            f"or what fsspec knows: {names}"
        )
    try:
        return fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        entry = known_implementations.get(protocol, {})
        package = _PACKAGES.get(protocol) or entry.get("class", protocol).partition(".")[0]
        raise StorageError(
            f"{protocol}:// needs another package: pip install {package} (fsspec says: {entry.get('err', error)})"
        ) from error


_PACKAGES = {
    "gs": "'ckptstore[gcs]'",
    "gcs": "'ckptstore[gcs]'",
    "az": "'ckptstore[azure]'",
    "abfs": "'ckptstore[azure]'",
    "abfss": "'ckptstore[azure]'",
    "adl": "'ckptstore[azure]'",
    "hf": "huggingface_hub",
    "http": "aiohttp",
    "https": "aiohttp",
    "sftp": "paramiko",
    "ssh": "paramiko",
    "smb": "smbprotocol",
    "hdfs": "pyarrow",
    "webhdfs": "requests",
    "github": "requests",
    "gist": "requests",
    "dbfs": "requests",
    "git": "pygit2",
    "gdrive": "gdrive-fsspec",
    "lakefs": "lakefs-spec",
    "root": "fsspec-xrootd",
}
"""What to install for a protocol, where the module has another name than its package, or is fsspec's own."""


def _arguments(cls: Any, url: str, options: Mapping[str, Any]) -> dict[str, Any]:
    arguments = {**cls._get_kwargs_from_urls(url), **options, "skip_instance_cache": True}
    # Others hand what they don't know to their client, which refuses it.
    if issubclass(cls, AsyncFileSystem) or "use_listings_cache" in inspect.signature(cls.__init__).parameters:
        arguments["use_listings_cache"] = False
    return arguments
