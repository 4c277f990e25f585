"""Which checkpoints exist: the commit records minus the tombstones, in order; nothing else counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial

from ckptstore.engine.commit import parse_fate, read_record
from ckptstore.engine.workers import run
from ckptstore.errors import FormatError, IntegrityError, NotFoundError, UnavailableError
from ckptstore.format import layout
from ckptstore.format.layout import CheckpointId, parse_id
from ckptstore.format.records import CommitRecord, HoldRecord, unseal
from ckptstore.storage.base import Storage

_SCANS = 20
"""How often a listing is begun again because the store changed meanwhile."""
_RECORDS_IN_FLIGHT = 32
"""How many are read at a time where storage is far away: more than blocks, as reading one is mostly waiting."""


@dataclass(frozen=True)
class Timing:
    """How long a save took; None where that isn't known.

    Attributes:
        save_s: seconds from the call of ``save`` until right before the commit.
        stall_s: seconds of it that training had waited by then: all of them, or with a save in the background those of
            the call and of the fence. With several ranks rank 0's.
    """

    save_s: float | None
    stall_s: float | None


@dataclass(frozen=True)
class Checkpoint:
    """One committed checkpoint, as its commit record tells it.

    Attributes:
        id: unique name; ids order by writer and sequence.
        step: completed optimizer steps.
        epoch: completed epochs, or None where it was not said.
        metrics: what was measured, by name.
        modes: for each metric, whether "min" or "max" is best.
        reasons: why it was saved, as text.
        created: UTC time by the writer's clock, for people.
        parameters: elements in the parameters of all modules.
        tensors, files: how many it holds.
        raw_bytes, stored_bytes: size in memory and on storage.
        borrowed_bytes: those of ``stored_bytes`` that lie with an older checkpoint, because they haven't changed since.
        world_size: ranks that wrote it.
        timing: how long its save took; None where that wasn't put down.
    """

    id: str
    step: int
    epoch: int | None
    metrics: Mapping[str, float]
    modes: Mapping[str, str]
    reasons: Sequence[str]
    created: datetime
    parameters: int
    tensors: int
    files: int
    raw_bytes: int
    stored_bytes: int
    borrowed_bytes: int
    world_size: int
    record: CommitRecord = field(repr=False, compare=False)
    timing: Timing | None = None

    @classmethod
    def of(cls, record: CommitRecord) -> Checkpoint:
        """The checkpoint that ``record`` commits.

        Raises:
            FormatError: its time can't be read.
        """
        try:
            created = datetime.fromisoformat(record.created).astimezone(UTC)
        except (ValueError, OverflowError) as error:
            raise FormatError(f"{record.id} was created at {record.created[:40]!r}, which is no time") from error
        return cls(
            id=record.id,
            step=record.step,
            epoch=record.epoch,
            metrics=record.values(),
            modes=dict(record.modes),
            reasons=tuple(record.reasons),
            created=created,
            parameters=record.parameters,
            tensors=record.tensors,
            files=record.files,
            raw_bytes=record.raw_bytes,
            stored_bytes=record.stored_bytes,
            borrowed_bytes=record.borrowed_bytes,
            world_size=record.world_size,
            record=record,
            timing=Timing(record.timing.save_s, record.timing.stall_s) if record.timing is not None else None,
        )

    @property
    def lenders(self) -> Sequence[str]:
        """The ids whose files it borrows."""
        return self.record.lenders

    @property
    def order(self) -> CheckpointId:
        """Sorts checkpoints from oldest to newest."""
        return parse_id(self.id)


@dataclass(frozen=True)
class Damage:
    """Something on storage that is not what was saved.

    Attributes:
        key: the object.
        problem: what is wrong, for a person.
        id: the checkpoint concerned, where known.
        block: number of the block, where one is concerned.
        tensors: names of the tensors that have bytes there.
    """

    key: str
    problem: str
    id: str | None = None
    block: int | None = None
    tensors: Sequence[str] = ()


@dataclass(frozen=True)
class Catalogue:
    """All that the register says."""

    checkpoints: Sequence[Checkpoint]
    """Existing, oldest first."""
    buried: Sequence[Checkpoint]
    """Committed, with a tombstone beside them."""
    condemned: frozenset[CheckpointId]
    damaged: Sequence[Damage]
    """Records in commits/ that can't be read; what they committed is neither there nor gone."""
    highest: CheckpointId | None
    """The highest id in commits/, of whatever kind."""
    graves: frozenset[CheckpointId] = frozenset()
    """Every id that has a tombstone."""
    elsewhere: Mapping[str, Storage] = field(default_factory=dict)
    """Where those of ``checkpoints`` lie, by id, that are only in a backup."""

    @property
    def store_id(self) -> str | None:
        """The store's id as its commits tell it."""
        return next((c.record.store_id for c in (*self.checkpoints, *self.buried)), None)


