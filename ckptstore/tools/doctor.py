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
from ckptstore.maintenance.prune import UNCERTAIN_GRACE_S
from ckptstore.storage import Capabilities, Storage, open_storage
from ckptstore.storage.posix import os_errors
from ckptstore.tools.blocks import BlockObject, Speed
from ckptstore.tools.promises import Promise, Scratch, abilities, durability, racing, scratch, small_objects

IN_FLIGHT = (1, 2, 4)
"""Blocks under way at once, in the order in which they are measured, where storage is near."""

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
        consequences: what ckptstore does less well because of those that don't; "" in none.
        checks_writes: whether what is damaged on its way is refused; if not, it is noticed when it is read back.
        direct_io: whether aligned blocks bypass the page cache: "used"; "refused" by the file system; "not asked"
            of it, because what it does then is not to be relied on; or "no file system" between here and there.
        free_bytes: free space, or None where the storage doesn't tell.
        create_s: seconds of each small durable creation.
        size_bytes: size of the objects that ``speeds`` are of.
        speeds: one for each of ``concurrencies``.
    """

    place: str
    kind: str
    durability: Literal["power-cut", "process-crash", "none"]
    promises: Sequence[Promise]
    consequences: Sequence[str]
    checks_writes: bool
    direct_io: Literal["used", "refused", "not asked", "no file system"]
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


def concurrencies(capabilities: Capabilities) -> Sequence[int]:
    """Blocks under way at once, in the order in which they are measured; where storage is far away, up to twice as many
    as are used there."""
    usual = capabilities.in_flight
    return IN_FLIGHT if usual is None else (1, usual // 2, usual, 2 * usual)


def examine(url: str, size_bytes: int, progress: Progress | None = None) -> Report:
    """Try the storage at ``url``, in a scratch folder that is removed afterwards, however this ends.

    There need be no store and no folder yet: then the nearest folder above it is tried. Takes about 90 MiB of memory,
    or 800 MiB where storage is far away.

    Args:
        url: a path, ``file://`` URL, ``memory://name`` or ``s3://bucket/prefix``.
        size_bytes: bytes of the object that is written and read, at least 1 MiB.
        progress: see ``Progress``.

    Raises:
        StorageFullError: less than twice ``size_bytes`` is free.
        StateError: ``size_bytes`` is too small.
        StorageError: it can't be reached or written to, failed, or can't do what nothing works without.
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
        _consequences(promises, found),
        found.checks_writes,
        _direct_io(found, is_asked),
        free_bytes,
        create_s,
        size_bytes,
        speeds,
    )


def _direct_io(found: Capabilities, is_asked: bool) -> Literal["used", "refused", "not asked", "no file system"]:
    if found.in_flight is not None:
        return "no file system"
    return "used" if found.direct_io else "refused" if is_asked else "not asked"


def _consequences(promises: Sequence[Promise], found: Capabilities) -> list[str]:
    """Of a storage that lets several create one key; all the rest has no way around it."""
    broken = {promise.name for promise in promises if not promise.holds}
    if not found.exclusive_create:
        days = f"{UNCERTAIN_GRACE_S / 86400:.0f} days"
        return [
            "a run that was replaced may notice late that it is no more the one that saves",
            f"prune leaves unfinished saves alone for {days}, as nothing there can decide whether they still run",
        ]
    if broken & {"exclusive_create", "refuse_existing"}:
        return [
            "of two runs that begin at once, both may believe that the store is theirs: start one at a time",
            "prune may take an unfinished save for given up while it commits: prune only while nothing is saved",
        ]
    return []


def _tried(place: Scratch, size_bytes: int, progress: Progress) -> tuple[list[float], list[Promise], list[Speed]]:
    numbers = concurrencies(place.storage.capabilities)
    total = 2 + len(numbers)
    progress("small objects", 0, total)
    tried = abilities(place)
    create_s, promises = small_objects(place)
    progress("races", 1, total)
    promises = [*racing(place), *promises, *tried]
    blocks = BlockObject(size_bytes, max(numbers))
    speeds = []
    for number, in_flight in enumerate(numbers):
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
        # Reached before anything is written: what can't be need not be cleaned up, which would take as long again.
        storage.list("doctor/")
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
