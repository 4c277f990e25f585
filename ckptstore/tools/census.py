"""Every object that lies at a store's URL, what it is there for, and which checkpoints need it. Reads records only."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final, Literal, NamedTuple, TypeAlias

from ckptstore.engine.catalogue import Cache, Catalogue, Checkpoint, scan
from ckptstore.engine.contents import Contents, read_contents
from ckptstore.engine.workers import Meter, Progress, run
from ckptstore.errors import FormatError, IntegrityError
from ckptstore.format import layout
from ckptstore.format.layout import CheckpointId, parse_id
from ckptstore.format.records import FileEntry
from ckptstore.maintenance.keep import is_buried
from ckptstore.maintenance.leftovers import find_leftovers
from ckptstore.maintenance.lent import Lent
from ckptstore.storage.base import Entry, Storage
from ckptstore.view import View

Kind: TypeAlias = Literal["checkpoints", "trash", "unfinished", "damaged", "records", "foreign"]
KINDS: Final[tuple[Kind, ...]] = ("checkpoints", "trash", "unfinished", "damaged", "records", "foreign")
RECORDS = "(records)"
"""What manifests and parts are called where data files go by the component of the state that they hold."""

_FAR, _NEAR = 16, 2
"""Checkpoints whose records are read at a time: far away that is mostly waiting."""
_RANK = re.compile(r"-?r?\d+$")


class Stored(NamedTuple):
    """One object, as a checkpoint's records describe it."""

    component: str
    codecs: tuple[tuple[str, int, int], ...] = ()
    """For each codec the stored bytes of its blocks, and those before they were encoded."""


@dataclass(frozen=True)
class Census:
    """What lies at one URL.

    Attributes:
        sizes: bytes of each object, by key.
        kinds: what each object is there for, by key.
        checkpoints: those that exist and lie here, oldest first.
        needs: the keys in checkpoints/ that each of them needs, and each deleted one, also what they borrow, by id.
        described: what the records say of each key that is needed.
        unreadable: the ids whose records are damaged, so that nobody knows what they need.
    """

    url: str
    sizes: Mapping[str, int]
    kinds: Mapping[str, Kind]
    entries: Sequence[Entry]
    catalogue: Catalogue
    checkpoints: Sequence[Checkpoint]
    needs: Mapping[str, frozenset[str]]
    described: Mapping[str, Stored]
    unreadable: Collection[str] = field(default=())

    @cached_property
    def _users(self) -> Counter[str]:
        return Counter(key for c in self.checkpoints for key in self.needs[c.id])

    def bytes_of(self, ids: Iterable[str]) -> int:
        """What these checkpoints need, each object once."""
        return self._size(key for key in {key for id in ids for key in self.needs[id]})

    def freed_by(self, ids: Iterable[str]) -> int:
        """What would be free without them: what no other existing checkpoint needs."""
        own = Counter(key for id in ids for key in self.needs[id])
        return self._size(key for key, count in own.items() if count == self._users[key])

    @cached_property
    def existing(self) -> dict[str, Stored]:
        """What existing checkpoints need, each object once."""
        return {key: self.described[key] for key in self._users}

    def own_bytes(self, checkpoint: Checkpoint) -> int:
        """What lies in its own folder, of what it needs."""
        return self._size(key for key in self.needs[checkpoint.id] if layout.folder_id(key) == checkpoint.order)

    def total(self, kind: Kind) -> int:
        """All bytes of a kind."""
        return self._size(key for key, what in self.kinds.items() if what == kind)

    def _size(self, keys: Iterable[str]) -> int:
        return sum(self.sizes.get(key, 0) for key in keys)


def take_census(store: View, progress: Progress | None = None) -> Census:
    """Look at all that lies at ``store.url``; backups are stores of their own.

    Args:
        progress: called with (checkpoints read, checkpoints in all), from any thread.

    Raises:
        NotFoundError: there is no store.
        StorageError: the storage can't be read completely.
    """
    storage, known = store.storage, store.catalogue()
    # Listed before the commits are: a save that ends in between is committed, and its files are not all in the list.
    entries = storage.list("")
    cache: Cache = {layout.commit_key(c.order): c.record for c in (*known.checkpoints, *known.buried)}
    catalogue = scan(storage, known.store_id, cache)
    sizes = {entry.key: entry.size for entry in entries}
    listed = [c for c in (*catalogue.checkpoints, *catalogue.buried) if layout.commit_key(c.order) in sizes]
    reader = _Reader(storage, sizes)
    _read(reader, listed, progress)
    existing = [c for c in catalogue.checkpoints if c.id in reader.needs and c.id not in reader.gone]
    kinds = _kinds(storage, entries, catalogue, reader.needs, existing)
    return Census(
        store.url, sizes, kinds, entries, catalogue, existing, reader.needs, reader.described, reader.unreadable
    )


