"""Let go of checkpoints on a fast and small primary that every backup has."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from ckptstore.engine.backups import GLANCE_S, Backups
from ckptstore.engine.bounded import within
from ckptstore.engine.catalogue import Checkpoint
from ckptstore.engine.commit import EVICTED
from ckptstore.engine.contents import read_contents
from ckptstore.engine.finder import Finder
from ckptstore.errors import CheckpointError, ExistsError
from ckptstore.format import layout
from ckptstore.maintenance.keep import bury
from ckptstore.maintenance.retire import judged, reclaim
from ckptstore.policy.retention import Keep
from ckptstore.storage.base import Storage

LOCK_S = 1.0
"""How long to wait for a save of this process to end; what isn't removed now is after that save."""


def evict(storage: Storage, finder: Finder, keep: Keep, lock: threading.RLock) -> list[str]:
    """Remove from ``storage`` what ``keep`` doesn't keep, if every backup has it whole; the ids that went.

    ``lock`` keeps this process's saves away while something is removed, not while the backups are asked. Where they go
    on for long, nothing is removed this time: one of them may be waiting for its copy, which the caller makes.

    The order is that of deleting and pruning, and for the same reasons: a tombstone, which holds respect; the commit
    record; then the files that nobody borrows; the tombstone last. What a killed process had begun is finished.

    Raises:
        StorageError: the storage or a backup failed; nothing is removed on an incomplete listing.
    """
    own = finder.scan()
    leaving = {verdict.id for verdict in judged(storage, own, keep).going}
    begun = {id for id in own.graves if finder.is_evicted(id)}
    going = [c for c in own.checkpoints if c.id in leaving] + [c for c in own.buried if c.order in begun]
    if not going and not begun:
        return []
    safe = _whole_in_all(finder.backups, going[0].record.store_id, going) if going else set()
    if not lock.acquire(timeout=LOCK_S):
        return []
    try:
        gone = {c.order for c in going if c.id in safe and (c.order in begun or _is_buried_now(storage, c))}
        gone |= begun - {c.order for c in own.buried}
        reclaim(storage, own, gone)
        # Also of what turned out not to be safe: it exists.
        storage.delete([layout.tombstone_key(id) for id in sorted(gone | begun)])
    finally:
        lock.release()
    return [str(id) for id in sorted(gone)]


def _whole_in_all(backups: Backups, store_id: str, going: Sequence[Checkpoint]) -> set[str]:
    """The ids of those whose every object each backup has, in the right size: content was proven when it was copied."""
    safe = {c.id for c in going}
    for backup in backups.all:
        # One that never answers must not keep the others from being copied to.
        theirs = within(GLANCE_S, lambda it=backup: it.scan(store_id), f"listing {backup.url}")  # type: ignore[misc]
        there = {c.id: c.record for c in theirs.checkpoints}
        safe = {c.id for c in going if c.id in safe and there.get(c.id) == c.record}
        sizes = {entry.key: entry.size for entry in backup.storage.list(layout.CHECKPOINTS)} if safe else {}
        safe = {c.id for c in going if c.id in safe and _is_whole(backup.storage, c, sizes)}
    return safe


def _is_whole(storage: Storage, checkpoint: Checkpoint, sizes: dict[str, int]) -> bool:
    try:
        files = [file for part in read_contents(storage, checkpoint.record).parts for file in part.files]
    except CheckpointError:
        return False
    return all(sizes.get(file.key) == file.stored_bytes for file in files)


def _is_buried_now(storage: Storage, checkpoint: Checkpoint) -> bool:
    try:
        bury(storage, checkpoint, EVICTED)
    except ExistsError:
        # Held, or deleted by somebody else.
        return False
    return True
