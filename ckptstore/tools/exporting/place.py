"""Where an export goes: written beside its place, and moved there when all of it is on the disk."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ckptstore.errors import ExistsError, FormatError, NotFoundError, StorageError, StorageFullError
from ckptstore.storage.posix import os_errors, sync
from ckptstore.units import size_text

_TAKEN = frozenset({errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR})
_NO_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS})

# Besides the tensors there are headers, records and a few files.
_MARGIN_BYTES = 1 << 20


def local_path(place: str | os.PathLike[str]) -> Path:
    """The place on this machine that a person named.

    Raises:
        FormatError: it is a URL, or no place that a file could have.
    """
    text = os.fspath(place)
    if not text or "\0" in text:
        raise FormatError(f"{place!r} is no path")
    if "://" in text:
        raise FormatError(f"{text!r:.200} is a URL, and exports go to local files: export to a path, and copy it there")
    path = Path(os.path.abspath(text))
    if not path.name:
        raise FormatError(f"{text!r} is no place for an export: name a file or folder in it")
    return path


@contextmanager
def workplace(path: Path, *, folder: bool, overwrite: bool, is_one: Callable[[Path], bool]) -> Iterator[Path]:
    """Where to write, to be moved to ``path`` at the end: a new folder, or the name for a file.

    It lies in ``PATH.tmp-…``, which is removed on every end but that of the process.

    Args:
        path: where it shall be.
        folder: it is a folder.
        overwrite: what is there already is replaced.
        is_one: whether an existing folder is an export of this kind; no other one is replaced.

    Raises:
        NotFoundError: there is no folder for it.
        ExistsError: something is there, and is not to be replaced.
        StorageError: the disk failed.
    """
    if not path.parent.is_dir():
        raise NotFoundError(f"there is no folder {path.parent}: make it first", key=str(path))
    if os.path.lexists(path):
        _check_replaceable(path, folder, overwrite, is_one)
    temporary = path.with_name(f"{path.name}.tmp-{secrets.token_hex(4)}")
    with os_errors("make", str(temporary), str(path)):
        temporary.mkdir()
    try:
        work = temporary / path.name
        if folder:
            with os_errors("make", str(work), str(path)):
                work.mkdir()
        yield work
        with os_errors("write", str(work), str(path)):
            _sync_tree(work)
        with os_errors("move the export to", str(path), str(path)):
            _publish(work, path, overwrite, temporary / "replaced")
            _sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def require_space(path: Path, wanted_bytes: int) -> None:
    """Nothing, if there is room for an export.

    Raises:
        StorageFullError: there isn't.
    """
    with os_errors("ask for the free space of", str(path.parent), str(path)):
        free = shutil.disk_usage(path.parent).free
    if free < wanted_bytes + _MARGIN_BYTES:
        raise StorageFullError(
            f"the export needs {size_text(wanted_bytes)} ({wanted_bytes} bytes), and {path.parent} has "
            f"{size_text(free)} left. Free some space, or export less with only=",
            key=str(path),
        )


def _check_replaceable(path: Path, folder: bool, overwrite: bool, is_one: Callable[[Path], bool]) -> None:
    if not overwrite:
        raise ExistsError(f"{path} exists already: choose another name, or allow overwriting", key=str(path))
    if path.is_symlink() or path.is_dir() != folder or not (folder or path.is_file()):
        kind = "folder" if folder else "file"
        raise ExistsError(f"{path} is no {kind}, and the export is one: remove it, or choose another name")
    if folder and any(path.iterdir()) and not is_one(path):
        # All that is in it would be gone.
        raise ExistsError(f"{path} is a folder that holds something else than an export: choose another name")


def _publish(work: Path, path: Path, overwrite: bool, replaced: Path) -> None:
    if not work.is_dir():
        if overwrite:
            os.replace(work, path)
        else:
            _link(work, path)
        return
    if overwrite and path.is_dir():
        os.rename(path, replaced)
    try:
        os.rename(work, path)
    except OSError as error:
        if replaced.exists():
            with suppress(OSError):
                os.rename(replaced, path)
        raise _taken(path, error) from error


def _link(work: Path, path: Path) -> None:
    # A link is refused where a file is; a rename would replace it.
    try:
        os.link(work, path)
    except OSError as error:
        if error.errno not in _NO_LINKS or os.path.lexists(path):
            raise _taken(path, error) from error
        os.rename(work, path)


def _taken(path: Path, error: OSError) -> Exception:
    if error.errno in _TAKEN:
        return ExistsError(f"{path} came into being meanwhile: choose another name", key=str(path))
    return error


def _sync_tree(path: Path) -> None:
    if path.is_dir():
        for child in path.iterdir():
            _sync_tree(child)
    elif not path.is_file():
        raise StorageError(f"{path} isn't there any more", key=str(path))
    _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)
