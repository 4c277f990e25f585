"""Stored tensors beside live ones, byte by byte, without a copy of either."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ckptstore.engine.buffers import BufferPool
from ckptstore.engine.contents import Contents, Rescue
from ckptstore.engine.plan import Source
from ckptstore.engine.reader import read_pieces
from ckptstore.storage.base import Storage

_SMALL_BYTES = 1 << 12
_STEP_BYTES = 1 << 20
"""Compared at a time: what is found for each of these bytes takes as much room."""


@dataclass
class Suspect:
    """A live tensor of the type and shape of the stored one that it is compared with, or of its region of that."""

    saved: str
    live: Source
    differs: bool = False


@dataclass
class _Stored:
    """A stored tensor, and all that is compared with it."""

    left: int
    """Bytes that have not come in yet."""
    region: tuple[tuple[int, ...], tuple[int, ...]] | None
    suspects: list[Suspect] = field(default_factory=list)


def mark_differing(
    storage: Storage,
    contents: Contents,
    suspects: Sequence[Suspect],
    *,
    pool: BufferPool,
    threads: int,
    rescue: Rescue | None = None,
) -> None:
    """Find out which of ``suspects`` differ in any bit, reading each block once.

    Raises:
        IntegrityError: a block is damaged, also when read a second time.
        StorageError: the backend failed.
    """
    wanted: dict[str, _Stored] = {}
    for suspect in suspects:
        name, live = suspect.saved, suspect.live
        wanted.setdefault(name, _Stored(live.nbytes, live.region)).suspects.append(suspect)
    lock = threading.Lock()

    def take(stored: _Stored, begin: int, data: memoryview) -> None:
        for suspect in stored.suspects:
            if not suspect.differs and not _alike(suspect.live.view(begin, len(data)), data):
                suspect.differs = True
        with lock:
            stored.left -= len(data)
        if not stored.left:
            # Of a tensor that isn't contiguous a copy was made.
            for suspect in stored.suspects:
                suspect.live.release()

    read_pieces(storage, contents, wanted, take, pool=pool, threads=threads, rescue=rescue)


def _alike(live: memoryview, stored: memoryview) -> bool:
    if len(live) < _SMALL_BYTES:
        return live.tobytes() == stored.tobytes()
    mine, theirs = np.frombuffer(live, np.uint8), np.frombuffer(stored, np.uint8)
    return all(
        np.array_equal(mine[at : at + _STEP_BYTES], theirs[at : at + _STEP_BYTES])
        for at in range(0, len(mine), _STEP_BYTES)
    )
