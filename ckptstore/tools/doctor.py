"""Which promises hold on a storage, and how it behaves: tried there, in a scratch folder that is removed afterwards."""

from __future__ import annotations

import os
import shutil
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import unquote_to_bytes, urlsplit

from ckptstore.errors import StateError, StorageFullError
from ckptstore.storage import Storage, open_storage
from ckptstore.storage.posix import os_errors
from ckptstore.tools.blocks import BlockObject, Speed
from ckptstore.tools.promises import Promise, Scratch, durability, racing, scratch, small_objects

IN_FLIGHT = (1, 2, 4)
"""Blocks under way at once, in the order in which they are measured."""

Progress = Callable[[str, int, int], None]
"""Called with what is tried, trials done and trials in all."""

_MINIMUM_BYTES = 1 << 20
# One object on storage, and as much again for the runs that go on saving there.
_SPACE_FACTOR = 2


@dataclass(frozen=True)
class Report:
    """What was found.

    Attributes:
        place: URL of the folder that was tried: where there is none yet, the nearest one above it.
        kind: file system type or service, as ``ext4``.
        durability: what an acknowledged write survives; see ``Capabilities``.
        promises: each with whether it holds.
        direct_io: whether aligned blocks bypass the page cache: "used"; "refused" by the file system; or "not asked"
            of it, because it has none or what it does then is not to be relied on.
        free_bytes: free space, or None where the storage doesn't tell.
        create_s: seconds of each small durable creation.
        size_bytes: size of the objects that ``speeds`` are of.
        speeds: one for each of ``IN_FLIGHT``.
    """

    place: str
    kind: str
    durability: Literal["power-cut", "process-crash", "none"]
    promises: Sequence[Promise]
    direct_io: Literal["used", "refused", "not asked"]
    free_bytes: int | None
    create_s: Sequence[float]
    size_bytes: int
    speeds: Sequence[Speed]

    @property
    def ok(self) -> bool:
        """Whether every promise holds."""
        return all(promise.holds for promise in self.promises)

    @property
    def create_median_s(self) -> float:
        return statistics.median(self.create_s)


def examine(url: str, size_bytes: int, progress: Progress | None = None) -> Report:
    """Try the storage at ``url``, in a scratch folder that is removed afterwards, however this ends.

    There need be no store and no folder yet: then the nearest folder above it is tried. Takes about 90 MiB of memory.

    Args:
        url: a path, ``file://`` URL or ``memory://name``.
        size_bytes: bytes of the object that is written and read, at least 1 MiB.
        progress: see ``Progress``.

    Raises:
        StorageFullError: less than twice ``size_bytes`` is free.
        StateError: ``size_bytes`` is too small.
        StorageError: it can't be reached or written to, or failed.
    """
    storage, free_bytes = _opened(url)
    try:
        return examine_storage(storage, size_bytes, free_bytes, progress)
    finally:
        storage.close()


def examine_storage(
    storage: Storage, size_bytes: int, free_bytes: int | None = None, progress: Progress | None = None
) -> Report:
    """``examine`` a storage that is open for writing; ``free_bytes`` is its free space, where known.

    Raises:
        As ``examine``.
    """
    _check(storage.url, size_bytes, free_bytes)
    is_asked = storage.capabilities.direct_io
    with scratch(storage) as place:
        create_s, promises, speeds = _tried(place, size_bytes, progress or (lambda what, done, total: None))
    # Only now: a file system's real behaviour is learned by using it.
    found = storage.capabilities
    return Report(
        storage.url,
        found.kind,
        found.durability,
        [*durability(found), *promises],
        "used" if found.direct_io else "refused" if is_asked else "not asked",
        free_bytes,
        create_s,
        size_bytes,
        speeds,
    )


def _tried(place: Scratch, size_bytes: int, progress: Progress) -> tuple[list[float], list[Promise], list[Speed]]:
    total = 2 + len(IN_FLIGHT)
    progress("small objects", 0, total)
    create_s, promises = small_objects(place)
    progress("races", 1, total)
    promises = [*racing(place), *promises]
    blocks = BlockObject(size_bytes, max(IN_FLIGHT))
    speeds = []
    for number, in_flight in enumerate(IN_FLIGHT):
        progress(f"blocks, {in_flight} in flight", 2 + number, total)
        keys = place.key("blocks", str(in_flight)), place.key("blocks", f"{in_flight}.marker")
        speeds.append(blocks.measure(place.storage, *keys, in_flight))
        # One at a time: there may be little space.
        place.storage.delete(keys)
    return create_s, [_with_blocks(promise, speeds) for promise in promises], speeds


def _with_blocks(promise: Promise, speeds: Sequence[Speed]) -> Promise:
    if promise.name != "read_after_write":
        return promise
    right = sum(speed.read_s is not None for speed in speeds)
    detail = f"{promise.detail}, and {right} of {len(speeds)} large ones"
    return Promise(promise.name, promise.holds and right == len(speeds), detail)


def _check(url: str, size_bytes: int, free_bytes: int | None) -> None:
    if size_bytes < _MINIMUM_BYTES:
        raise StateError(f"size_bytes={size_bytes} must be at least {_MINIMUM_BYTES}")
    if free_bytes is not None and free_bytes < _SPACE_FACTOR * size_bytes:
        raise StorageFullError(
            f"{url} has {free_bytes / 1e9:.2f} GB free and {_SPACE_FACTOR * size_bytes / 1e9:.2f} GB are needed, twice "
            "the size that is measured: make room or measure less"
        )


def _opened(url: str) -> tuple[Storage, int | None]:
    """The storage to try, and its free space in bytes where known."""
    storage = open_storage(url)
    asked = urlsplit(storage.url)
    if asked.scheme != "file":
        return storage, None
    path = Path(os.fsdecode(unquote_to_bytes(asked.path)))
    # A folder made only to be tried would have to be removed again, with those above it.
    folder = next(folder for folder in (path, *path.parents) if os.path.lexists(folder))
    if folder != path:
        storage.close()
        storage = open_storage(folder)
    with os_errors("ask for the free space of", str(folder), ""):
        usage = shutil.disk_usage(folder)
    # Some file systems behind FUSE don't count their blocks.
    return storage, usage.free if usage.total else None
