"""Records: formatting and parsing are inverse, and nothing else parses."""

from __future__ import annotations

import hashlib
import json
import math
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptstore.errors import FormatError, IntegrityError
from ckptstore.format import schema
from ckptstore.format.records import (
    SMALL_LIMIT,
    CommitRecord,
    CondemnedRecord,
    ControlRecord,
    HoldRecord,
    ManifestRecord,
    PartRecord,
    Record,
    Sealed256,
    StoreRecord,
    TensorTable,
    TimingRecord,
    TombstoneRecord,
    VerificationRecord,
    WriterRecord,
    metric,
    now,
    parse,
    parse_json,
    seal,
    to_json,
    unseal,
)
from ckptstore.format.tensorfile import TensorRow

ID = "0001-000042-step1000-0123456789abcdef"
STORE = "0" * 32
texts = st.text(max_size=50)
names = st.text(min_size=1, max_size=20)
counts = st.integers(0, (1 << 63) - 1)
seconds = st.none() | st.floats(0, 1e9)


@st.composite
def commits(draw: st.DrawFn) -> CommitRecord:
    values = draw(st.dictionaries(names, st.floats(), max_size=5))
    return CommitRecord(
        store_id=STORE,
        id=ID,
        step=1000,
        epoch=draw(st.none() | counts),
        metrics={name: metric(value) for name, value in values.items()},
        modes=dict.fromkeys(values, "min"),
        reasons=draw(st.lists(texts, max_size=5)),
        created=now(),
        parameters=draw(counts),
        tensors=draw(counts),
        files=draw(counts),
        raw_bytes=draw(counts),
        stored_bytes=draw(counts),
        borrowed_bytes=draw(counts),
        world_size=draw(st.integers(1, (1 << 32) - 1)),
        manifest=Sealed256(size=draw(counts), sha256="a" * 64),
        lenders=draw(st.lists(st.just(ID), max_size=2)),
        timing=draw(st.none() | st.builds(TimingRecord, save_s=seconds, stall_s=seconds)),
    )


small: list[Record] = [
    StoreRecord(store_id=STORE, digest="blake3", created=now(), created_by="ckptstore 0.1.0"),
    WriterRecord(writer=1, store_id=STORE, host="höst", pid=7, created=now()),
    CondemnedRecord(store_id=STORE, id=ID, created=now(), reason="unfinished"),
    TombstoneRecord(store_id=STORE, id=ID, created=now(), reason="by hand"),
    HoldRecord(store_id=STORE, name="paper", id=ID, created=now()),
    ControlRecord(store_id=STORE, action="stop", nonce="0" * 32, host="höst", pid=7, created=now()),
    VerificationRecord(
        store_id=STORE,
        created=now(),
        host="höst",
        by="scrub",
        id=None,
        newest=ID,
        sample=0.1,
        checkpoints=3,
        read_bytes=7,
        seconds=0.5,
        damages=1,
        repaired=2,
    ),
]


@given(commits())
def test_commit_records_come_back(record: CommitRecord) -> None:
    data = seal(record)
    assert unseal(data, "key", [CommitRecord]) == record
    assert seal(unseal(data, "key", [CommitRecord])) == data
    assert data.isascii()


@given(commits())
def test_a_timing_that_isn_t_known_is_left_out(record: CommitRecord) -> None:
    """The records of older versions stay as they are, byte for byte."""
    assert (b'"timing": {' in seal(record)) == (record.timing is not None)


@pytest.mark.parametrize(
    "timing",
    [
        {},
        {"save_s": 1.0},
        {"save_s": -1.0, "stall_s": None},
        {"save_s": True, "stall_s": None},
        {"save_s": "1", "stall_s": None},
        {"save_s": 10**400, "stall_s": None},
        {"save_s": 1.0, "stall_s": 1.0, "fence_s": 1.0},
        [1.0, 1.0],
        1.0,
    ],
    ids=str,
)
def test_a_timing_that_can_t_be(timing: object) -> None:
    record = CommitRecord.model_validate(
        {
            **dict.fromkeys(("parameters", "tensors", "files", "raw_bytes", "stored_bytes", "borrowed_bytes"), 0),
            **{"store_id": STORE, "id": ID, "step": 1000, "epoch": None, "metrics": {}, "modes": {}, "reasons": []},
            **{"created": now(), "world_size": 1, "manifest": {"size": 1, "sha256": "a" * 64}, "lenders": []},
        }
    )
    good = resealed({**json.loads(seal(record)), "timing": {"save_s": 1.5, "stall_s": None}})
    assert unseal(good, "key", [CommitRecord]).timing == TimingRecord(save_s=1.5, stall_s=None)
    with pytest.raises(FormatError, match="malformed at timing"):
        unseal(resealed({**json.loads(seal(record)), "timing": timing}), "key", [CommitRecord])


