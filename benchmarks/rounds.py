"""What every benchmark does between two measurements."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path


def timed(action: Callable[[], object]) -> float:
    """Seconds that ``action()`` takes."""
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def stored_bytes(folder: str | Path) -> int:
    """Bytes that the files below ``folder`` take on storage, each file once, whatever names it has."""
    found = (path.lstat() for path in Path(folder).rglob("*"))
    return sum({status.st_ino: status.st_blocks * 512 for status in found}.values())


def settle() -> None:
    """Let what was removed or is not yet on storage be done before the next one is measured."""
    os.sync()
