"""Proof of copies: one record for each checkpoint and place, kept on the primary, so that lag is seen from there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime

from ckptstore.engine.catalogue import Checkpoint
from ckptstore.errors import CheckpointError, ExistsError
from ckptstore.format import layout
from ckptstore.format.layout import CheckpointId
from ckptstore.format.records import SMALL_LIMIT, ReceiptRecord, now, seal, unseal
from ckptstore.maintenance.copy import Method
from ckptstore.storage.base import Storage


@dataclass(frozen=True)
class Lag:
    """How far a backup is behind.

    Attributes:
        place: its URL.
        copied: how many of the checkpoints on the primary it has.
        behind: how many it lacks.
        behind_bytes: their stored bytes.
        since: when the oldest of them was saved.
    """

    place: str
    copied: int
    behind: int
    behind_bytes: int
    since: datetime | None


def give(storage: Storage, place: str, checkpoint: Checkpoint, method: Method) -> None:
    """Put down that ``checkpoint`` is at ``place`` too."""
    record = ReceiptRecord(
        store_id=checkpoint.record.store_id,
        id=checkpoint.id,
        place=place[:1000],
        method=method,
        stored_bytes=checkpoint.stored_bytes,
        manifest=checkpoint.record.manifest,
        created=now(),
    )
    with suppress(ExistsError):
        storage.create(layout.receipt_key(place, checkpoint.order), seal(record))


def given(storage: Storage, place: str) -> set[CheckpointId]:
    """The ids for which there is a receipt of ``place``."""
    return {id for entry in storage.list(layout.receipts_of(place)) if (id := layout.receipt_id(entry.key))}


def lags(storage: Storage, checkpoints: Sequence[Checkpoint], places: Iterable[str] = ()) -> list[Lag]:
    """How far each of ``places``, and of those that have a receipt here, is behind, by what lies here alone.

    Raises:
        StorageError: the receipts can't be listed or read.
    """
    by_folder: dict[str, list[CheckpointId]] = {}
    for entry in storage.list(layout.RECEIPTS):
        id = layout.receipt_id(entry.key)
        if id is not None:
            by_folder.setdefault(entry.key.rpartition("/")[0], []).append(id)
    found = ((_place(storage, folder, ids), set(ids)) for folder, ids in sorted(by_folder.items()))
    by_place = {place: ids for place, ids in found if place is not None}
    by_place |= {place: set() for place in places if place not in by_place}
    return [_lag(place, ids, checkpoints) for place, ids in by_place.items()]


def _place(storage: Storage, folder: str, ids: Iterable[CheckpointId]) -> str | None:
    """The URL that the receipts in ``folder`` are of; None where none of them can be read."""
    for id in sorted(ids, reverse=True):
        key = f"{folder}/{id}.json"
        with suppress(CheckpointError):
            return unseal(storage.read(key, limit=SMALL_LIMIT), key, [ReceiptRecord]).place
    return None


def _lag(place: str, ids: set[CheckpointId], checkpoints: Sequence[Checkpoint]) -> Lag:
    missing = [c for c in checkpoints if c.order not in ids]
    oldest = missing[0].created if missing else None
    return Lag(place, len(checkpoints) - len(missing), len(missing), sum(c.stored_bytes for c in missing), oldest)
