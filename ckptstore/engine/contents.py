"""What a checkpoint holds: manifest and parts, proven against its commit record, and the tensors that they describe."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, Protocol

from ckptstore.engine.workers import run
from ckptstore.errors import FormatError, IntegrityError, NotFoundError
from ckptstore.format import layout
from ckptstore.format.digest import sha256
from ckptstore.format.layout import CheckpointId, parse_id
from ckptstore.format.records import (
    MANIFEST_LIMIT,
    PART_LIMIT,
    CommitRecord,
    FileEntry,
    ManifestRecord,
    PartEntry,
    PartRecord,
    Sealed256,
    parse,
)
from ckptstore.format.regions import Region, tiles
from ckptstore.format.tensorfile import TensorFile, TensorRow
from ckptstore.storage.base import ObjectReader, Storage

_READERS = 8
"""Parts that are read at a time."""


@dataclass(frozen=True)
class DataFile:
    """One data file of a checkpoint, as its part describes it."""

    entry: FileEntry
    stream: TensorFile

    @property
    def key(self) -> str:
        return self.entry.key

    def name(self, index: int) -> str:
        """Full name in the state of tensor number ``index``, or of the tensor that it is a shard of."""
        name = self.entry.tensors.names[index]
        shards = self.entry.tensors.shards
        return self.entry.prefix + (shards[name].tensor if shards is not None and name in shards else name)

    def region(self, index: int) -> Region:
        """Where tensor number ``index`` lies in the one that it is a shard of; all of it where it is none."""
        row, shards = self.stream.rows[index], self.entry.tensors.shards
        shard = shards.get(row.name) if shards is not None else None
        return Region.whole(row.shape) if shard is None else Region(tuple(shard.offset), row.shape)

    def names_in(self, block: int) -> list[str]:
        """The tensors that have bytes in block number ``block``."""
        return [self.name(piece.row) for piece in self.stream.pieces(block)]


@dataclass(frozen=True)
class Contents:
    """What a checkpoint holds, after manifest and parts were proven against the commit record.

    Attributes:
        parts: of all ranks in order, or of those that were asked for, the first one among them.
    """

    commit: CommitRecord
    digest: Literal["blake3", "sha256"]
    parts: Sequence[PartRecord]

    @property
    def trees(self) -> dict[int, Any]:
        """All that is no tensor, by rank; the first one's, where that is all ranks' together."""
        first = self.parts[0].tree
        return {part.rank: first if part.tree is None else part.tree for part in self.parts}

    def covers(self, name: str, region: Region) -> bool:
        """Whether all of a region of a tensor lies in the parts that are here, once."""
        shared = (file.region(row).within(region) for file, row in self._places.get(name, ()))
        return tiles(region.shape, [box for box in shared if box is not None])

    @cached_property
    def _places(self) -> dict[str, list[tuple[DataFile, int]]]:
        places: dict[str, list[tuple[DataFile, int]]] = {}
        for file in self.files:
            for row in range(len(file.stream.rows)):
                places.setdefault(file.name(row), []).append((file, row))
        return places

    @cached_property
    def files(self) -> list[DataFile]:
        return [self._file(part, entry) for part in self.parts for entry in part.files]

    @cached_property
    def tensors(self) -> dict[str, TensorRow]:
        """Every tensor by its full name in the state, in stored form: those in shards, too, as a whole.

        Raises:
            FormatError: a name stands twice, or shards don't make up their tensor exactly.
        """
        found: dict[str, TensorRow] = {}
        shards: dict[str, list[_Shard]] = {}
        for file in self.files:
            places = file.entry.tensors.shards or {}
            for row in file.stream.rows:
                if row.name in places:
                    place = places[row.name]
                    shard = _Shard(row, tuple(place.shape), Region(tuple(place.offset), row.shape))
                    shards.setdefault(file.entry.prefix + place.tensor, []).append(shard)
                elif found.setdefault(file.entry.prefix + row.name, row) is not row:
                    raise FormatError(f"{self.commit.id} lists tensor {row.name[:80]!r} twice", id=self.commit.id)
        complete = len(self.parts) == self.commit.world_size
        for name, each in shards.items():
            if name in found or not _belong_together(each) or (complete and not _make_up_one(each)):
                raise FormatError(
                    f"the shards of {name[:80]!r} in {self.commit.id} don't make up one tensor: some are missing, "
                    "overlap or don't belong together",
                    id=self.commit.id,
                )
            found[name] = TensorRow(name, each[0].row.dtype, each[0].shape, each[0].row.logical)
        return found

    def _file(self, part: PartRecord, entry: FileEntry) -> DataFile:
        id = self.commit.id
        key = layout.part_key(parse_id(id), part.rank)
        if entry.owner not in (id, *self.commit.lenders):
            # Only those named there are kept for its sake.
            raise FormatError(
                f"{key} borrows from {entry.owner}, which is no lender in the commit record", id=id, key=key
            )
        try:
            return DataFile(entry, entry.layout())
        except FormatError as error:
            raise FormatError(f"{key} is malformed: {error}", id=id, key=key) from error


class _Shard(NamedTuple):
    row: TensorRow
    shape: tuple[int, ...]
    """Of the whole tensor."""
    region: Region


def _belong_together(shards: Sequence[_Shard]) -> bool:
    return len({(shard.row.dtype, shard.row.logical, shard.shape) for shard in shards}) == 1


def _make_up_one(shards: Sequence[_Shard]) -> bool:
    return tiles(shards[0].shape, [shard.region for shard in shards])


class Rescue(Protocol):
    """Where else the bytes of a damaged object lie; see ``rescue.Rescuer``."""

    def record(self, key: str, wanted: Sealed256, id: str, *, limit: int, error: IntegrityError) -> bytes | None:
        """The manifest or part that ``key`` should be; ``error`` is what is wrong with it."""

    def readers(self, file: DataFile, id: str) -> Iterator[ObjectReader]:
        """The same data file in other places, one after the other, as long as it is asked for."""

    def rescued(self, contents: Contents, file: DataFile, block: int, error: IntegrityError) -> None:
        """Told of each block that came from such a place."""


def read_contents(
    storage: Storage, commit: CommitRecord, rescue: Rescue | None = None, ranks: Collection[int] | None = None
) -> Contents:
    """Manifest and parts of a committed checkpoint, each checked against who points at it.

    ``rescue`` is asked for what is damaged or missing; ``ranks``: whose parts, all by default.

    Raises:
        IntegrityError: missing, or other bytes than were committed.
        FormatError: malformed or of a newer format.
    """
    id = parse_id(commit.id)
    key = layout.manifest_key(id)
    data = read_or_rescue(storage, key, commit.manifest, commit.id, MANIFEST_LIMIT, rescue)
    manifest = parse(data, key, ManifestRecord, limit=MANIFEST_LIMIT)
    if (manifest.id, manifest.store_id, manifest.world_size) != (commit.id, commit.store_id, commit.world_size):
        raise IntegrityError(f"{key} belongs to checkpoint {manifest.id}", id=commit.id, key=key)
    asked = [part for part in manifest.parts if ranks is None or part.rank in ranks]
    parts: dict[int, PartRecord] = {}

    def read(wanted: PartEntry) -> None:
        parts[wanted.rank] = read_part(storage, id, wanted, rescue)

    # A rescuer takes one question at a time.
    run(iter(asked), read, threads=1 if rescue is not None else min(len(asked), _READERS))
    return Contents(commit, manifest.digest, [parts[part.rank] for part in asked])


def read_part(storage: Storage, id: CheckpointId, wanted: PartEntry, rescue: Rescue | None = None) -> PartRecord:
    """The part of one rank.

    Raises:
        IntegrityError, FormatError: as ``read_contents``.
    """
    key = layout.part_key(id, wanted.rank)
    data = read_or_rescue(storage, key, wanted, str(id), PART_LIMIT, rescue)
    part = parse(data, key, PartRecord, limit=PART_LIMIT)
    if (part.id, part.rank) != (str(id), wanted.rank):
        raise IntegrityError(f"{key} belongs to rank {part.rank} of {part.id}", id=str(id), key=key)
    return part


def read_or_rescue(storage: Storage, key: str, wanted: Sealed256, id: str, limit: int, rescue: Rescue | None) -> bytes:
    """``read_sealed``, or what ``rescue`` has where it is missing or damaged.

    Raises:
        IntegrityError, FormatError: as ``read_sealed``, and nobody else has it.
    """
    try:
        return read_sealed(storage, key, wanted, id, limit=limit)
    except IntegrityError as error:
        data = rescue.record(key, wanted, id, limit=limit, error=error) if rescue is not None else None
        if data is None:
            raise
        return data


def read_sealed(storage: Storage, key: str, wanted: Sealed256, id: str, *, limit: int) -> bytes:
    """The record under ``key``, if it is the one that is ``wanted``.

    Raises:
        IntegrityError: missing, or it has other bytes.
        FormatError: it is said to have more than ``limit`` bytes.
    """
    if wanted.size > limit:
        raise FormatError(f"{key} is said to have {wanted.size} bytes, more than the {limit} allowed", id=id, key=key)
    try:
        data, size = _read_at_most(storage, key, wanted.size)
        if size == wanted.size and sha256(data) != wanted.sha256:
            # A flip on the way up heals by itself, one on the disk does not.
            data, size = _read_at_most(storage, key, wanted.size)
    except NotFoundError as error:
        raise IntegrityError(f"{key} is missing", id=id, key=key) from error
    if size != wanted.size:
        raise IntegrityError(
            f"{key} has {size} bytes, {wanted.size} were saved", id=id, key=key, expected=wanted.size, actual=size
        )
    actual = sha256(data)
    if actual != wanted.sha256:
        raise IntegrityError(
            f"{key} is damaged: its SHA-256 differs", id=id, key=key, expected=wanted.sha256, actual=actual
        )
    return data


def _read_at_most(storage: Storage, key: str, limit: int) -> tuple[bytes, int]:
    """An object and its size; nothing of one that is longer than ``limit``."""
    try:
        # Its size is not asked for beforehand: that would be a second request, and may take as long as the first.
        data = storage.read(key, limit=limit)
    except FormatError:
        return b"", storage.size(key)
    return data, len(data)
