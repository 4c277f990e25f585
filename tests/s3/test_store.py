"""The store as a user sees it, in a bucket: what a folder can do, and what only a bucket has."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import ckptstore as cs
from ckptstore.engine.catalogue import Checkpoint
from ckptstore.storage.s3 import S3Storage
from ckptstore.store import Store
from tests.s3.seaweed import PUBLIC, Seaweed
from tests.s3.test_contract import BucketRaw

Open = Callable[..., Store]


@pytest.fixture
def url(bucket: str, prefix: str) -> str:
    return f"s3://{bucket}/{prefix}"


@pytest.fixture
def open_store(server: Seaweed, url: str) -> Open:
    """Open the store; ``also`` are further storage options."""

    def opened(*, also: dict[str, Any] | None = None, **how: Any) -> Store:
        return cs.open(url, storage_options=server.options | (also or {}), **how)

    return opened


@pytest.fixture
def raw(server: Seaweed, bucket: str, prefix: str) -> BucketRaw:
    return BucketRaw(server.client(), bucket, f"{prefix}/")


def objects(raw: BucketRaw) -> list[str]:
    """The keys of all objects in the store."""
    return raw.keys()


class Training:
    """A small model that really learns."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.BatchNorm1d(256), torch.nn.Linear(256, 4))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)

    @property
    def state(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "plain": {"lr": 0.01, "names": ["a"]}}

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model(torch.randn(32, 256)).square().mean().backward()
        self.optimizer.step()

    def values(self) -> dict[str, torch.Tensor]:
        moments = {f"{i} {k}": v for i, state in self.optimizer.state_dict()["state"].items() for k, v in state.items()}
        return {name: value.clone() for name, value in (self.model.state_dict() | moments).items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def tensors(step: int) -> dict[str, Any]:
    return {
        "model": {"w": torch.full((5000,), float(step))},
        "ema": {"w": torch.full((7,), -float(step))},
        "step": step,
    }


@pytest.mark.parametrize("mode", ["sync", "async", "overlapped"])
def test_every_way_to_save(open_store: Open, mode: Any) -> None:
    """What is restored is what was there at the call, though the training went on."""
    training = Training()
    training.step()
    with open_store() as store:
        at_call = training.values()
        handle = store.save(training.state, step=1, mode=mode)
        training.step()
        saved = handle if isinstance(handle, Checkpoint) else handle.result()
        assert not same(training.values(), at_call)

        other = Training(seed=1)
        loaded = store.load("latest", into=other.state)
        assert loaded.checkpoint == saved
        assert same(other.values(), at_call)
    with open_store(read_only=True) as store:
        assert [c.id for c in store.checkpoints()] == [saved.id]
        assert store.verify().ok


@pytest.mark.parametrize("compression", ["none", "zstd", "float-zstd"])
def test_large_states_go_up_in_parts(open_store: Open, raw: BucketRaw, compression: str) -> None:
    """Encoded ones too, whose size nobody knows before."""
    state = {"model": {"w": torch.randn(9 << 20), "b": torch.randn(1000).to(torch.bfloat16)}, "note": "x" * 100}
    with open_store(compression=compression) as store:
        saved = store.save(state, step=1)
    key = f"{raw.prefix}checkpoints/{saved.id}/model."
    [listed] = raw.client.list_objects_v2(Bucket=raw.bucket, Prefix=key)["Contents"]
    with open_store(read_only=True) as store:
        loaded = store.load("step:1")
        assert torch.equal(loaded["model"]["w"], state["model"]["w"])  # type: ignore[index]
        assert torch.equal(loaded["model"]["b"], state["model"]["b"])  # type: ignore[index]
        assert loaded["note"] == state["note"]
        assert store.verify().ok

    assert "-" in listed["ETag"], "the ETag of an object in parts ends in their number"
    assert (listed["Size"] < 36 << 20) == (compression != "none")
    assert raw.client.list_multipart_uploads(Bucket=raw.bucket, Prefix=raw.prefix).get("Uploads", []) == []


def test_a_part_of_a_checkpoint(open_store: Open) -> None:
    with open_store() as store:
        store.save(tensors(1), step=1)
        target = tensors(0)
        store.load("latest", into=target, only=["ema/*"])

        assert torch.equal(target["ema"]["w"], tensors(1)["ema"]["w"])
        assert torch.equal(target["model"]["w"], tensors(0)["model"]["w"])
        part = store.load("latest", only=["ema/*"])
        assert torch.equal(part["ema"]["w"], tensors(1)["ema"]["w"])
        assert not part.get("model")


def test_checkpoints_are_listed_by_their_order(open_store: Open) -> None:
    with open_store() as first:
        for step in (500, 1000):
            first.save(tensors(step), step=step, metrics={"val_loss": 1000.0 - step})
    with open_store() as second:
        second.save(tensors(600), step=600)
        assert [(c.step, c.order.writer) for c in second.checkpoints()] == [(500, 1), (1000, 1), (600, 2)]
        assert second.resolve("best:val_loss").step == 1000
        assert second.resolve().step == 600


def test_one_flipped_bit_is_found_wherever_it_is(open_store: Open, raw: BucketRaw) -> None:
    with open_store() as store:
        store.save(tensors(1), step=1)
        id = store.save(tensors(2), step=2).id
    for key in [key for key in objects(raw) if id in key]:
        good = raw.get(key)
        raw.put(key, good[:-40] + bytes([good[-40] ^ 4]) + good[-39:])
        with open_store(read_only=True) as store:
            assert [damage.key for damage in store.verify().damages] == [key]
            with pytest.warns((cs.FallbackWarning, cs.DamageWarning)):
                assert store.load("latest")["step"] == 1
        raw.put(key, good)
    with open_store(read_only=True) as store:
        assert store.verify().ok
        assert store.load("latest")["step"] == 2


def test_an_object_that_is_missing_is_damage(open_store: Open, raw: BucketRaw) -> None:
    with open_store() as store:
        id = store.save(tensors(1), step=1).id
    key = f"checkpoints/{id}/ema.safetensors"
    raw.client.delete_object(Bucket=raw.bucket, Key=raw.prefix + key)
    with open_store(read_only=True) as store:
        assert [damage.key for damage in store.verify().damages] == [key]
        with pytest.raises(cs.IntegrityError):
            store.load("step:1")


def test_keeping(open_store: Open, raw: BucketRaw) -> None:
    with open_store() as store:
        ids = [store.save(tensors(step), step=step).id for step in (1, 2, 3)]
        store.hold("step:1", "paper")
        with pytest.raises(cs.ExistsError, match="pins"):
            store.hold("step:2", "paper")
        with pytest.raises(cs.ExistsError):
            store.delete("paper")
        assert store.holds() == {"paper": ids[0]}
        store.release("paper")
        store.delete("step:1")
        assert store.undelete(ids[0]).id == ids[0]
        store.delete("step:1")
        store.delete("step:2")
        report = store.prune(grace_s=0)
        assert list(report.reclaimed) == ids[:2]
        assert [c.id for c in store.checkpoints()] == ids[2:]
        assert store.verify().ok
    assert {key for key in objects(raw) if ids[0] in key} == {f"trash/{ids[0]}.json"}


def test_frozen_files_are_borrowed(open_store: Open, raw: BucketRaw) -> None:
    """And stay, when their owner is deleted."""
    training = Training()
    training.model[0].requires_grad_(False)
    training.optimizer = torch.optim.AdamW([p for p in training.model.parameters() if p.requires_grad])
    with open_store() as store:
        first = store.save(training.state, step=1)
        training.step()
        second, expected = store.save(training.state, step=2), training.values()
        frozen = [key for key in objects(raw) if first.id in key and "frozen" in key]
        assert frozen
        assert not [key for key in objects(raw) if second.id in key and "frozen" in key]
        store.delete("step:1")
        store.prune(grace_s=0)
        assert [key for key in objects(raw) if f"checkpoints/{first.id}" in key] == frozen
    with open_store(read_only=True) as store:
        other = Training(seed=1)
        other.optimizer = torch.optim.AdamW(other.model[1:].parameters())
        store.load("latest", into=other.state)
        assert same(other.values(), expected)
        assert store.verify().ok


# --- several at one place ---


def test_the_run_that_was_replaced_finds_out(open_store: Open) -> None:
    older, newer = open_store(), open_store()
    older.save(tensors(1), step=1)
    newer.save(tensors(2), step=2)
    with pytest.raises(cs.StaleWriterError, match="writer 2 has opened"):
        older.save(tensors(3), step=3)
    assert [c.step for c in newer.checkpoints()] == [1, 2]


def test_prune_drops_the_uploads_of_killed_saves(open_store: Open, raw: BucketRaw) -> None:
    """At once, those of a run that was replaced; after the grace, those of the newest, which may still run."""
    with open_store() as old:
        replaced = old.save(tensors(1), step=1).id.replace("-000001-", "-000002-")
    with open_store() as new:
        running = new.save(tensors(2), step=2).id.replace("-000002-", "-000003-")
    began = {}
    for id in (replaced, running):
        key = f"checkpoints/{id}/model.safetensors"
        begun = raw.client.create_multipart_upload(Bucket=raw.bucket, Key=raw.prefix + key)
        where = {"Bucket": raw.bucket, "Key": raw.prefix + key, "UploadId": begun["UploadId"], "PartNumber": 1}
        raw.client.upload_part(**where, Body=b"x" * (5 << 20))
        began[id] = key

    with open_store() as pruner:
        assert list(pruner.prune().uploads) == [began[replaced]]
        # S3 tells the time of an upload to the second.
        time.sleep(1.1)
        assert list(pruner.prune(grace_s=0).uploads) == [began[running]]
    assert raw.client.list_multipart_uploads(Bucket=raw.bucket, Prefix=raw.prefix).get("Uploads", []) == []


# --- options of s3fs ---


@contextmanager
def requests_of(store: Store, event: str = "before-sign") -> Any:
    """The requests that ``store`` makes meanwhile, whoever sends them: (operation, headers in lower case).

    "before-send" shows what signing adds, and only those that the event loop sends.
    """
    assert isinstance(store._storage, S3Storage)
    events = store._storage._client._fs.s3.meta.events
    sent: list[tuple[str, dict[str, str]]] = []

    def note(request: Any, event_name: str, **_: Any) -> None:
        headers = {
            name.lower(): value.decode() if isinstance(value, bytes) else str(value)
            for name, value in request.headers.items()
        }
        sent.append((event_name.rpartition(".")[2], headers))

    events.register(f"{event}.s3", note)
    try:
        yield sent
    finally:
        events.unregister(f"{event}.s3", note)


def everything(store: Store) -> None:
    """Small and large objects written, copied, read, listed and deleted."""
    state = tensors(1) | {"model": {"w": torch.randn(9 << 20)}}
    saved = store.save(state, step=1)
    assert torch.equal(store.load("latest")["model"]["w"], state["model"]["w"])
    storage, key = store._storage, f"checkpoints/{saved.id}/ema.safetensors"
    data = storage.read(key, limit=1 << 20)
    storage.create(f"checkpoints/{saved.id}/tmp-heal", data)
    storage.replace(key, by=f"checkpoints/{saved.id}/tmp-heal")
    assert store.verify().ok
    store.delete("latest")
    store.prune(grace_s=0)


def test_encryption_is_asked_for_where_it_can_be(open_store: Open) -> None:
    """The requests that make an object carry it, and those that don't know it are spared."""
    extra = {"ServerSideEncryption": "AES256"}
    with open_store(also={"s3_additional_kwargs": extra}) as store, requests_of(store) as sent:
        everything(store)

    asked = {name for name, headers in sent if headers.get("x-amz-server-side-encryption") == "AES256"}
    plain = {name for name, headers in sent if "x-amz-server-side-encryption" not in headers}
    assert asked == {"PutObject", "CreateMultipartUpload", "CopyObject"}
    assert plain >= {"GetObject", "HeadObject", "UploadPart", "CompleteMultipartUpload", "ListObjectsV2"}
    assert not asked & plain


def test_a_key_of_one_s_own_is_given_wherever_it_is_needed(open_store: Open, raw: BucketRaw) -> None:
    """Nobody reads without it, nor with another one."""
    extra = {"SSECustomerAlgorithm": "AES256", "SSECustomerKey": "k" * 32}
    also = {"s3_additional_kwargs": extra}
    with open_store(also=also) as store, requests_of(store) as sent:
        everything(store)
        store.save(tensors(2), step=2)
    header = "x-amz-server-side-encryption-customer-key"
    keyed = {name for name, headers in sent if header in headers}
    assert keyed >= {"PutObject", "CreateMultipartUpload", "UploadPart", "CopyObject", "GetObject", "HeadObject"}

    with open_store(read_only=True, also=also) as store:
        assert store.load("latest")["step"] == 2
    with open_store(read_only=True) as store, pytest.raises(cs.CheckpointError) as caught:
        store.load("latest")
    assert "k" * 32 not in str(caught.value)


def test_whoever_asks_pays(open_store: Open) -> None:
    with open_store(also={"requester_pays": True}) as store, requests_of(store) as sent:
        everything(store)

    unpaid = {name for name, headers in sent if headers.get("x-amz-request-payer") != "requester"}
    assert len(sent) > 20
    assert unpaid == set()


def test_a_session_token_is_sent_and_never_told(open_store: Open) -> None:
    """This server knows none, so that it refuses; what it was sent is seen before."""
    with (
        open_store(also={"token": "geheim-4711"}) as store,
        requests_of(store, "before-send") as sent,
        pytest.raises(cs.CheckpointError) as caught,
    ):
        store.save(tensors(1), step=1)

    assert {headers.get("x-amz-security-token") for _, headers in sent} == {"geheim-4711"}
    assert sent
    assert "geheim" not in str(caught.value)


def test_anybody_may_read_what_is_public(server: Seaweed) -> None:
    place = f"s3://{server.bucket(PUBLIC)}/runs"
    anonymous = {"anon": True} | {k: v for k, v in server.options.items() if k not in ("key", "secret")}
    with cs.open(place, storage_options=server.options) as store:
        store.save(tensors(1), step=1)

    with cs.open(place, storage_options=anonymous, read_only=True) as store:
        assert store.load("latest")["step"] == 1
        assert store.verify().ok
    with cs.open(place, storage_options=anonymous) as store, pytest.raises(cs.UnavailableError, match="credentials"):
        store.delete("latest")


def test_options_that_s3fs_does_not_take_are_told(url: str) -> None:
    with pytest.raises(cs.StorageError, match="'kee'"):
        cs.open(url, storage_options={"kee": "x"}).checkpoints()
    for options in ({"config_kwargs": 5}, {"key": "a", "username": "b"}):
        with pytest.raises(cs.StorageError, match="storage_options that s3fs doesn't take"):
            cs.open(url, storage_options=options)
