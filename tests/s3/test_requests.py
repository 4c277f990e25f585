"""How many requests a thing takes, and how many of them go at a time: a bucket charges for each, and each waits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import torch

import ckptstore as cs
from benchmarks import s3costs
from ckptstore.engine import control
from ckptstore.format import layout
from ckptstore.format.records import HoldRecord, now, seal
from ckptstore.format.tensorfile import BLOCK_BYTES
from ckptstore.storage.s3 import S3Storage
from tests.s3.latency import Latency
from tests.s3.seaweed import Seaweed

MANY = 80
"""More than are read at a time."""


@pytest.fixture
def way(server: Seaweed) -> Iterator[Latency]:
    with Latency(server.endpoint) as way:
        yield way


@pytest.fixture
def url(bucket: str, prefix: str) -> str:
    return f"s3://{bucket}/{prefix}"


@pytest.fixture
def storage(server: Seaweed, bucket: str, prefix: str) -> S3Storage:
    return S3Storage(bucket, prefix, server.options)


def state(count: int = 12) -> dict[str, dict[str, torch.Tensor]]:
    """Tensors of 2 MB, so that some lie in two blocks."""
    return {"model": {f"w{n:02}": torch.full((500_000,), float(n)) for n in range(count)}}


def fill(storage: S3Storage, server: Seaweed, url: str, checkpoints: int) -> cs.Checkpoint:
    """One checkpoint that was saved, and records of others that weren't; the first."""
    with cs.open(url, storage_options=server.options) as store:
        first = store.save({"x": 1}, step=0)
    for seq in range(2, checkpoints + 1):
        id = layout.new_id(1, seq, seq)
        record = first.record.model_copy(update={"id": str(id), "step": id.step})
        storage.create(layout.commit_key(id), seal(record))
    return first


def test_one_tensor_takes_four_requests_after_its_commit_record(server: Seaweed, way: Latency, url: str) -> None:
    """Manifest, part and the one or two blocks that hold it; nobody asks how large they are."""
    with cs.open(url, storage_options=server.options) as store:
        store.save(state(), step=1)
    counts = set()
    for name, tensor in state()["model"].items():
        way.forget()
        with cs.open(url, storage_options=way.options(server.options), read_only=True) as store:
            loaded = store.load(only=[f"model/{name}"])
        assert torch.equal(loaded["model"][name], tensor)
        [commit] = [at for at, one in enumerate(way.passed) if "/commits/" in one.key and one.kind == "GET"]
        after = way.passed[commit + 1 :]
        counts.add(len(after))
        assert {one.kind for one in after} == {"GET"}
        assert sum(one.got for one in after) <= 2.2 * BLOCK_BYTES
        assert len(way.passed) <= 8
    assert counts == {3, 4}, "there are tensors in one block, and in two"


