"""Files by descriptor below an open folder, and the one border where an OSError becomes one of our errors."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from typing import Literal

from ckptstore.errors import (
    CheckpointError,
    ExistsError,
    IntegrityError,
    NotFoundError,
    StorageError,
    StorageFullError,
    UnavailableError,
)

FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
# O_NONBLOCK: opening a FIFO that somebody planted would wait for a writer for ever.
EXISTING_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK

UNSUPPORTED = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS})

_O_DIRECT: int = getattr(os, "O_DIRECT", 0)
_F_FULLFSYNC: int | None = getattr(fcntl, "F_FULLFSYNC", None)

# 0, 1 and 2 are the standard streams, also for code that finds them closed.
_FIRST_FREE = 3

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_DENIED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
FOREIGN = frozenset({errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENXIO, errno.ENODEV})
_UNREACHABLE = frozenset(
    {errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETUNREACH}
)
_NO_DESCRIPTORS = frozenset({errno.EMFILE, errno.ENFILE})
_TRANSIENT = _UNREACHABLE | _NO_DESCRIPTORS
_MEANING: tuple[tuple[frozenset[int], type[StorageError], str], ...] = (
    (_FULL, StorageFullError, ". Free some space, or raise the quota"),
    (_UNREACHABLE, UnavailableError, ". The file server doesn't answer; try again later"),
    (_DENIED, StorageError, ". Check permissions, and how it is mounted"),
    (_NO_DESCRIPTORS, StorageError, ". Raise the limit of open files: ulimit -n"),
    (frozenset({errno.EIO}), StorageError, ". Look into the system log: dmesg"),
)
_CERTAINLY_NOT_LINKED = _FULL | _DENIED | {errno.ENOENT, errno.ENAMETOOLONG, errno.EINVAL, errno.EXDEV}
_LINKS_REFUSED = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS})

Outcome = Literal["failed", "unknown"]


class Descriptor:
    """A file descriptor, closed by ``close`` or at the latest when nobody holds this object any more.

    A thread that still uses it keeps it open, so that its number can't come to mean another file.
    """

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def close(self) -> None:
        """Close it, once.

        Raises:
            OSError: what was written may be lost.
        """
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Descriptor:
        return self

    def __exit__(self, *_: object) -> None:
        # What was done through a folder, or read, stands whatever close says; who wrote a file closes it by name.
        with contextlib.suppress(OSError):
            self.close()

    def __del__(self) -> None:
        with contextlib.suppress(OSError):
            self.close()


def open_at(folder: Descriptor | None, name: str, flags: int) -> Descriptor:
    """Open ``name`` in ``folder`` (None: a path of the user's own), never as descriptor 0, 1 or 2."""
    # 0o666 and 0o777 leave the rights to the umask: project folders are often shared by a team.
    fd = os.open(name, flags | os.O_CLOEXEC, 0o666, dir_fd=None if folder is None else folder.fd)
    if fd >= _FIRST_FREE:
        return Descriptor(fd)
    # A print() of a process that closed its standard streams would go into the checkpoint.
    with Descriptor(fd):
        return Descriptor(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _FIRST_FREE))


def open_regular(folder: Descriptor, name: str) -> tuple[Descriptor, int]:
    """Open an existing regular file for reading: (descriptor, size in bytes).

    Raises:
        OSError: ELOOP where it is something else.
    """
    file = open_at(folder, name, EXISTING_FILE)
    return file, regular_size(os.fstat(file.fd))


def regular_size(found: os.stat_result) -> int:
    """Size in bytes of a regular file.

    Raises:
        OSError: ELOOP where it is something else.
    """
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    return found.st_size


def link_new(folder: Descriptor, temp: str, name: str, *, path: str, key: str) -> bool:
    """Give the file ``temp`` its final name, unless that is taken. False: the file system has no hard links.

    Raises:
        FileExistsError: the name belongs to another file.
        StorageError: ``outcome`` is "unknown" where the link may have been made.
    """
    try:
        os.link(temp, name, src_dir_fd=folder.fd, dst_dir_fd=folder.fd, follow_symlinks=False)
    except FileExistsError:
        # An NFS client that lost the server's answer asks again, and is told that its own link exists.
        if not _is_same_file(folder, temp, name):
            raise
    except OSError as error:
        if error.errno in _LINKS_REFUSED:
            return False
        outcome: Outcome = "failed" if error.errno in _CERTAINLY_NOT_LINKED else "unknown"
        raise translated(error, "create", path, key, outcome=outcome) from error
    return True


