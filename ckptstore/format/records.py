"""The JSON records, strict both ways: what isn't exactly a record is refused by name.

Small records (store, writer, commit, tombstone, hold, request) are indented for people and sealed: their last field,
``self``, is the SHA-256 of all that stands before it. Manifest and parts are proven by whoever points at them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, ClassVar, Literal, Self, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from ckptstore.errors import FormatError, IntegrityError
from ckptstore.format.codecs import CODECS
from ckptstore.format.digest import sha256
from ckptstore.format.jsontext import compact, indented, parse_json
from ckptstore.format.layout import FORMAT, CheckpointId, check_file_name, file_key, parse_id
from ckptstore.format.tensorfile import BLOCK_BYTES, TensorFile, TensorRow

SMALL_LIMIT = 16 << 10
"""Bytes a sealed record may have."""
PART_LIMIT = 256 << 20
MANIFEST_LIMIT = 256 << 20

Bytes: TypeAlias = Annotated[int, Field(ge=0, lt=1 << 63)]
Count: TypeAlias = Annotated[int, Field(ge=0, lt=1 << 63)]
Seconds: TypeAlias = Annotated[float, Field(ge=0)]
Hex256: TypeAlias = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Text: TypeAlias = Annotated[str, StringConstraints(max_length=1000)]
Name: TypeAlias = Annotated[str, StringConstraints(min_length=1, max_length=100)]
Metric: TypeAlias = float | Literal["nan", "inf", "-inf"]


class Record(BaseModel):
    """Base of all records: exact types, no unknown fields, no change after construction."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)
    spared: ClassVar[frozenset[str]] = frozenset()
    """Fields of a sealed record that are left out where they are None: they came later than the record."""


class StoreRecord(Record):
    """``store.json``: written once, at the first save."""

    format: Literal[1] = FORMAT
    store_id: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
    digest: Literal["blake3", "sha256"]
    created: Text
    created_by: Text


class WriterRecord(Record):
    """``writers/<n>.json``: who opened the store for writing. Everything but ``writer`` is for people."""

    format: Literal[1] = FORMAT
    writer: Count
    store_id: Text
    host: Text
    pid: Count
    created: Text


class Sealed256(Record):
    """Size and SHA-256 of a record that another one points at."""

    size: Bytes
    sha256: Hex256


class TimingRecord(Record):
    """How long a save took; null where that isn't known."""

    save_s: Seconds | None
    """From the call until right before the commit record was written."""
    stall_s: Seconds | None
    """How much of it the caller, which is training, had waited by then; with several ranks rank 0's."""


class CommitRecord(Record):
    """``commits/<id>.json`` of a checkpoint that exists."""

    spared: ClassVar[frozenset[str]] = frozenset({"timing"})

    kind: Literal["commit"] = "commit"
    format: Literal[1] = FORMAT
    store_id: Text
    id: Text
    step: Count
    epoch: Count | None
    metrics: dict[Name, Metric]
    modes: dict[Name, Literal["min", "max"]]
    reasons: list[Text]
    created: Text
    parameters: Count
    tensors: Count
    files: Count
    raw_bytes: Bytes
    stored_bytes: Bytes
    borrowed_bytes: Bytes
    """Those of ``stored_bytes`` that lie in the folders of ``lenders``."""
    world_size: Annotated[int, Field(ge=1, lt=1 << 32)]
    manifest: Sealed256
    lenders: list[Text]
    timing: TimingRecord | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if _id(self.id).step != self.step:
            raise ValueError("step differs from the id's")
        for lender in self.lenders:
            _id(lender)
        return self

    def values(self) -> dict[str, float]:
        """Metrics as numbers; nan and the infinities, which JSON lacks, stand as text in the record."""
        return {name: float(value) for name, value in self.metrics.items()}


class CondemnedRecord(Record):
    """``commits/<id>.json`` of a save that ended before its commit and never may commit again."""

    kind: Literal["condemned"] = "condemned"
    format: Literal[1] = FORMAT
    store_id: Text
    id: Text
    created: Text
    reason: Text


