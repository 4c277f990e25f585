"""Collect what killed saves left and reclaim what was deleted, except for what others borrow."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace

from ckptstore.engine.catalogue import Cache, Catalogue, Checkpoint, scan
from ckptstore.engine.commit import condemn, read_store, writers
from ckptstore.errors import FormatError, IntegrityError, NotFoundError, UnavailableError
from ckptstore.format import layout
from ckptstore.format.layout import CheckpointId
from ckptstore.maintenance.keep import is_buried
from ckptstore.maintenance.leftovers import Leftover, find_leftovers
from ckptstore.maintenance.lent import Lent, recorded_ids
from ckptstore.policy.thin import own_bytes
from ckptstore.storage.base import Entry, Storage, is_key

TOMBSTONE_S = 30 * 24 * 3600.0
"""How long tombstones and condemnations outlive their files: longer than any delayed request or sleeping process."""

UNCERTAIN_GRACE_S = 7 * 24 * 3600.0
"""Where a storage can't decide between a commit and a condemnation, only time can: longer than any save takes."""

_SCANS = 20
"""How often the register is read until it shows the same twice in a row."""


@dataclass(frozen=True)
class PruneReport:
    """What ``prune`` did.

    Attributes:
        leftovers: ids of unfinished saves that were condemned and removed.
        reclaimed: ids of deleted checkpoints whose files were removed, except for those that others borrow; an id is
            there once more when the last borrower is gone.
        spared: ids of unfinished saves that may still be running.
        freed_bytes: stored bytes removed.
        uploads: keys of large objects whose upload was broken off, and whose parts were dropped.
        retired: ids of checkpoints that the rules didn't keep, and that were deleted; by default none.
    """

    leftovers: Sequence[str]
    reclaimed: Sequence[str]
    spared: Sequence[str]
    freed_bytes: int
    uploads: Sequence[str]
    retired: Sequence[str] = ()

    def after(self, retired: Sequence[str]) -> PruneReport:
        """The same, after ``retired`` were deleted."""
        return replace(self, retired=retired)


def preview(storage: Storage, catalogue: Catalogue, *, grace_s: float, own_writer: int | None) -> PruneReport:
    """What ``prune`` would do now, as far as the listing tells; nothing is changed.

    Raises:
        StorageError: something can't be listed or read.
    """
    entries, now = storage.list(""), time.time()
    lent = Lent(storage, catalogue)
    due = list(_due(catalogue, entries, lent, now - grace_s))
    graves, copying = _graves(entries), _copying(entries)
    grace = _Grace.of(storage, now, grace_s, own_writer, copying)
    removed, spared, freed = [], [], sum(map(own_bytes, due))
    for leftover in find_leftovers(entries, catalogue, lent)[0]:
        if grace.spares(leftover, graves):
            spared.append(leftover.name)
        else:
            removed.append(leftover.name)
            freed += leftover.stored_bytes
    return PruneReport(removed, [c.id for c in due], spared, freed, [])


def prune(storage: Storage, catalogue: Catalogue, *, grace_s: float, own_writer: int | None) -> PruneReport:
    """Collect leftovers and reclaim buried checkpoints older than ``grace_s``.

    ``own_writer`` is the caller's number where it has no save in flight: its leftovers go at once then.

    Raises:
        StorageError: something can't be listed or read; what was begun is finished by the next call.
    """
    entries = storage.list("")
    # Never the newest object's time: one file from the future would end the grace of all others at once.
    now = time.time()
    reclaimed = _remove_records(storage, catalogue, entries, now - grace_s)
    # Only now, when the records are gone, do the commits tell what may be removed: see Lent.
    catalogue = settled(storage, catalogue)
    leftovers, _ = find_leftovers(entries, catalogue, Lent(storage, catalogue))
    graves, copying = _graves(entries), _copying(entries)
    grace = _Grace.of(storage, now, grace_s, own_writer, copying)
    removed, spared, freed = [], [], 0
    for leftover in leftovers:
        id = leftover.order
        dead = id is not None and id in graves
        if grace.spares(leftover, graves):
            spared.append(leftover.name)
        elif dead or _condemned(storage, catalogue, id):
            storage.delete(leftover.keys)
            freed += leftover.stored_bytes
            if id is not None and dead:
                reclaimed.add(id)
            else:
                removed.append(leftover.name)
    uploads = _drop_uploads(storage, catalogue, graves, grace)
    _forget(storage, catalogue, entries, now - TOMBSTONE_S)
    _forget_copies(storage, copying, now - grace.seconds, spared)
    return PruneReport(removed, [str(id) for id in sorted(reclaimed)], spared, freed, uploads)


@dataclass(frozen=True)
class _Grace:
    """Whose unfinished work may still be going on."""

    now: float
    seconds: float
    certain: bool
    newest: int
    own_writer: int | None
    copying: Mapping[CheckpointId, float]
    """When somebody began to copy it."""

    @classmethod
    def of(
        cls, storage: Storage, now: float, grace_s: float, own_writer: int | None, copying: Mapping[CheckpointId, float]
    ) -> _Grace:
        certain = storage.capabilities.exclusive_create
        seconds = grace_s if certain else max(grace_s, UNCERTAIN_GRACE_S)
        return cls(now, seconds, certain, max(writers(storage), default=0), own_writer, copying)

    def covers(self, id: CheckpointId | None, modified: float) -> bool:
        """Whether a save or a copy of ``id``, last seen to write at ``modified``, has to be waited for."""
        stale = id is not None and (id.writer < self.newest or id.writer == self.own_writer)
        # Whoever copies isn't the writer of what it copies.
        stale = stale and id not in self.copying
        return self.now - modified < self.seconds and not (stale and self.certain)

    def spares(self, leftover: Leftover, graves: Set[CheckpointId | None]) -> bool:
        """Whether ``leftover`` has to be waited for; ``graves`` are the ids that have a tombstone."""
        id = leftover.order
        # With a tombstone it was committed once: no save can be running, and its fate is decided.
        dead = id is not None and id in graves
        return (not dead and self.covers(id, leftover.modified)) or self.is_copied(id)

    def is_copied(self, id: CheckpointId | None) -> bool:
        """Whether somebody may be copying ``id``, or what borrows from it, to here."""
        return id is not None and self.now - self.copying.get(id, 0.0) < self.seconds