def _is_same_file(folder: Descriptor, one: str, other: str) -> bool:
    found = [os.stat(name, dir_fd=folder.fd, follow_symlinks=False) for name in (one, other)]
    return os.path.samestat(*found)


def make_folder(parent: Descriptor, name: str) -> bool:
    """Make a folder. False: there is something of that name already."""
    try:
        os.mkdir(name, dir_fd=parent.fd)
    except FileExistsError:
        return False
    return True


def enter_folder(parent: Descriptor, name: str) -> tuple[Descriptor, bool]:
    """Open a folder, made if it isn't there: (descriptor, whether it was made)."""
    with contextlib.suppress(FileNotFoundError):
        return open_at(parent, name, FOLDER), False
    made = make_folder(parent, name)
    return open_at(parent, name, FOLDER), made


def remove_empty_folder(parent: Descriptor, name: str) -> bool:
    """Remove a folder. False: something is in it."""
    try:
        os.rmdir(name, dir_fd=parent.fd)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    return True


def preallocate(fd: int, size: int) -> None:
    """Reserve the space, where the file system can.

    Raises:
        OSError: it isn't there.
    """
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(fd, 0, size)
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise


def sync(fd: int) -> bool:
    """Make a file or folder durable. False: the file system can't.

    Raises:
        OSError: the file is dead; a second fsync would succeed without having written anything.
    """
    try:
        if _F_FULLFSYNC is None:
            os.fsync(fd)
        else:
            fcntl.fcntl(fd, _F_FULLFSYNC)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        return False
    return True


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Write everything; a system call interrupted by a signal is repeated by Python (PEP 475)."""
    view = memoryview(data)
    while view:
        view = view[_counted(os.write(fd, view)) :]


def pwrite_all(fd: int, data: memoryview, offset: int) -> None:
    """Write everything at ``offset``."""
    while data:
        count = _counted(os.pwrite(fd, data, offset))
        data, offset = data[count:], offset + count


def _counted(count: int) -> int:
    if count == 0:
        raise OSError(errno.EIO, "a write wrote nothing")
    return count


def set_direct(fd: int, on: bool) -> bool:
    """Bypass the page cache, or don't. False: refused.

    Not asked for at open, because Linux creates the file before it refuses the flag.
    """
    if not _O_DIRECT:
        return not on
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | _O_DIRECT if on else flags & ~_O_DIRECT)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        return False
    return True


def reopen_direct(file: Descriptor) -> Descriptor | None:
    """The same file a second time, past the page cache; None where that can't be."""
    try:
        direct = open_at(None, f"/proc/self/fd/{file.fd}", os.O_RDONLY)
        return direct if set_direct(direct.fd, True) else None
    except OSError as error:
        if error.errno in _NO_DESCRIPTORS:
            raise
        return None


@contextlib.contextmanager
def os_errors(
    doing: str, path: str, key: str, *, outcome: Outcome = "failed", damage: frozenset[int] = frozenset()
) -> Iterator[None]:
    """Turn every OSError inside into one of ours: "can't ``doing`` ``path``: …"; ``damage`` into IntegrityError."""
    try:
        yield
    except CheckpointError:
        raise
    except OSError as error:
        found = translated(error, doing, path, key, outcome=outcome)
        if error.errno in damage:
            found = IntegrityError(str(found), key=key)
        raise found from error


def translated(error: OSError, doing: str, path: str, key: str, *, outcome: Outcome = "failed") -> CheckpointError:
    """Our error for the system's, by what the caller can do about it."""
    number = error.errno
    if outcome == "failed" and number == errno.ENOENT:
        return NotFoundError(f"{path} doesn't exist", key=key)
    if outcome == "failed" and number == errno.EEXIST:
        return ExistsError(f"{path} exists already, and nothing is ever overwritten", key=key)
    if number in FOREIGN:
        message = (
            f"{path} is no regular file in regular folders, but a symlink, a device or the like stands in its place; "
            "it is not followed. Find out who put it there, and remove it"
        )
        return StorageError(message, outcome=outcome, key=key)
    meanings = [(kind, way_out) for numbers, kind, way_out in _MEANING if number in numbers]
    kind, way_out = meanings[0] if meanings else (StorageError, "")
    message = f"can't {doing} {path}: {error.strerror or error}{way_out}"
    transient = number in _TRANSIENT
    return kind(message, transient=transient, outcome=outcome, key=key)