class TombstoneRecord(Record):
    """``trash/<id>.json``: the checkpoint is buried."""

    format: Literal[1] = FORMAT
    store_id: Text
    id: Text
    created: Text
    reason: Text


class HoldRecord(Record):
    """``holds/<name>.json``: a user's pin on one checkpoint."""

    format: Literal[1] = FORMAT
    store_id: Text
    name: Name
    id: Text
    created: Text


class ReceiptRecord(Record):
    """``receipts/<place>/<id>.json``: the checkpoint was copied to ``place``, and what arrived was checked."""

    format: Literal[1] = FORMAT
    store_id: Text
    id: Text
    place: Text
    """URL of the backup, without credentials."""
    method: Literal["readback", "checksum", "found"]
    """Every byte read back; or checked by the server against a checksum; or committed there already."""
    stored_bytes: Bytes
    manifest: Sealed256
    created: Text


class CopyingRecord(Record):
    """``copying/<id>.json``: somebody copies the checkpoint to here; its files are no leftovers meanwhile."""

    format: Literal[1] = FORMAT
    store_id: Text
    id: Text
    host: Text
    pid: Count
    created: Text


class VerificationRecord(Record):
    """``verifications/<time>-<hex>.json``: what a verification found that was finished."""

    format: Literal[1] = FORMAT
    store_id: Text
    created: Text
    """When it ended."""
    host: Text
    by: Literal["verify", "scrub"]
    id: Text | None
    """The one checkpoint that was read; null: all."""
    newest: Text | None
    """The newest of those that were read."""
    sample: Annotated[float, Field(gt=0, le=1)]
    """Share of the blocks that was read."""
    checkpoints: Count
    read_bytes: Bytes
    seconds: Seconds
    damages: Count
    """That were found, and left."""
    repaired: Count
    """That were found, and are no more."""


class ControlRecord(Record):
    """``control/<action>.json``: a request to the run that saves here; gone when that has taken it up."""

    format: Literal[1] = FORMAT
    store_id: Text
    action: Literal["save", "stop"]
    nonce: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
    """Tells this request from all others."""
    host: Text
    pid: Count
    created: Text


class PartEntry(Sealed256):
    rank: Count


class ManifestRecord(Record):
    """``manifest.json``: the parts, one a rank."""

    format: Literal[1] = FORMAT
    store_id: Text
    id: Text
    digest: Literal["blake3", "sha256"]
    block_bytes: Annotated[int, Field(ge=BLOCK_BYTES, le=BLOCK_BYTES)]
    world_size: Annotated[int, Field(ge=1, lt=1 << 32)]
    parts: list[PartEntry]

    @model_validator(mode="after")
    def _every_rank_once(self) -> Self:
        if self.world_size != len(self.parts) or any(part.rank != rank for rank, part in enumerate(self.parts)):
            raise ValueError("the parts are not those of ranks 0 to world_size - 1")
        return self


class BlockEntry(Record):
    """One block: ``raw`` bytes with ``digest``, stored as ``length`` bytes at ``offset``."""

    raw: Annotated[int, Field(ge=1, le=BLOCK_BYTES)]
    digest: Hex256
    offset: Bytes
    length: Annotated[int, Field(ge=1, le=BLOCK_BYTES)]
    codec: Text = "none"
    stored_digest: Hex256 | None = None
    """Digest of the stored bytes where the codec changed them: checked before decoding."""

    @model_validator(mode="after")
    def _codec_known(self) -> Self:
        if self.codec not in CODECS:
            raise ValueError(f"unknown codec {self.codec[:20]!r}; a newer ckptstore may know it")
        plain = self.codec == "none"
        if plain != (self.stored_digest is None) or (plain and self.length != self.raw):
            raise ValueError("codec, stored length and stored digest contradict each other")
        return self


