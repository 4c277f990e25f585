"""All that a store's small records tell, read at once: no manifest, no part and no data file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TypeVar

from ckptstore.engine.catalogue import Catalogue, Checkpoint, Damage, read_each, read_holds
from ckptstore.engine.commit import read_record, read_store
from ckptstore.errors import FormatError, IntegrityError, NotFoundError
from ckptstore.format import layout
from ckptstore.format.layout import CheckpointId
from ckptstore.format.records import Record, StoreRecord, TombstoneRecord, WriterRecord, unseal
from ckptstore.maintenance.receipts import Lag
from ckptstore.maintenance.verifications import Verification, read_verifications
from ckptstore.policy.judge import Judgement
from ckptstore.policy.retention import Keep
from ckptstore.storage.base import Entry, Storage
from ckptstore.view import View

R = TypeVar("R", bound=Record)


@dataclass(frozen=True)
class Unfinished:
    """Files of a checkpoint that was never committed: it is being saved, or a killed save left them.

    Attributes:
        id: the checkpoint's.
        files: how many there are.
        stored_bytes: what they take.
        touched: when the last one was written, by the storage's clock.
        condemned: whether it can't be committed any more.
    """

    id: CheckpointId
    files: int
    stored_bytes: int
    touched: datetime
    condemned: bool


@dataclass(frozen=True)
class Survey:
    """What there is.

    Attributes:
        url: the store's, without credentials.
        made: when it was looked at.
        store: its ``store.json``; None where that is missing or damaged.
        catalogue: the checkpoints, and which of them lie elsewhere.
        graves: the tombstones of deleted ones that can be brought back, by id; one that can't be read is missing.
        holds: the id that each hold pins, by the hold's name.
        damaged: commit records, holds and records of verifications that can't be read.
        writers: who saved, by number; one whose record can't be read is missing.
        lags: how far each backup is behind.
        verifications: the last ones, newest first.
        unfinished: oldest first.
        bytes_there: of all files under ``checkpoints/``.
        keep: the rules that were given.
        judgement: what becomes of each checkpoint under them; None without rules, or where they can't be applied.
        unjudged: why not.
    """

    url: str
    made: datetime
    store: StoreRecord | None
    catalogue: Catalogue
    graves: Mapping[str, TombstoneRecord]
    holds: Mapping[str, str]
    damaged: Sequence[Damage]
    writers: Mapping[int, WriterRecord]
    lags: Sequence[Lag]
    verifications: Sequence[Verification]
    unfinished: Sequence[Unfinished]
    bytes_there: int
    keep: Keep | None
    judgement: Judgement | None
    unjudged: str | None

    @property
    def gone(self) -> list[CheckpointId]:
        """Those of which only a tombstone is left, or neither data nor record here."""
        known = {c.order for c in (*self.catalogue.checkpoints, *self.catalogue.buried)}
        return sorted(self.catalogue.graves - known)


def survey(store: View, *, keep: Keep | None = None) -> Survey:
    """Look at all of ``store``; with ``keep``, also at what would become of each checkpoint.

    Raises:
        NotFoundError: opened read-only, and there is no store.
        StorageError: the storage can't be read completely.
    """
    storage = store.storage
    # Before the commits: a save that ends in between is committed, not unfinished.
    entries = storage.list(layout.CHECKPOINTS)
    catalogue = store.catalogue()
    holds, damaged_holds = read_holds(storage)
    judgement, unjudged = _judged(store, keep)
    verifications, damaged_verifications = read_verifications(storage)
    graves = _read(storage, {layout.tombstone_key(c.order): c.id for c in catalogue.buried}, TombstoneRecord)
    numbers = {c.order.writer for c in (*catalogue.checkpoints, *catalogue.buried)}
    return Survey(
        url=store.url,
        made=datetime.now(UTC),
        store=_store_record(storage),
        catalogue=catalogue,
        graves=graves,
        holds=holds,
        damaged=[*catalogue.damaged, *damaged_holds, *damaged_verifications],
        writers=_read(storage, {layout.writer_key(number): number for number in numbers}, WriterRecord),
        lags=store.lags(),
        verifications=verifications,
        unfinished=_unfinished(entries, catalogue),
        bytes_there=sum(entry.size for entry in entries),
        keep=keep,
        judgement=judgement,
        unjudged=unjudged,
    )


def _store_record(storage: Storage) -> StoreRecord | None:
    try:
        return read_store(storage)
    except (NotFoundError, IntegrityError, FormatError):
        return None


def _judged(store: View, keep: Keep | None) -> tuple[Judgement | None, str | None]:
    if keep is None:
        return None, None
    try:
        return store.judge(keep), None
    except IntegrityError as error:
        return None, str(error)


K = TypeVar("K")


def _read(storage: Storage, keys: Mapping[str, K], kind: type[R]) -> dict[K, R]:
    """The records at ``keys``, by what each key stands for; without what is missing or damaged."""
    found: dict[K, R] = {}

    def look(key: str) -> None:
        with suppress(NotFoundError):
            found[keys[key]] = read_record(storage, key, lambda data: unseal(data, key, [kind]))

    read_each(sorted(keys), look, storage)
    return found


def _unfinished(entries: Iterable[Entry], catalogue: Catalogue) -> list[Unfinished]:
    """The folders that no commit record, no tombstone and no damage accounts for."""
    known = {c.order for c in (*catalogue.checkpoints, *catalogue.buried)} | catalogue.graves
    known |= {id for damage in catalogue.damaged if (id := layout.try_id(damage.id or "")) is not None}
    folders: dict[CheckpointId, list[Entry]] = {}
    for entry in entries:
        id = layout.folder_id(entry.key)
        if id is not None and id not in known and not entry.key.endswith("/"):
            folders.setdefault(id, []).append(entry)
    return [
        Unfinished(
            id,
            len(files),
            sum(file.size for file in files),
            datetime.fromtimestamp(max(file.modified for file in files), UTC),
            id in catalogue.condemned,
        )
        for id, files in sorted(folders.items())
    ]


def saved(survey: Survey) -> list[Checkpoint]:
    """All checkpoints whose records are there, deleted or not, oldest first."""
    return sorted((*survey.catalogue.checkpoints, *survey.catalogue.buried), key=lambda c: c.order)
