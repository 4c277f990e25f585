"""What the demo does to a run: kill it inside a save, and flip one bit of what it saved."""

from __future__ import annotations

import json
import os
import struct
import subprocess
from pathlib import Path

LARGE_BYTES = 1 << 20


def committed(store: Path) -> set[str]:
    """Ids of checkpoints that have their commit record."""
    return {name.removesuffix(".json") for name in _names(store / "commits") if name.endswith(".json")}


def unfinished(store: Path) -> set[str]:
    """Ids that have a folder and no commit record: a save is running, or was killed."""
    begun = _names(store / "checkpoints")
    return begun - committed(store)


class KillInsideSave:
    """Kills a process with SIGKILL while it writes the files of a save, once ``after`` new checkpoints are committed.

    Call it every half millisecond. It can come too late, then the save was committed: ``unfinished`` tells.
    """

    def __init__(self, process: subprocess.Popen[bytes], store: Path, *, after: int) -> None:
        self._process, self._store = process, store
        self._old = unfinished(store)
        self._wanted = len(committed(store)) + after

    def __call__(self) -> str | None:
        """The id whose save was under way, if this was the moment."""
        for id in unfinished(self._store) - self._old:
            if len(committed(self._store)) >= self._wanted and _large_file_begun(self._store / "checkpoints" / id):
                self._process.kill()
                self._process.wait()
                return id
        return None


def flip_bit(path: Path, tensor: str) -> int:
    """Invert the lowest bit of the first byte of ``tensor`` in a safetensors file, and return that byte's offset."""
    # A data file may be read-only, so that nobody does this by accident.
    path.chmod(0o600)
    with path.open("r+b") as file:
        (header_bytes,) = struct.unpack("<Q", file.read(8))
        offset: int = 8 + header_bytes + json.loads(file.read(header_bytes))[tensor]["data_offsets"][0]
        byte = os.pread(file.fileno(), 1, offset)[0]
        os.pwrite(file.fileno(), bytes([byte ^ 1]), offset)
        os.fsync(file.fileno())
    return offset


def _large_file_begun(folder: Path) -> bool:
    try:
        return any(file.stat().st_size > LARGE_BYTES for file in folder.iterdir())
    except FileNotFoundError:
        return False


def _names(folder: Path) -> set[str]:
    try:
        return set(os.listdir(folder))
    except FileNotFoundError:
        return set()
