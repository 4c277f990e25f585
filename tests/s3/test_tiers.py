"""Two places for one store, of which one or both are buckets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ckptstore as cs
from ckptstore.store import Store
from tests.s3.seaweed import Seaweed
from tests.s3.test_contract import BucketRaw
from tests.tiers.places import data_file, flip, holds, lose, objects, state, steps

Opener = Callable[..., Store]


def large(step: int) -> dict[str, Any]:
    """More than one part of an upload."""
    return {"model": {"weight": torch.arange(6 << 20, dtype=torch.float32) + step}, "n": step}


@pytest.fixture
def bucket_url(bucket: str, prefix: str) -> str:
    return f"s3://{bucket}/{prefix}"


@pytest.fixture
def raw(server: Seaweed, bucket: str, prefix: str) -> BucketRaw:
    return BucketRaw(server.client(), bucket, f"{prefix}/")


@pytest.fixture
def tiered(server: Seaweed, bucket_url: str, tmp_path: Path) -> Opener:
    """A folder here, its backup in the bucket."""
    return lambda **how: cs.open(tmp_path / "ssd", backup=bucket_url, backup_options=server.options, **how)


def test_a_folder_with_its_backup_in_a_bucket(
    tiered: Opener, server: Seaweed, bucket_url: str, raw: BucketRaw, tmp_path: Path
) -> None:
    with tiered() as store:
        for step in range(3):
            store.save(large(step), step=step)
        (lag,) = store.lags()
        assert (lag.place, lag.copied + lag.behind) == (bucket_url, 3)

    found = raw.keys()
    there = {key: raw.get(key) for key in found if key.startswith(("commits/", "checkpoints/"))}
    assert there == objects(tmp_path / "ssd", "commits") | objects(tmp_path / "ssd", "checkpoints")
    with cs.open(bucket_url, storage_options=server.options, read_only=True) as copy:
        assert copy.verify().ok
        assert copy.load()["n"] == 2


def test_what_the_server_checks_is_not_read_back(tiered: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    def prove(*args: object) -> None:
        raise AssertionError("read back")

    monkeypatch.setattr("ckptstore.maintenance.transfer.Carrier.prove", prove)
    with tiered() as store:
        store.save(large(0), step=0, durable="backup")


def test_a_lost_folder_is_resumed_from_the_bucket(tiered: Opener, tmp_path: Path) -> None:
    with tiered() as store:
        for step in range(2):
            store.save(state(step), step=step)
    lose(tmp_path / "ssd")

    with tiered() as store:
        assert holds(store, "latest", 1)
        assert store.save(state(2), step=2).order.writer == 2

    assert steps(tmp_path / "ssd") == [0, 1, 2]


def test_a_damaged_block_comes_from_the_bucket(tiered: Opener, tmp_path: Path) -> None:
    with tiered() as store:
        saved = store.save(large(0), step=0)
    flip(data_file(tmp_path / "ssd", saved.id), 20 << 20)

    repaired = pytest.warns(cs.DamageWarning, match="it is repaired")
    with tiered() as store, repaired:
        assert torch.equal(store.load()["model"]["weight"], large(0)["model"]["weight"])
    with cs.open(tmp_path / "ssd") as store:
        assert store.verify().ok


def test_a_damaged_object_in_the_bucket_is_repaired_from_the_folder(
    server: Seaweed, bucket_url: str, raw: BucketRaw, tiered: Opener, tmp_path: Path
) -> None:
    """The roles swapped: replaced by a copy that the server makes, of an object that was read back."""
    with tiered() as store:
        saved = store.save(large(0), step=0)
    key = f"checkpoints/{saved.id}/{data_file(tmp_path / 'ssd', saved.id).name}"
    good = raw.get(key)
    bad = bytearray(good)
    bad[20 << 20] ^= 1
    raw.put(key, bytes(bad))
    raw.put(f"commits/{saved.id}.json", b"{}")

    with cs.open(bucket_url, storage_options=server.options, backup=tmp_path / "ssd") as store:
        report = store.verify(repair=True)
        assert report.ok
        assert len(report.repaired) >= 1
        assert store.verify(repair=True).ok

    assert raw.get(key) == good
    found = raw.keys()
    assert not [key for key in found if "tmp-" in key]
    with cs.open(bucket_url, storage_options=server.options) as store:
        assert store.verify().ok


def test_from_bucket_to_bucket_and_back(
    server: Seaweed, bucket_url: str, bucket: str, prefix: str, tmp_path: Path
) -> None:
    with cs.open(bucket_url, storage_options=server.options) as store:
        for step in range(3):
            store.save(large(step), step=step)
        report = store.copy(f"s3://{bucket}/{prefix}-other", ["latest", "step:0"], target_options=server.options)
        assert [c.step for c in report.checkpoints] == [0, 2]
        again = store.copy(f"s3://{bucket}/{prefix}-other", target_options=server.options)
        assert len(again.found) == 2

    with cs.open(f"s3://{bucket}/{prefix}-other", storage_options=server.options, read_only=True) as other:
        assert other.verify().ok
        assert other.copy(tmp_path / "back").ok
    assert steps(tmp_path / "back") == [0, 1, 2]


def test_small_disk_before_a_bucket(tiered: Opener, tmp_path: Path) -> None:
    with tiered(keep=cs.last(1)) as store:
        for step in range(4):
            store.save(state(step), step=step)

    assert steps(tmp_path / "ssd") == [3]
    with tiered(keep=cs.last(1)) as store:
        assert [c.step for c in store.checkpoints()] == [0, 1, 2, 3]
        assert holds(store, "step:0", 0)


def test_a_run_that_was_replaced_elsewhere_notices_by_the_bucket(
    server: Seaweed, bucket_url: str, tmp_path: Path
) -> None:
    """Two machines that share nothing but the backup."""
    options = {"backup": bucket_url, "backup_options": server.options}
    old = cs.open(tmp_path / "here", **options)
    old.save(state(0), step=0, durable="backup")
    with cs.open(tmp_path / "there", **options) as new:
        assert holds(new, "latest", 0)
        new.save(state(1), step=1, durable="backup")

        with pytest.raises(cs.StaleWriterError):
            old.save(state(2), step=2)
        with pytest.raises(cs.StaleWriterError):
            old.prune()
        old.close()
        assert new.resolve().step == 1
