"""A third server's opinion: Ceph's gateway, where its packages are installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import ckptstore as cs
from benchmarks.ceph import Ceph, installed
from ckptstore.errors import IntegrityError
from ckptstore.storage import Storage
from ckptstore.storage.s3 import S3Storage
from tests.s3.test_contract import BucketRaw
from tests.storage.contract import StorageContract

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(not installed(), reason="there is no Ceph: apt-get install ceph-mon ceph-osd radosgw"),
]


@pytest.fixture(scope="module")
def ceph(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ceph]:
    server = Ceph(tmp_path_factory.mktemp("ceph") / "server")
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def ceph_bucket(ceph: Ceph) -> str:
    return ceph.bucket()


class TestCeph(StorageContract):
    @pytest.fixture
    def raw(self, ceph: Ceph, ceph_bucket: str, prefix: str) -> BucketRaw:
        return BucketRaw(ceph.client(), ceph_bucket, f"{prefix}/")

    @pytest.fixture
    def storage(self, ceph: Ceph, ceph_bucket: str, prefix: str) -> S3Storage:
        return S3Storage(ceph_bucket, prefix, ceph.options)

    @pytest.fixture
    def reopen(self, ceph: Ceph, ceph_bucket: str, prefix: str) -> Callable[..., S3Storage]:
        return lambda **how: S3Storage(ceph_bucket, prefix, ceph.options, **how)

    def test_open_reader_survives_deletion(self, storage: Storage, raw: Any) -> None:
        """It can't, and says so."""
        raw.put("a", b"x" * 5000)
        reader = storage.open_reader("a")
        raw.put("a", b"y" * 5000)
        with pytest.raises(IntegrityError, match="while it was read"):
            reader.read_into(0, memoryview(bytearray(5000)))


def test_the_life_of_a_store(ceph: Ceph, ceph_bucket: str, prefix: str) -> None:
    state = {"model": {"weight": torch.arange(12 << 20, dtype=torch.float32)}, "n": 1}
    with cs.open(f"s3://{ceph_bucket}/{prefix}", storage_options=ceph.options) as store:
        for step in range(3):
            store.save(state | {"n": step}, step=step)
        assert store._storage.capabilities.exclusive_create
        assert store.load()["n"] == 2
        assert torch.equal(store.load(only=["model/*"])["model"]["weight"], state["model"]["weight"])
        store.delete("step:0")
        assert store.prune(grace_s=0).reclaimed
        assert store.verify().ok
        assert store._storage.uploads() == []
