"""From a path or URL to the storage behind it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

from ckptstore.errors import StorageError
from ckptstore.storage.base import Storage
from ckptstore.storage.local import LocalStorage
from ckptstore.storage.memory import MemoryStorage

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/(/?)(.*)", re.DOTALL)
_CHAIN = re.compile(r"[A-Za-z][A-Za-z0-9+._-]+::[A-Za-z][A-Za-z0-9+.-]+:/", re.DOTALL)
_OURS = {"file", "local", "memory"}


def open_storage(
    url: str | os.PathLike[str],
    *,
    read_only: bool = False,
    options: Mapping[str, Any] | None = None,
    patient: bool = False,
) -> Storage:
    """The storage at a path, ``file:///absolute/path``, ``memory://name``, ``s3://bucket/prefix`` or in whatever else
    fsspec knows. Creates nothing.

    Args:
        options: credentials, endpoint and the like, of ``s3fs.S3FileSystem``, or of the class that fsspec has for the
            scheme.
        patient: try something far away again for minutes before a call fails, as a run does that saves.

    Raises:
        NotFoundError: opened read-only, and there is nothing.
        StorageError: no such scheme, a URL that carries secrets, options where there are none to give, a package that
            isn't installed, or a place that can't hold checkpoints.
    """
    text = os.fspath(url)
    match = _SCHEME.match(text)
    if options and (match is None or match[1].lower() in _OURS):
        raise StorageError(f"storage_options={sorted(options)} are for storage far away; leave them out")
    if match is None and _CHAIN.match(text):
        raise StorageError(f"{text.partition('::')[0]}:: is not supported: give the URL of the storage itself")
    if match is None:
        return LocalStorage(_expanded(text), read_only=read_only)
    scheme, rest = match[1].lower(), match[3]
    if not match[2]:
        raise StorageError(f"a URL needs two slashes, {scheme}://; pathlib.Path removes one, so give it as text")
    _refuse_secrets(scheme, rest)
    if scheme in ("file", "local"):
        return LocalStorage(_file_path(rest), read_only=read_only)
    if scheme == "memory":
        return _open_memory(rest, read_only=read_only)
    if scheme in ("s3", "s3a"):
        return _open_s3(rest, options or {}, read_only, patient)
    return _open_generic(scheme, rest, options or {}, read_only, patient)


def _expanded(path: str) -> str:
    if not path:
        raise StorageError("the path is empty; '.' is the current folder")
    if "\0" in path:
        raise StorageError("the path contains a NUL byte")
    return os.path.expanduser(path)


def _refuse_secrets(scheme: str, rest: str) -> None:
    # The message must not repeat the URL: it would end up in logs and bug reports.
    if "@" in rest.partition("/")[0]:
        raise StorageError(f"this {scheme}:// URL has a user or password in it. Give credentials by the environment")
    if "?" in rest or "#" in rest:
        raise StorageError(f"this {scheme}:// URL has a '?' or '#' part, which may hold secrets. Leave it out")


def _file_path(rest: str) -> str:
    host, slash, path = rest.partition("/")
    if host not in ("", "localhost") or not slash:
        raise StorageError("a file URL has an absolute path and no host: file:///absolute/path")
    return _expanded("/" + unquote(path))


def _open_s3(rest: str, options: Mapping[str, Any], read_only: bool, patient: bool) -> Storage:
    bucket, _, prefix = rest.partition("/")
    prefix = prefix.strip("/")
    if not bucket:
        raise StorageError("an s3 URL needs a bucket: s3://bucket/prefix")
    if "//" in prefix or any(ord(letter) < ord(" ") for letter in rest):
        raise StorageError(f"{rest!r} is no place in a bucket: empty names and control characters are not allowed")
    try:
        from ckptstore.storage.s3 import S3Storage
    except ImportError as error:
        raise StorageError(f"s3:// needs {error.name}: pip install 'ckptstore[s3]'") from error
    return S3Storage(bucket, prefix, options, read_only=read_only, patient=patient)


def _open_generic(scheme: str, rest: str, options: Mapping[str, Any], read_only: bool, patient: bool) -> Storage:
    place = rest.strip("/")
    if not place:
        raise StorageError(f"a URL needs a place: {scheme}://bucket/prefix, or {scheme}://host/path")
    if "//" in place or {".", ".."} & set(place.split("/")) or any(ord(letter) < ord(" ") for letter in rest):
        raise StorageError(f"{rest!r} is no place: empty names, '..' and control characters are not allowed")
    # Imported here: it takes a while, and needs packages that others do without.
    from ckptstore.storage.generic import GenericStorage

    return GenericStorage(scheme, place, options, read_only=read_only, patient=patient)


def _open_memory(name: str, *, read_only: bool) -> Storage:
    if not name.strip("/"):
        raise StorageError("a memory URL needs a name: memory://name")
    return MemoryStorage(name.strip("/"), read_only=read_only)
