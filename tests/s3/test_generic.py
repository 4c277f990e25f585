"""A bucket through fsspec alone, as any other remote file system: s3fs stands in for those without a server here."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ckptstore.storage.generic import GenericStorage
from tests.s3.seaweed import Seaweed
from tests.s3.test_contract import BucketRaw
from tests.storage.contract import StorageContract
from tests.storage.generic.rig import BucketContract, VanishingContract


@pytest.mark.full
class TestGenericBucket(VanishingContract, BucketContract, StorageContract):
    rounds = 2

    @pytest.fixture
    def raw(self, server: Seaweed, bucket: str, prefix: str) -> BucketRaw:
        return BucketRaw(server.client(), bucket, f"{prefix}/")

    @pytest.fixture
    def reopen(self, server: Seaweed, bucket: str, prefix: str) -> Callable[..., GenericStorage]:
        return lambda **how: GenericStorage("s3", f"{bucket}/{prefix}", server.options, **how)

    @pytest.fixture
    def storage(self, reopen: Callable[..., GenericStorage]) -> GenericStorage:
        return reopen()

    @pytest.fixture
    def elsewhere(self, server: Seaweed) -> GenericStorage:
        return GenericStorage("s3", "nobodys-bucket/runs", server.options)
