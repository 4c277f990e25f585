"""A foreign folder, looked at without opening what might hang, lead elsewhere or be without end."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckptstore.errors import FormatError, NotFoundError, StorageError
from ckptstore.units import size_text

JSON_LIMIT_BYTES = 64 << 20
_JSON_DEPTH = 64
_DIGITS = re.compile(r"([0-9]+)")


@dataclass(frozen=True)
class Folder:
    """What lies in a folder, by name.

    Attributes:
        path: of the folder.
        root: the folder that was named by the caller; no link may lead out of it.
        files: regular files, and links to such within ``root`` → size.
        links: those of ``files`` that are links → the file they lead to.
        folders: subfolders; a link is none.
        left_out: what is neither → why.
    """

    path: Path
    root: Path
    files: Mapping[str, int]
    links: Mapping[str, Path]
    folders: frozenset[str]
    left_out: Mapping[str, str]

    @classmethod
    def at(cls, path: Path, root: Path | None = None) -> Folder:
        """Look at a folder.

        Raises:
            NotFoundError: it isn't there.
            StorageError: it can't be read.
        """
        path = path if root else Path(os.path.realpath(path))
        root = root or _root(path)
        files: dict[str, int] = {}
        links: dict[str, Path] = {}
        folders: set[str] = set()
        left_out: dict[str, str] = {}
        for entry in _entries(path):
            try:
                found = _kind(entry, root)
            except OSError as error:
                found = f"can't be looked at: {error.strerror or error}"
            if isinstance(found, str):
                left_out[entry.name] = found
            elif found is None:
                folders.add(entry.name)
            else:
                files[entry.name] = found
                if entry.is_symlink():
                    links[entry.name] = Path(os.path.realpath(entry.path))
        return cls(path, root, files, links, frozenset(folders), left_out)

    def child(self, name: str) -> Folder:
        """One of ``folders``.

        Raises:
            NotFoundError, StorageError: as ``at``.
        """
        return Folder.at(self.path / name, self.root)

    def read_json(self, name: str) -> Any:
        """The content of a JSON file, NaN and the infinities included.

        Raises:
            FormatError: it is none, or too large, or nested too deeply.
            StorageError: it can't be read.
        """
        return read_json(self.path / name)


def read_json(path: Path) -> Any:
    """See ``Folder.read_json``."""
    try:
        # A pipe that was put in the file's place meanwhile would block for ever.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise FormatError(f"{path.name} is no regular file", key=str(path))
            if found.st_size > JSON_LIMIT_BYTES:
                sizes = f"{size_text(found.st_size)}, more than the {size_text(JSON_LIMIT_BYTES)} read of a JSON file"
                raise FormatError(f"{path.name} has {sizes}", key=str(path))
            data = file.read(JSON_LIMIT_BYTES + 1)
    except OSError as error:
        raise StorageError(f"{path} can't be read: {error.strerror or error}", key=str(path)) from error
    try:
        found = json.loads(data)
        if _is_deep(found):
            raise RecursionError
        return found
    except RecursionError as error:
        raise FormatError(f"{path.name} is nested too deeply", key=str(path)) from error
    except ValueError as error:
        raise FormatError(f"{path.name} is no valid JSON: {error}", key=str(path)) from error


def _is_deep(value: Any) -> bool:
    """Whether it is nested more deeply than a state may be, of which it becomes a part."""
    level = [value]
    for _ in range(_JSON_DEPTH):
        level = [
            child
            for one in level
            if isinstance(one, dict | list)
            for child in (one.values() if isinstance(one, dict) else one)
        ]
        if not level:
            return False
    return True


def by_numbers(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sorts names as people count: ``step_9`` before ``step_10``."""
    parts = _DIGITS.split(name)
    # int() refuses thousands of digits: those are compared by length, then as text.
    return tuple(
        (len(part.lstrip("0")), 1, part.lstrip("0")) if n % 2 else (0, 0, part) for n, part in enumerate(parts)
    )


def number_in(pattern: re.Pattern[str], name: str) -> int | None:
    """The number that the pattern's first group finds where all of ``name`` matches; None if it is none of ours."""
    match = pattern.fullmatch(name)
    return int(match[1]) if match and len(match[1]) <= 15 else None


def _root(path: Path) -> Path:
    """The folder itself; in a cache of the Hugging Face hub, whose snapshots are links, that of the whole model."""
    model = path.parent.parent
    return model if path.parent.name == "snapshots" and (model / "blobs").is_dir() else path


def _entries(path: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(path) as entries:
            return sorted(entries, key=lambda entry: by_numbers(entry.name))
    except FileNotFoundError as error:
        raise NotFoundError(f"there is nothing at {path}", key=str(path)) from error
    except OSError as error:
        raise StorageError(f"{path} can't be read: {error.strerror or error}", key=str(path)) from error


def _kind(entry: os.DirEntry[str], root: Path) -> int | str | None:
    """Size of a file, None for a folder, or why it is neither."""
    if entry.is_symlink():
        target = Path(os.path.realpath(entry.path))
        if not target.is_relative_to(root):
            return f"a link that leads out of {root}: name the folder it leads to, or copy the file"
        if not target.exists():
            return "a link to nothing"
        if target.is_dir():
            return f"a link to {target.relative_to(root)}"
    elif entry.is_dir(follow_symlinks=False):
        return None
    found = entry.stat()
    return found.st_size if stat.S_ISREG(found.st_mode) else "no regular file"