Cache = dict[str, CommitRecord | None]
"""Fates read before by key (None for condemned). Records never change, so this never goes stale."""


def scan(storage: Storage, store_id: str | None, cache: Cache | None = None) -> Catalogue:
    """Read every commit record; ``store_id`` where known must be theirs.

    Raises:
        StorageError: the listing is incomplete. Never taken for "empty".
    """
    for _ in range(_SCANS):
        try:
            return _scan(storage, store_id, {} if cache is None else cache)
        except NotFoundError:
            # A record was reclaimed after it was listed, and newer ones may have come: their number is not known.
            continue
    raise UnavailableError(f"{storage.url}: records in commits/ are listed and can't be read; try again later")


def _scan(storage: Storage, store_id: str | None, cache: Cache) -> Catalogue:
    # Tombstones first: where the newest is saved and its predecessor buried between the two listings, the other order
    # would see neither, and show an older checkpoint as the newest, or the store as empty.
    graves = {layout.record_id(entry.key) for entry in storage.list(layout.TRASH)}
    entries = storage.list(layout.COMMITS)
    live: list[Checkpoint] = []
    buried: list[Checkpoint] = []
    condemned: set[CheckpointId] = set()
    damaged: list[Damage] = []
    ids = {entry.key: id for entry in entries if (id := layout.record_id(entry.key)) is not None}
    bad = read_each([key for key in ids if key not in cache], partial(_learn, storage, cache), storage)
    for key, id in ids.items():
        try:
            if key in bad:
                raise bad[key]
            record = cache[key]
            if record is None:
                condemned.add(id)
                continue
            if store_id is not None and record.store_id != store_id:
                raise IntegrityError(f"{key} belongs to another store ({record.store_id})", key=key)
            (buried if id in graves else live).append(Checkpoint.of(record))
        except (IntegrityError, FormatError) as error:
            way_out = "Copy it back from a backup, or move it away: prune then collects its files"
            damaged.append(Damage(key, f"{error}. {way_out}", id=str(id)))
    live.sort(key=lambda c: c.order)
    buried.sort(key=lambda c: c.order)
    known = frozenset(filter(None, graves))
    return Catalogue(live, buried, frozenset(condemned), damaged, max(ids.values(), default=None), known)


def _learn(storage: Storage, cache: Cache, key: str) -> None:
    fate = read_record(storage, key, lambda data: parse_fate(data, key))
    cache[key] = fate if isinstance(fate, CommitRecord) else None


def read_holds(storage: Storage) -> tuple[dict[str, str], list[Damage]]:
    """The id that each hold pins, by the hold's name, and the holds that can't be read."""
    names = {entry.key: name for entry in storage.list(layout.HOLDS) if (name := layout.hold_name(entry.key))}
    found: dict[str, str] = {}

    def look(key: str) -> None:
        # Released since it was listed.
        with suppress(NotFoundError):
            found[names[key]] = read_record(storage, key, partial(_held, key, names[key]))

    bad = read_each(list(names), look, storage)
    holds = {name: found[name] for name in names.values() if name in found}
    return holds, [Damage(key, str(bad[key])) for key in names if key in bad]


def read_each(
    keys: Sequence[str], look: Callable[[str], None], storage: Storage
) -> dict[str, IntegrityError | FormatError]:
    """``look`` at the record at each key, many at a time where ``storage`` is far away; what is wrong, by key.

    Raises:
        NotFoundError, StorageError: of whichever failed first; the others may not have been looked at.
    """
    bad: dict[str, IntegrityError | FormatError] = {}

    def work(key: str) -> None:
        try:
            look(key)
        except (IntegrityError, FormatError) as error:
            bad[key] = error

    far = storage.capabilities.in_flight is not None
    run(keys, work, threads=max(1, min(_RECORDS_IN_FLIGHT, len(keys))) if far else 1)
    return bad


def _held(key: str, name: str, data: bytes) -> str:
    record = unseal(data, key, [HoldRecord])
    if record.name != name or layout.try_id(record.id) is None:
        raise IntegrityError(f"{layout.hold_key(name)} holds the record of {record.name!r} for {record.id[:80]!r}")
    return record.id
