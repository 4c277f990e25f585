"""The bucket in memory does what a real one does: the same contract holds on both."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from ckptstore.errors import IntegrityError
from ckptstore.storage import Storage
from ckptstore.storage.s3 import S3Storage
from tests.s3.bucket import MemoryBucket, Stored
from tests.s3.cases import BUCKET, PREFIX
from tests.s3.wire import FaultyServer
from tests.storage.contract import StorageContract


class MemoryRaw:
    """The objects below the prefix, past the library and the server."""

    def __init__(self, bucket: MemoryBucket) -> None:
        self.bucket = bucket

    def get(self, key: str) -> bytes:
        return self.bucket.objects[f"{PREFIX}/{key}"].data

    def put(self, key: str, data: bytes) -> None:
        self.bucket.objects[f"{PREFIX}/{key}"] = Stored(data, f'"{hash(data)}"', {})

    def keys(self) -> list[str]:
        return sorted(key[len(PREFIX) + 1 :] for key in self.bucket.objects if key.startswith(f"{PREFIX}/"))


class TestMemoryBucket(StorageContract):
    """With listings of three keys a page, so that there are many."""

    rounds = 2

    @pytest.fixture
    def bucket(self) -> MemoryBucket:
        return MemoryBucket(BUCKET, page=3)

    @pytest.fixture
    def reopen(self, bucket: MemoryBucket) -> Iterator[Callable[..., S3Storage]]:
        with FaultyServer(bucket) as server:
            options = {
                "key": "ci-access",
                "secret": "ci-secret",
                "endpoint_url": f"http://127.0.0.1:{server.port}",
                "client_kwargs": {"region_name": "us-east-1"},
            }
            yield lambda **how: S3Storage(BUCKET, PREFIX, options, **how)

    @pytest.fixture
    def storage(self, reopen: Callable[..., S3Storage]) -> S3Storage:
        return reopen()

    @pytest.fixture
    def raw(self, bucket: MemoryBucket) -> MemoryRaw:
        return MemoryRaw(bucket)

    def test_open_reader_survives_deletion(self, storage: Storage, raw: MemoryRaw) -> None:  # type: ignore[override]
        """It can't, as on a real server."""
        raw.put("a", b"x" * 5000)
        reader = storage.open_reader("a")
        storage.delete(["a"])

        with pytest.raises(IntegrityError, match="removed while it was read"):
            reader.read_into(0, memoryview(bytearray(5000)))

    def test_the_server_s_abilities_are_found_out(self, storage: Storage) -> None:
        storage.create("store.json", b"x" * 300)

        storage.probe("store.json", b"x" * 300)

        assert storage.capabilities.exclusive_create
        assert storage.capabilities.checks_writes
