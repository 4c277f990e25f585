"""What an operation asks of the file system, in order, each file and folder by a number of its own."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn, Self
from unittest import mock

Event = list[Any]
"""[create|mkdir|link, folder, name, node], [unlink|rmdir, folder, name], [data|fsync, node] or [note, message]."""

ABOVE = 0
"""The folder in which the store's folder lies."""


BEGIN: Event = ["note", "begin"]
"""Before it the log tells what was there already."""


_WRITES = ("write", "pwrite", "ftruncate", "posix_fallocate")


class Recorder:
    """Records the calls of this process on what lies below ``root`` while it is entered.

    Args:
        root: the store's folder, there or not.
        dies_at: after how many calls to call ``die``; 0 for never.
        die: gets the log, and doesn't return.
    """

    def __init__(self, root: str, *, dies_at: int = 0, die: Callable[[list[Event]], NoReturn]) -> None:
        self.log: list[Event] = []
        self._dies_at, self._die = dies_at, die
        self._patches = ExitStack()
        self._nodes: dict[tuple[int, int], int] = {}
        self._new_node(os.stat(os.path.dirname(root)))
        if os.path.isdir(root):
            self._existing(Path(root), ABOVE)
        self.log.append(BEGIN)
        self._dies_at += len(self.log) if dies_at else 0

    def __enter__(self) -> Self:
        for name in ("open", "mkdir", "link", "unlink", "rmdir", "fsync", *_WRITES):
            replacement = getattr(self, f"_{name}", self._data)(getattr(os, name))
            self._patches.enter_context(mock.patch(f"os.{name}", replacement))
        return self

    def __exit__(self, *_: object) -> None:
        self._patches.close()

    def note(self, message: Any) -> None:
        """Mark that ``message`` went out at this point."""
        self._add(["note", message])

    def _add(self, event: Event) -> None:
        self.log.append(event)
        if len(self.log) == self._dies_at:
            self._die(self.log)

    def _existing(self, path: Path, folder: int) -> None:
        """What is there already is on the disk."""
        found = path.lstat()
        node = self._new_node(found)
        self.log.append(["mkdir" if path.is_dir() else "create", folder, path.name, node])
        self.log.append(["fsync", folder])
        if path.is_dir():
            for inner in sorted(path.iterdir()):
                self._existing(inner, node)

    def _new_node(self, found: os.stat_result) -> int:
        # The system gives the number of a file that is gone to the next one; these are never used again.
        node = max(self._nodes.values(), default=-1) + 1
        self._nodes[found.st_dev, found.st_ino] = node
        return node

    def _node(self, fd: int) -> int:
        found = os.fstat(fd)
        return self._nodes[found.st_dev, found.st_ino]

    def _open(self, real: Callable[..., int]) -> Callable[..., int]:
        def call(path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
            fd = real(path, flags, mode, dir_fd=dir_fd)
            if flags & os.O_CREAT:
                assert dir_fd is not None
                self._add(["create", self._node(dir_fd), path, self._new_node(os.fstat(fd))])
            return fd

        return call

    def _mkdir(self, real: Callable[..., None]) -> Callable[..., None]:
        def call(path: str, mode: int = 0o777, *, dir_fd: int) -> None:
            real(path, mode, dir_fd=dir_fd)
            self._add(["mkdir", self._node(dir_fd), path, self._new_node(os.stat(path, dir_fd=dir_fd))])

        return call

    def _link(self, real: Callable[..., None]) -> Callable[..., None]:
        def call(source: str, target: str, *, src_dir_fd: int, dst_dir_fd: int, follow_symlinks: bool) -> None:
            real(source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd, follow_symlinks=follow_symlinks)
            found = os.stat(target, dir_fd=dst_dir_fd)
            self._add(["link", self._node(dst_dir_fd), target, self._nodes[found.st_dev, found.st_ino]])

        return call

    def _unlink(self, real: Callable[..., None], what: str = "unlink") -> Callable[..., None]:
        def call(path: str, *, dir_fd: int) -> None:
            real(path, dir_fd=dir_fd)
            self._add([what, self._node(dir_fd), path])

        return call

    def _rmdir(self, real: Callable[..., None]) -> Callable[..., None]:
        return self._unlink(real, "rmdir")

    def _fsync(self, real: Callable[..., None]) -> Callable[..., None]:
        def call(fd: int) -> None:
            real(fd)
            self._add(["fsync", self._node(fd)])

        return call

    def _data(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(fd: int, *arguments: Any) -> Any:
            result = real(fd, *arguments)
            self._add(["data", self._node(fd)])
            return result

        return call
