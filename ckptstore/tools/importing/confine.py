"""What the process that reads a foreign checkpoint may not do, whatever is in it."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path
from typing import Any

from ckptstore.tools.importing.landlock import restrict

_TRUSTED = {"torch", "numpy", "ckptstore"} | (sys.stdlib_module_names - {"antigravity", "this"})
"""Packages that may still be imported; PyTorch and NumPy import some of their own modules when these are needed."""

_REFUSED = (
    "socket.", "subprocess.", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.startfile", "os.system",
    "os.kill", "os.putenv", "os.unsetenv", "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink",
    "os.truncate", "os.ch", "os.utime", "os.setxattr", "os.removexattr", "pty.", "shutil.", "tempfile.",
    "ctypes.dlopen", "ctypes.dlsym", "ctypes.call_function", "ftplib.", "http.", "imaplib.", "poplib.", "smtplib.",
    "telnetlib.", "urllib.", "webbrowser.", "winreg.", "sqlite3.",
)  # fmt: skip
"""Beginnings of the names of events, as Python's own documentation lists them."""

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def limit(memory_bytes: int, cpu_s: int, files: int) -> None:
    """Bound what this process may take from now on; whatever goes beyond ends it, or is refused by the system.

    Args:
        memory_bytes: address space beyond what it has.
        cpu_s: seconds of work.
        files: open files beyond what it has.
    """
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        _lower(resource.RLIMIT_AS, pages * resource.getpagesize() + memory_bytes)
    except OSError:
        # Without a /proc the system has no such limit either.
        pass
    used = resource.getrusage(resource.RUSAGE_SELF)
    # The signal of the first of both limits says what has ended the process.
    _lower(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + 1 + cpu_s, spare=5)
    _lower(resource.RLIMIT_FSIZE, 0)
    _lower(resource.RLIMIT_CORE, 0)
    _lower(resource.RLIMIT_NOFILE, 64 + files)
    # Neither processes nor threads.
    _lower(resource.RLIMIT_NPROC, 0)


def _lower(which: int, value: int, spare: int = 0) -> None:
    hard = resource.getrlimit(which)[1]
    most = value + spare if hard == resource.RLIM_INFINITY else min(value + spare, hard)
    resource.setrlimit(which, (min(value, most), most))


def lock() -> int:
    """From now on no sockets, processes, foreign libraries, changes of files, or modules of others; for good.

    Returns:
        The version of the kernel's Landlock, which refuses these, too; 0 for none.
    """
    by_kernel = restrict()
    sys.addaudithook(_watch)
    return by_kernel


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open":
        if isinstance(arguments[2], int) and arguments[2] & _WRITING:
            raise PermissionError(f"a reader of checkpoints may not write to {arguments[0]!r:.200}")
    elif event == "import":
        if str(arguments[0]).partition(".")[0] not in _TRUSTED:
            raise PermissionError(f"a reader of checkpoints may not import {arguments[0]!r:.200}")
    elif event.startswith(_REFUSED):
        raise PermissionError(f"a reader of checkpoints may not do {event}")