def _read(reader: _Reader, checkpoints: Sequence[Checkpoint], progress: Progress | None) -> None:
    meter = Meter(len(checkpoints), progress)

    def read(checkpoint: Checkpoint) -> None:
        reader.read(checkpoint)
        meter.add(1)

    far = reader.storage.capabilities.in_flight is not None
    run(iter(checkpoints), read, threads=max(1, min(_FAR if far else _NEAR, len(checkpoints))))


class _Reader:
    """Reads what checkpoints need, and forgets all else at once: of many their parts would not fit into memory."""

    def __init__(self, storage: Storage, sizes: Mapping[str, int]) -> None:
        self.storage = storage
        self.needs: dict[str, frozenset[str]] = {}
        self.described: dict[str, Stored] = {}
        self.unreadable: list[str] = []
        self.gone: set[str] = set()
        self._folders: dict[CheckpointId | None, list[str]] = {}
        for key in sizes:
            self._folders.setdefault(layout.folder_id(key), []).append(key)

    def read(self, checkpoint: Checkpoint) -> None:
        """Note what one checkpoint needs; of one whose records are damaged, all that it may need."""
        try:
            found = dict(_described(read_contents(self.storage, checkpoint.record)))
        except (IntegrityError, FormatError):
            lenders = [key for lender in checkpoint.lenders for key in self._folders.get(parse_id(lender), ())]
            own = self._folders.get(checkpoint.order, ())
            found = {key: Stored("(unknown)") for key in (*own, *filter(layout.is_data_file, lenders))}
            # One that was deleted while it was read isn't damaged.
            if is_buried(self.storage, checkpoint):
                self.gone.add(checkpoint.id)
            else:
                self.unreadable.append(checkpoint.id)
            # What another one's records say of the same file is better.
            found = {key: self.described.get(key, what) for key, what in found.items()}
        self.described.update(found)
        self.needs[checkpoint.id] = frozenset(found)


def _described(contents: Contents) -> Iterable[tuple[str, Stored]]:
    id = parse_id(contents.commit.id)
    yield layout.manifest_key(id), Stored(RECORDS)
    for part in contents.parts:
        yield layout.part_key(id, part.rank), Stored(RECORDS)
        yield from ((file.key, _stored(file)) for file in part.files)


def _stored(file: FileEntry) -> Stored:
    stored, raw = Counter[str](), Counter[str]()
    for block in file.blocks:
        stored[block.codec] += block.length
        raw[block.codec] += block.raw
    # The rank's number, or that of a second file of the same component, says nothing of what is in it.
    component = file.prefix.partition("/")[0] or _RANK.sub("", file.name.rpartition(".")[0])
    return Stored(component, tuple((codec, stored[codec], raw[codec]) for codec in stored))


def _kinds(
    storage: Storage,
    entries: Sequence[Entry],
    catalogue: Catalogue,
    needs: Mapping[str, frozenset[str]],
    existing: Sequence[Checkpoint],
) -> dict[str, Kind]:
    needed = {key for c in existing for key in needs[c.id]}
    there = {c.id for c in existing}
    deleted = [c for c in (*catalogue.checkpoints, *catalogue.buried) if c.id not in there]
    buried = {c.order for c in deleted if c.id in needs}
    lent = {key for c in deleted for key in needs.get(c.id, ())}
    leftovers, foreign = find_leftovers(entries, catalogue, Lent(storage, catalogue))
    left, not_ours = {key for one in leftovers for key in one.keys}, set(foreign)

    def kind(key: str) -> Kind:
        id = layout.folder_id(key)
        if key in needed:
            return "checkpoints"
        if key in not_ours:
            return "foreign"
        if key in left:
            return "unfinished"
        if id in buried or key in lent:
            return "trash"
        # In the folder of one whose commit record is damaged, or kept because that one may need it.
        return "damaged" if id is not None else "records"

    return {entry.key: kind(entry.key) for entry in entries}
