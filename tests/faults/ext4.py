"""A real ext4 in a file: small enough to fill up, and its power can be cut."""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# _IOR('X', 125, __u32); the value means that not even the journal is flushed.
_EXT4_IOC_SHUTDOWN, _NO_LOG_FLUSH = 0x8004587D, 2


class Image:
    """An ext4 file system in a file, mounted below ``folder`` where asked."""

    def __init__(self, folder: Path, megabytes: int, *options: str) -> None:
        self.file, self.mounted_at = folder / f"{megabytes}.ext4", folder / "mounted"
        self.mounted_at.mkdir(exist_ok=True)
        self.file.unlink(missing_ok=True)
        with self.file.open("wb") as file:
            file.truncate(megabytes << 20)
        _run("mkfs.ext4", "-q", "-F", "-m", "0", *options, str(self.file))

    @contextmanager
    def mounted(self) -> Iterator[Path]:
        """The root folder; unmounted at the end, whatever happens."""
        # A journal that commits by itself after 5 s would now and then save what nobody synced.
        _run("mount", "-o", "loop,commit=600", str(self.file), str(self.mounted_at))
        try:
            yield self.mounted_at
        except BaseException:
            # What failed may still hold a file open.
            _run("umount", "--lazy", str(self.mounted_at))
            raise
        _run("umount", str(self.mounted_at))

    def cut_power(self) -> None:
        """From now on nothing reaches the disk; what was not synced is lost when it is mounted again."""
        folder = os.open(self.mounted_at, os.O_RDONLY)
        try:
            fcntl.ioctl(folder, _EXT4_IOC_SHUTDOWN, struct.pack("I", _NO_LOG_FLUSH))
        finally:
            os.close(folder)

    def remember(self) -> Path:
        """A copy of the unmounted file system, for ``restore``."""
        copy = self.file.with_suffix(".copy")
        _run("cp", "--sparse=always", str(self.file), str(copy))
        return copy

    def restore(self, copy: Path) -> None:
        """The inverse of ``remember``."""
        _run("cp", "--sparse=always", str(copy), str(self.file))


def missing(folder: Path) -> str | None:
    """Why no ext4 can be mounted here, or None where it can."""
    if os.geteuid() != 0:
        return "mounting an ext4 image needs root"
    for tool in ("mkfs.ext4", "mount", "umount"):
        if shutil.which(tool) is None:
            return f"{tool} is missing: apt-get install e2fsprogs mount"
    try:
        with Image(folder, 4).mounted():
            return None
    except OSError as error:
        return f"can't mount an ext4 image here: {error}"


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{command[0]}: {done.stderr.strip()[:300]}")
