"""What every benchmark does between two measurements."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

Tell = Callable[[str, int, int], None]
"""Called with what is running, measurements done and measurements in all."""


def turns(names: Sequence[str], rounds: int, tell: Tell | None = None) -> Iterator[str]:
    """Each name once a round; another one begins each round, so that drift favours nobody."""
    for turn in range(rounds):
        for index in range(len(names)):
            name = names[(turn + index) % len(names)]
            if tell is not None:
                tell(name, turn * len(names) + index, rounds * len(names))
            yield name


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