@pytest.mark.parametrize("record", small, ids=lambda r: type(r).__name__)
def test_small_records_come_back(record: Record) -> None:
    assert unseal(seal(record), "key", [type(record)]) == record


@pytest.mark.parametrize("record", small, ids=lambda r: type(r).__name__)
def test_the_seal_is_what_the_specification_says(record: Record) -> None:
    """SHA-256 of the compact form without the last field, which it is."""
    data = seal(record)
    fields = json.loads(data)
    assert list(fields)[-1] == "self"
    digest = fields.pop("self")
    assert hashlib.sha256(json.dumps(fields, separators=(",", ":")).encode()).hexdigest() == digest
    assert data == json.dumps({**fields, "self": digest}, indent=1).encode() + b"\n"


def resealed(fields: dict[str, Any], **style: Any) -> bytes:
    fields = {name: value for name, value in fields.items() if name != "self"}
    fields["self"] = hashlib.sha256(json.dumps(fields, separators=(",", ":")).encode()).hexdigest()
    return json.dumps(fields, **{"indent": 1, **style}).encode() + b"\n"


@pytest.mark.parametrize(
    "style", [{"indent": 2}, {"indent": None}, {"separators": (", ", ": ")}, {"sort_keys": True}], ids=str
)
def test_only_one_form_is_a_record(style: dict[str, Any]) -> None:
    """The same meaning formatted otherwise is damage: one record, one sequence of bytes."""
    fields = json.loads(seal(small[0]))
    assert unseal(resealed(fields), "key", [StoreRecord]) == small[0]
    with pytest.raises(IntegrityError, match="seal"):
        unseal(resealed(fields, **style), "key", [StoreRecord])


@pytest.mark.parametrize("place", ["first", "missing", "twice", "of another type"])
def test_the_seal_stands_last_and_once(place: str) -> None:
    fields = json.loads(seal(small[0]))
    digest = fields.pop("self")
    changed: dict[str, Any] = {
        "first": {"self": digest, **fields},
        "missing": fields,
        "of another type": {**fields, "self": [digest]},
    }.get(place, {**fields, "self": digest})
    data = json.dumps(changed, indent=1).encode() + b"\n"
    if place == "twice":
        data = data.replace(b'"self"', b'"self": "",\n "self"')
    with pytest.raises(IntegrityError):
        unseal(data, "key", [StoreRecord])


def test_kinds_are_told_apart() -> None:
    condemned = seal(small[2])
    assert isinstance(unseal(condemned, "key", [CommitRecord, CondemnedRecord]), CondemnedRecord)
    with pytest.raises(FormatError, match="unknown kind"):
        unseal(condemned, "key", [CommitRecord])
    with pytest.raises(FormatError):
        unseal(condemned, "key", [TombstoneRecord])


def test_over_the_limit() -> None:
    record = TombstoneRecord.model_construct(format=1, store_id=STORE, id=ID, created=now(), reason="x" * SMALL_LIMIT)
    with pytest.raises(FormatError, match="16384"):
        seal(record)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=20,
)


@given(json_values)
def test_trees_come_back(tree: Any) -> None:
    """Also None, which is a value there and no missing field."""
    record = PartRecord(id=ID, rank=0, files=[], tree=tree)
    data = to_json(record)
    found = parse(data, "key", PartRecord, limit=1 << 20)
    assert found == record
    assert to_json(found) == data


def test_manifests_come_back() -> None:
    fields = {"rank": 0, "size": 1, "sha256": "a" * 64}
    content = {"store_id": STORE, "id": ID, "digest": "blake3", "block_bytes": 1 << 24, "world_size": 2}
    record = ManifestRecord.model_validate({**content, "parts": [fields, {**fields, "rank": 1}]})
    assert parse(to_json(record), "key", ManifestRecord, limit=1000) == record
    with pytest.raises(FormatError, match="more than"):
        parse(to_json(record), "key", ManifestRecord, limit=10)
    for ranks in ([0], [0, 0], [1, 0], [0, 1, 2]):
        with pytest.raises(ValueError, match="ranks"):
            ManifestRecord.model_validate({**content, "parts": [{**fields, "rank": rank} for rank in ranks]})


def test_tables_come_back() -> None:
    rows = [TensorRow("a", "F32", (2, 3)), TensorRow("b", "F64", (2, 2), "complex128"), TensorRow("c", "U8", ())]
    assert TensorTable.of(rows).rows() == rows


@given(st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    """Parsing ends with a value or a FormatError, unsealing with an IntegrityError."""
    with suppress(FormatError):
        parse_json(data, "key", limit=100)
    with pytest.raises(IntegrityError):
        unseal(data, "key", [StoreRecord])


@given(st.floats())
def test_metrics_come_back(value: float) -> None:
    assert repr(float(metric(value))) == repr(value)
    assert isinstance(metric(value), float) == math.isfinite(value)


def test_the_schema_is_that_of_the_models() -> None:
    """``make schema`` writes it anew."""
    assert schema.PATH.read_text() == schema.generate()