def test_a_whole_load_asks_for_each_block_once(server: Seaweed, way: Latency, url: str) -> None:
    with cs.open(url, storage_options=server.options) as store:
        saved = store.save(state(), step=1)
    with cs.open(url, storage_options=way.options(server.options), read_only=True) as store:
        store.load()
    blocks = -(-saved.stored_bytes // BLOCK_BYTES)
    assert way.kinds() == {"LIST": 2, "GET": 4 + blocks}


def test_commit_records_are_read_many_at_a_time(server: Seaweed, way: Latency, url: str, storage: S3Storage) -> None:
    """And listed in two requests, tombstones and commits; a second look reads none again."""
    fill(storage, server, url, MANY)
    way.gate = "/commits/", 32
    with cs.open(url, storage_options=way.options(server.options), read_only=True) as store:
        assert [c.step for c in store.checkpoints()] == [0, *range(2, MANY + 1)]
        assert way.most == 32
        assert way.kinds() == {"LIST": 2, "GET": MANY + 1}
        way.forget()
        assert len(store.checkpoints()) == MANY
    assert way.kinds() == {"LIST": 2}


def test_looking_for_requests_takes_one(server: Seaweed, way: Latency, url: str, bucket: str, prefix: str) -> None:
    """A run looks again and again, for weeks."""
    with cs.open(url, storage_options=server.options) as store:
        store.save({"x": 1}, step=1)
        polling = S3Storage(bucket, prefix, way.options(server.options))
        assert control.poll(polling) == []
        assert way.kinds() == {"LIST": 1}
        store.signal("save")
        way.forget()
        [request] = control.poll(polling)
        assert request.action == "save"
        assert way.kinds() == {"LIST": 1, "GET": 1}
        assert control.answer(polling, request)
        assert control.poll(polling) == []


def test_holds_are_read_many_at_a_time(server: Seaweed, way: Latency, url: str, storage: S3Storage) -> None:
    first = fill(storage, server, url, 1)
    names = [f"kept-{n:03}" for n in range(MANY)]
    for name in names:
        record = HoldRecord(store_id=first.record.store_id, name=name, id=first.id, created=now())
        storage.create(layout.hold_key(name), seal(record))
    way.gate = "/holds/", 32
    with cs.open(url, storage_options=way.options(server.options), read_only=True) as store:
        assert list(store.holds().items()) == [(name, first.id) for name in names]
    assert way.most == 32


def test_damaged_records_among_many_are_told(server: Seaweed, url: str, storage: S3Storage) -> None:
    """Each by name, in order, and none hides another."""
    fill(storage, server, url, MANY)
    client, bucket = server.client(), url.split("/")[2]
    keys = [entry.key for entry in storage.list(layout.COMMITS)]
    bad = keys[3::7]
    for key in bad:
        client.put_object(Bucket=bucket, Key=f"{url.split('/', 3)[3]}/{key}", Body=b"{}")
    with cs.open(url, storage_options=server.options, read_only=True) as store:
        catalogue = store.catalogue()
    assert [damage.key for damage in catalogue.damaged] == bad
    assert [layout.commit_key(c.order) for c in catalogue.checkpoints] == [key for key in keys if key not in bad]


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        ("gone", "is missing"),
        pytest.param("shorter", "bytes, .* were saved", marks=pytest.mark.full),
        ("longer", "bytes, .* were saved"),
        ("much shorter", "bytes, .* were saved"),
    ],
)
def test_a_data_file_that_is_not_what_was_saved(
    server: Seaweed, url: str, storage: S3Storage, harm: str, says: str
) -> None:
    """Noticed at the first read, as nobody looked at it before."""
    with cs.open(url, storage_options=server.options) as store:
        saved = store.save(state(), step=1)
    [entry] = [e for e in storage.list(layout.folder(saved.order)) if e.key.endswith(".safetensors")]
    client, where = server.client(), {"Bucket": url.split("/")[2], "Key": f"{url.split('/', 3)[3]}/{entry.key}"}
    data = client.get_object(**where)["Body"].read()
    if harm == "gone":
        client.delete_object(**where)
    else:
        cut = {"shorter": data[:-1], "longer": data + b"x", "much shorter": data[:1000]}[harm]
        client.put_object(Body=cut, **where)

    with (
        cs.open(url, storage_options=server.options, read_only=True) as store,
        pytest.raises(cs.IntegrityError, match=says) as caught,
    ):
        store.load(saved.id)

    assert (caught.value.key, caught.value.id) == (entry.key, saved.id)


@pytest.mark.parametrize(
    "counts", [(1, 30, 3), *(pytest.param(some, marks=pytest.mark.full) for some in ((12,), (12, 1)))]
)
def test_the_price_list_counts_what_is_sent(server: Seaweed, way: Latency, url: str, counts: tuple[int, ...]) -> None:
    """Of the second save of a store that is open, and of a load by a new process."""
    tensors = {
        f"file{at}": {f"w{n}": torch.full((500_000,), float(n)) for n in range(count)}
        for at, count in enumerate(counts)
    }
    with cs.open(url, storage_options=way.options(server.options)) as store:
        store.save({"x": 1}, step=0)
        way.forget()
        saved = store.save(tensors, step=1)
        sizes = [file.entry.stored_bytes for file in store.contents(saved).files]
    assert len(sizes) == len(counts)
    sent = way.kinds() - Counter({"GET": 2})  # of contents
    assert sent == s3costs.save(sizes)
    way.forget()
    with cs.open(url, storage_options=way.options(server.options)) as store:
        store.load()
    assert way.kinds() == s3costs.load(sizes, checkpoints=2)


@pytest.mark.parametrize("asked", [None, pytest.param(True, marks=pytest.mark.full)])
def test_parts_are_not_hashed_again_to_be_signed(server: Seaweed, way: Latency, url: str, asked: bool | None) -> None:
    """Unless the configuration asks for it; all else is, over a connection that isn't encrypted."""
    options = way.options(server.options)
    if asked is not None:
        options["config_kwargs"] = {"s3": {"payload_signing_enabled": asked}}
    with cs.open(url, storage_options=options) as store:
        store.save(state(), step=1)
    sent = {one.key: one.signed for one in way.passed if one.kind == "PUT"}
    parts = {signed for key, signed in sent.items() if key.endswith(".safetensors")}
    records = {signed for key, signed in sent.items() if key.endswith(".json")}
    assert (parts == {"unsigned-payload"}) == (asked is None)
    assert all(len(signed) == 64 for signed in records)
    assert (
        server.client().list_multipart_uploads(Bucket=url.split("/")[2], Prefix=url.split("/", 3)[3]).get("Uploads")
        is None
    )
