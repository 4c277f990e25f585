"""Collect what killed saves left and reclaim what was deleted: condemned first, then removed, key by key."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ckptstore.engine.catalogue import Catalogue
from ckptstore.engine.commit import condemn, read_store, writers
from ckptstore.engine.saver import discard
from ckptstore.errors import FormatError, IntegrityError
from ckptstore.format import layout
from ckptstore.format.layout import CheckpointId
from ckptstore.maintenance.keep import is_buried
from ckptstore.maintenance.verify import Leftover, sort_leftovers
from ckptstore.storage.base import Entry, Storage

TOMBSTONE_S = 30 * 24 * 3600.0
"""How long tombstones and condemnations outlive their files: longer than any delayed request or sleeping process."""


@dataclass(frozen=True)
class PruneReport:
    """What ``prune`` did.

    Attributes:
        leftovers: ids of unfinished saves that were condemned and removed.
        reclaimed: ids of deleted checkpoints whose files were removed.
        spared: ids of unfinished saves that may still be running.
        freed_bytes: stored bytes removed.
    """

    leftovers: Sequence[str]
    reclaimed: Sequence[str]
    spared: Sequence[str]
    freed_bytes: int


def prune(storage: Storage, catalogue: Catalogue, *, grace_s: float, own_writer: int | None) -> PruneReport:
    """Collect leftovers and reclaim buried checkpoints older than ``grace_s``.

    ``own_writer`` is the caller's number where it has no save in flight: its leftovers go at once then.
    """
    entries = storage.list("")
    # Never the newest object's time: one file from the future would end the grace of all others at once.
    now = time.time()
    leftovers, _ = sort_leftovers(entries, catalogue)
    newest = max(writers(storage), default=0)
    removed, spared, freed = [], [], 0
    for leftover in leftovers:
        id = layout.try_id(leftover.id) if leftover.id else None
        fresh = now - leftover.modified < grace_s
        if fresh and not (id is not None and (id.writer < newest or id.writer == own_writer)):
            spared.append(leftover.id or leftover.keys[0])
        elif _collect(storage, catalogue, id, leftover):
            removed.append(leftover.id or leftover.keys[0])
            freed += leftover.stored_bytes
    reclaimed, more = _reclaim(storage, catalogue, entries, now - grace_s)
    _forget(storage, catalogue, entries, now - TOMBSTONE_S)
    return PruneReport(removed, reclaimed, spared, freed + more)


def _collect(storage: Storage, catalogue: Catalogue, id: CheckpointId | None, leftover: Leftover) -> bool:
    if id is not None and id not in catalogue.condemned:
        store_id = catalogue.store_id or read_store(storage).store_id
        try:
            if not condemn(storage, id, store_id, "unfinished when its leftovers were collected"):
                return False
        except (IntegrityError, FormatError):
            # A damaged record may have been a commit: its files stay until somebody has looked.
            return False
    storage.delete(leftover.keys)
    return True


def _reclaim(storage: Storage, catalogue: Catalogue, entries: Iterable[Entry], before: float) -> tuple[list[str], int]:
    lent = {lender for c in catalogue.checkpoints for lender in c.record.lenders}
    buried_at = {entry.key: entry.modified for entry in entries}
    reclaimed, freed = [], 0
    for checkpoint in catalogue.buried:
        id = checkpoint.order
        if checkpoint.id in lent or buried_at.get(layout.tombstone_key(id), before) >= before:
            continue
        if not is_buried(storage, checkpoint):
            continue
        # The commit record goes first and durably: a crash then leaves an unfinished id, never half a checkpoint.
        storage.delete([layout.commit_key(id)])
        discard(storage, id)
        reclaimed.append(checkpoint.id)
        freed += checkpoint.stored_bytes
    return reclaimed, freed


def _forget(storage: Storage, catalogue: Catalogue, entries: Iterable[Entry], before: float) -> None:
    """Drop the tombstones and condemnations of ids of which nothing is left, when they are old enough."""
    present = {layout.folder_id(entry.key) for entry in entries} | {c.order for c in catalogue.buried}
    for entry in entries:
        id = layout.record_id(entry.key)
        if id is None or id in present or entry.modified >= before:
            continue
        if entry.key.startswith(layout.TRASH) or id in catalogue.condemned:
            storage.delete([entry.key])