class ShardEntry(Record):
    """Where a shard lies in its tensor, in elements."""

    tensor: Annotated[str, StringConstraints(max_length=4096)]
    """The tensor's name, without the file's prefix: shards of it, of this rank and of others, have it in common."""
    shape: list[Count]
    """Of the whole tensor."""
    offset: list[Count]


class TensorTable(Record):
    """The tensors of a file by column, which for 100,000 tensors is five times faster than by row."""

    names: list[Annotated[str, StringConstraints(max_length=4096)]]
    dtypes: list[Text]
    shapes: list[list[Count]]
    logical: dict[str, Text]
    """What a tensor is in memory, by name; only where the stored elements are not the tensor itself."""
    shards: dict[str, ShardEntry] | None = None
    """Of which tensor a stored one is a shard, by name; only where it isn't a whole one."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        named = self.logical.keys() | (self.shards or {}).keys()
        if not len(self.names) == len(self.dtypes) == len(self.shapes) or named - set(self.names):
            raise ValueError("the columns of the tensor table don't fit together")
        return self

    @classmethod
    def of(cls, rows: Sequence[TensorRow], shards: dict[str, ShardEntry] | None = None) -> Self:
        """The table of ``rows``; the inverse of ``rows()``."""
        return cls(
            names=[row.name for row in rows],
            dtypes=[row.dtype for row in rows],
            shapes=[list(row.shape) for row in rows],
            logical={row.name: row.logical for row in rows if row.logical is not None},
            shards=shards or None,
        )

    def rows(self) -> list[TensorRow]:
        """One row a tensor, in the order of the file."""
        columns = zip(self.names, self.dtypes, self.shapes, strict=True)
        return [TensorRow(name, dtype, tuple(shape), self.logical.get(name)) for name, dtype, shape in columns]


class FileEntry(Record):
    """One data file. ``prefix`` + a tensor's name in the file = its name in the state."""

    name: Text
    owner: Text
    """Id whose folder holds the bytes: another than the checkpoint's own where they are borrowed."""
    prefix: Annotated[str, StringConstraints(max_length=4096)]
    stored_bytes: Bytes
    tensors: TensorTable
    blocks: list[BlockEntry]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _id(self.owner)
        check_file_name(self.name)
        offset = 0
        for block in self.blocks:
            if block.offset != offset:
                raise ValueError(f"{self.name}: the stored blocks overlap or leave a gap")
            offset += block.length
        if offset != self.stored_bytes:
            raise ValueError(f"{self.name}: the stored blocks don't add up to the file's size")
        return self

    @property
    def key(self) -> str:
        """Where the bytes lie, in its owner's folder."""
        return file_key(parse_id(self.owner), self.name)

    @property
    def raw_bytes(self) -> int:
        """Before they were encoded."""
        return sum(block.raw for block in self.blocks)

    def layout(self) -> TensorFile:
        """The byte stream that the tensors make up.

        Raises:
            FormatError: the tensor table is bad, or the blocks don't cover the stream exactly.
        """
        stream = TensorFile.of(self.tensors.rows())
        lengths = [block.raw for block in self.blocks]
        # The sum first: a shape can be made so large that not even the list of its blocks fits into memory.
        if sum(lengths) != stream.raw_bytes or lengths != stream.block_lengths:
            raise FormatError(f"the blocks of {self.name} don't cover its tensors exactly", key=self.name)
        return stream


class PartRecord(Record):
    """``part-<rank>.json``: one rank's files, and the tree of all that is no tensor."""

    format: Literal[1] = FORMAT
    id: Text
    rank: Count
    world_size: Annotated[int, Field(ge=2, lt=1 << 32)] | None = None
    """How many ranks saved together, as this one understood it; only where there are several."""
    plan: Hex256 | None = None
    """Digest of what they agreed upon: who writes what. The same in all parts of a checkpoint."""
    files: list[FileEntry]
    tree: Any

    @model_validator(mode="after")
    def _names_once(self) -> Self:
        names = [file.name for file in self.files]
        if len(set(names)) != len(names):
            raise ValueError("a file's name stands twice")
        return self


_R = TypeVar("_R", bound=Record)


