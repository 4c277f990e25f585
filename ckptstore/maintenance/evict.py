"""Let go of checkpoints on a fast and small primary that every backup has."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from ckptstore.engine.backups import Backups
from ckptstore.engine.catalogue import Catalogue, Checkpoint
from ckptstore.engine.finder import Finder
from ckptstore.engine.reader import read_contents
from ckptstore.errors import CheckpointError, ExistsError
from ckptstore.format import layout
from ckptstore.maintenance.keep import bury
from ckptstore.maintenance.leftovers import find_leftovers
from ckptstore.maintenance.lent import Lent
from ckptstore.maintenance.prune import settled
from ckptstore.policy.retention import Keep
from ckptstore.storage.base import Storage

_LOCK_S = 1.0


def evict(storage: Storage, finder: Finder, keep: Keep, lock: threading.RLock) -> list[str]:
    """Remove from ``storage`` what ``keep`` doesn't keep, if every backup has it whole; the ids that went.

    ``lock`` keeps this process's saves away while something is removed, not while the backups are asked. Where a save
    has it, which may be waiting for this very thread, the next time will do.

    The order is that of deleting and pruning, and for the same reasons: a tombstone, which holds respect; the commit
    record; then the files that nobody borrows; the tombstone last, as it would hide what the backups have.

    Raises:
        StorageError: the storage or a backup failed; nothing is removed on an incomplete listing.
    """
    own = finder.scan()
    kept = keep.kept(own.checkpoints) | {c.id for c in own.checkpoints[-1:]}
    going = [c for c in own.checkpoints if c.id not in kept]
    if not going:
        return []
    safe = _whole_in_all(finder.backups, going[0].record.store_id, going)
    if not lock.acquire(timeout=_LOCK_S):
        return []
    try:
        gone = [c for c in going if c.id in safe and _take_away(storage, c)]
        _remove_files(storage, own, gone)
        storage.delete([layout.tombstone_key(c.order) for c in gone])
    finally:
        lock.release()
    return [c.id for c in gone]


def _whole_in_all(backups: Backups, store_id: str, going: Sequence[Checkpoint]) -> set[str]:
    """The ids of those whose every object each backup has, in the right size: content was proven when it was copied."""
    safe = {c.id for c in going}
    for backup in backups.all:
        there = {c.id: c.record for c in backup.scan(store_id).checkpoints}
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


def _take_away(storage: Storage, checkpoint: Checkpoint) -> bool:
    try:
        bury(storage, checkpoint, "every backup has it")
    except ExistsError:
        # Held, or deleted by somebody else.
        return False
    storage.delete([layout.commit_key(checkpoint.order)])
    return True


def _remove_files(storage: Storage, before: Catalogue, gone: Sequence[Checkpoint]) -> None:
    """Remove the files of ``gone``, but for what others borrow, as the commits tell now that the records are gone."""
    ids = {c.order for c in gone}
    entries = [entry for c in gone for entry in storage.list(layout.folder(c.order))]
    now = settled(storage, before)
    for leftover in find_leftovers(entries, now, Lent(storage, now))[0]:
        if leftover.order in ids:
            storage.delete(leftover.keys)
