"""How an object gets its name: whole, or not at all.

What fsspec opens for writing is published when it is closed, also by the exception that interrupted the writing. So
nothing is ever written under the final name bit by bit.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from ckptstore.storage.generic.failures import Incomplete
from ckptstore.storage.generic.remote import Remote
from ckptstore.storage.local import TEMPORARY

_FOLDER_TRIES = 10


def publish(remote: Remote, path: str, size: int, upload: Callable[[str], Any]) -> None:
    """Have ``upload`` write ``size`` bytes to the path that it is given, and let them appear at ``path``.

    Raises:
        NotImplementedError: this class of file systems can't do it.
        Incomplete: there are fewer or more bytes than that; nothing is at ``path``.
    """
    how = remote.traits.publish
    if how == "never":
        raise NotImplementedError
    if how == "put":
        upload(path)
        _check(remote, path, size)
        return
    temp = beside(path)
    try:
        in_folder(remote, temp, lambda: upload(temp))
        _check(remote, temp, size)
        if how == "rename":
            remote.call("mv", temp, path)
            return
        remote.call("cp_file", temp, path)
        _check(remote, path, size)
    except BaseException:
        remove_quietly(remote, temp)
        raise
    # A killed save leaves such a thing, too, and prune collects it.
    remove_quietly(remote, temp)


def create_by_open(remote: Remote, path: str, data: bytes) -> None:
    """Create by opening with "x"; only a crash can leave something half written.

    Raises:
        FileExistsError: the path is taken.
    """
    file = in_folder(remote, path, lambda: _opened(remote, path))
    try:
        try:
            remote.locked(lambda: file.write(data))
        finally:
            remote.locked(file.close)
        _check(remote, path, len(data))
    except BaseException:
        remove_quietly(remote, path)
        raise


def beside(path: str) -> str:
    """A temporary name in the same folder."""
    folder, slash, _ = path.rpartition("/")
    return f"{folder}{slash}{TEMPORARY}{secrets.token_hex(8)}"


def remove_quietly(remote: Remote, path: str) -> None:
    """Remove an object of our own, as far as possible."""
    with suppress(Exception):
        remote.call("rm_file", path)


def in_folder(remote: Remote, path: str, work: Callable[[], Any]) -> Any:
    """``work``, which writes at ``path``, once its folder is there; another may remove it as empty at any moment."""
    if remote.traits.bucket:
        return work()
    folder = path.rpartition("/")[0]
    for _ in range(_FOLDER_TRIES):
        with suppress(FileExistsError, FileNotFoundError):
            remote.call("makedirs", folder, exist_ok=True)
        with suppress(FileNotFoundError):
            return work()
    remote.call("makedirs", folder, exist_ok=True)
    return work()


def _opened(remote: Remote, path: str) -> Any:
    try:
        return remote.call("open", path, remote.traits.open_mode)
    except FileExistsError:
        raise
    except OSError as error:
        # SFTP has no error of its own for a name that is taken.
        if not isinstance(error, FileNotFoundError) and remote.exists(path):
            raise FileExistsError(path) from error
        raise


def _check(remote: Remote, path: str, size: int) -> None:
    found = remote.info(path).get("size")
    if found != size:
        remove_quietly(remote, path)
        raise Incomplete(f"{found} bytes are there of {size} that were written")