def _drop_uploads(
    storage: Storage, catalogue: Catalogue, graves: Set[CheckpointId | None], grace: _Grace
) -> Sequence[str]:
    """Have the storage forget the parts of objects that nobody will complete."""
    decided = recorded_ids(catalogue) | graves
    dropped = []
    for upload in storage.uploads():
        id, name = layout.folder_id(upload.key), upload.key.rpartition("/")[2]
        # What belongs to a checkpoint that exists is a repair, which may be running.
        over = id in decided and not name.startswith(layout.TEMPORARY)
        going_on = grace.is_copied(id) or grace.covers(None if id in decided else id, upload.begun)
        if is_key(upload.key) and (over or not going_on):
            dropped.append(upload)
    storage.abort_uploads(dropped)
    return [upload.key for upload in dropped]


def _remove_records(
    storage: Storage, catalogue: Catalogue, entries: Iterable[Entry], before: float
) -> set[CheckpointId]:
    """Take away the commit records of what was buried ``before``, and with them the way back."""
    removed = set()
    for checkpoint in _due(catalogue, entries, Lent(storage, catalogue), before):
        # An undelete after this look removes its tombstone, finds no record, and says that it came too late.
        if is_buried(storage, checkpoint):
            # First and durably: a crash then leaves files without a record, never half a checkpoint.
            storage.delete([layout.commit_key(checkpoint.order)])
            removed.add(checkpoint.order)
    return removed


def _due(catalogue: Catalogue, entries: Iterable[Entry], lent: Lent, before: float) -> Iterator[Checkpoint]:
    """What was buried ``before`` and can be reclaimed."""
    buried_at = {entry.key: entry.modified for entry in entries}
    for checkpoint in catalogue.buried:
        id = checkpoint.order
        if buried_at.get(layout.tombstone_key(id), before) < before and not lent.is_unknown(id):
            yield checkpoint


def _graves(entries: Iterable[Entry]) -> set[CheckpointId | None]:
    """The ids that have a tombstone."""
    return {layout.record_id(entry.key) for entry in entries if entry.key.startswith(layout.TRASH)}


def _copying(entries: Iterable[Entry]) -> dict[CheckpointId, float]:
    """When somebody began to copy each id that is marked so."""
    return {id: entry.modified for entry in entries if (id := layout.copying_id(entry.key))}


def settled(storage: Storage, catalogue: Catalogue) -> Catalogue:
    """The register as it stands now, when it is the same twice in a row.

    A listing may take time. One alone could miss a borrower that was reclaimed before the listing came to it, together
    with its heir, committed where the listing had been already.

    Raises:
        UnavailableError: it never holds still.
    """
    cache: Cache = {layout.commit_key(c.order): c.record for c in (*catalogue.checkpoints, *catalogue.buried)}
    cache |= {layout.commit_key(id): None for id in catalogue.condemned}
    try:
        store_id: str | None = read_store(storage).store_id
    except (NotFoundError, IntegrityError):
        store_id = catalogue.store_id
    ids: Set[CheckpointId] | None = None
    for _ in range(_SCANS):
        catalogue = scan(storage, store_id, cache)
        if recorded_ids(catalogue) == ids:
            return catalogue
        ids = recorded_ids(catalogue)
    raise UnavailableError(f"{storage.url}: records in commits/ come and go all the time; try again later")


def _condemned(storage: Storage, catalogue: Catalogue, id: CheckpointId | None) -> bool:
    """Whether ``id`` never can be committed; what belongs to no id never could."""
    if id is None or id in catalogue.condemned:
        return True
    store_id = catalogue.store_id or read_store(storage).store_id
    try:
        return condemn(storage, id, store_id, "unfinished when its leftovers were collected")
    except (IntegrityError, FormatError):
        # A damaged record may have been a commit: its files stay until somebody has looked.
        return False


def _forget_copies(
    storage: Storage, copying: Mapping[CheckpointId, float], before: float, spared: Iterable[str]
) -> None:
    """Drop the marks of copies that were begun ``before``, and of which nothing arrives any more."""
    going_on = {layout.try_id(name) for name in spared}
    storage.delete([layout.copying_key(id) for id, begun in copying.items() if begun < before and id not in going_on])


def _forget(storage: Storage, catalogue: Catalogue, entries: Iterable[Entry], before: float) -> None:
    """Drop the tombstones and condemnations of ids of which nothing was left, when they are old enough."""
    present = {layout.folder_id(entry.key) for entry in entries} | {c.order for c in catalogue.buried}
    # Without its tombstone one that was deleted here would be taken from its backup again.
    present |= {layout.receipt_id(entry.key) for entry in entries}
    for entry in entries:
        id = layout.record_id(entry.key)
        if id is None or id in present or entry.modified >= before:
            continue
        if entry.key.startswith(layout.TRASH) or id in catalogue.condemned:
            storage.delete([entry.key])