def seal(record: Record) -> bytes:
    """A small record as sealed, indented JSON; the inverse of ``unseal``.

    Raises:
        FormatError: it would be larger than 16 KiB.
    """
    dumped = record.model_dump().items()
    fields = {name: value for name, value in dumped if value is not None or name not in record.spared}
    fields["self"] = sha256(compact(fields))
    data = indented(fields)
    if len(data) > SMALL_LIMIT:
        raise FormatError(
            f"this {type(record).__name__} would take {len(data)} bytes of {SMALL_LIMIT}: "
            "give fewer or shorter metrics and reasons"
        )
    return data


def unseal(data: bytes, key: str, kinds: Iterable[type[_R]]) -> _R:
    """The record in ``data``; ``kinds`` are tried by their ``kind`` field, a single one without.

    Raises:
        IntegrityError: the seal doesn't hold: torn, truncated or changed.
        FormatError: the seal holds, the content is none of ``kinds`` or of a newer format.
    """
    try:
        fields = parse_json(data, key, limit=SMALL_LIMIT)
        if not isinstance(fields, dict):
            raise FormatError(f"{key} holds no JSON object", key=key)
        seal_found = fields.pop("self", None)
        actual = sha256(compact(fields))
        whole = seal_found == actual and indented({**fields, "self": actual}) == data
    except (FormatError, ValueError, RecursionError) as error:
        raise IntegrityError(f"{key} is damaged: {error}", key=key) from error
    if not whole:
        raise IntegrityError(
            f"{key} is damaged: its seal doesn't hold", key=key, expected=str(seal_found), actual=actual
        )
    model = next((m for m in kinds if _kind(m) == fields.get("kind")), None)
    _check_format(fields, key)
    if model is None:
        raise FormatError(f"{key} is a record of an unknown kind", key=key)
    return validate(model, fields, key)


def to_json(record: Record) -> bytes:
    """A manifest or part as compact JSON; the inverse of ``parse``."""
    fields = record.model_dump(exclude_none=True, exclude={"tree"})
    if isinstance(record, PartRecord):
        # Apart, because in a user's state None is a value and must stay.
        fields["tree"] = record.tree
    return compact(fields)


def parse(data: bytes, key: str, model: type[_R], *, limit: int) -> _R:
    """The manifest or part in ``data``, whose SHA-256 the caller has checked.

    Raises:
        FormatError: malformed, over the limit, or of a newer format.
    """
    fields = parse_json(data, key, limit=limit)
    _check_format(fields, key)
    return validate(model, fields, key)


def validate(model: type[_R], fields: Any, key: str) -> _R:
    """``fields`` as a ``model``.

    Raises:
        FormatError: naming the first field that is wrong.
    """
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])[:120]
        raise FormatError(f"{key} is malformed at {where or 'the top'}: {first['msg'][:300]}", key=key) from error
    except FormatError as error:
        raise FormatError(f"{key} is malformed: {error}", key=key) from error


def metric(value: float) -> Metric:
    """A number as it stands in a record; the inverse of ``float``."""
    if math.isfinite(value):
        return float(value)
    return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"


def now() -> str:
    """UTC time for people, as ``2026-01-31T12:00:00.000Z``. Nothing is decided by it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _check_format(fields: Any, key: str) -> None:
    # Before all else: in a record of a newer format anything may be different.
    number = fields.get("format") if isinstance(fields, dict) else None
    if type(number) is not int:
        raise FormatError(f"{key} is malformed: it has no format number", key=key)
    if number > FORMAT:
        shown = str(number) if number < 1 << 63 else "far above"
        raise FormatError(
            f"{key} has format {shown}, this ckptstore reads up to {FORMAT}: install a newer one", key=key
        )


def _kind(model: type[Record]) -> object:
    field = model.model_fields.get("kind")
    return field.default if field else None


def _id(text: str) -> CheckpointId:
    try:
        return parse_id(text)
    except FormatError as error:
        raise ValueError(str(error)) from error
