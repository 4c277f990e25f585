"""A bucket does what every storage does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from ckptstore.errors import IntegrityError
from ckptstore.storage import Storage
from ckptstore.storage.s3 import S3Storage
from tests.s3.seaweed import Seaweed
from tests.storage.contract import StorageContract


class BucketRaw:
    """The objects below ``prefix``, by a client of its own."""

    def __init__(self, client: Any, bucket: str, prefix: str) -> None:
        self.client, self.bucket, self.prefix = client, bucket, prefix

    def get(self, key: str) -> bytes:
        data: bytes = self.client.get_object(Bucket=self.bucket, Key=self.prefix + key)["Body"].read()
        return data

    def put(self, key: str, data: bytes) -> None:
        self.client.put_object(Bucket=self.bucket, Key=self.prefix + key, Body=data)

    def keys(self) -> list[str]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self.prefix)
        return sorted(item["Key"][len(self.prefix) :] for page in pages for item in page.get("Contents", []))


class TestS3(StorageContract):
    rounds = 1

    @pytest.fixture
    def raw(self, server: Seaweed, bucket: str, prefix: str) -> BucketRaw:
        return BucketRaw(server.client(), bucket, f"{prefix}/")

    @pytest.fixture
    def storage(self, server: Seaweed, bucket: str, prefix: str) -> S3Storage:
        return S3Storage(bucket, prefix, server.options)

    @pytest.fixture
    def reopen(self, server: Seaweed, bucket: str, prefix: str) -> Callable[..., S3Storage]:
        return lambda **how: S3Storage(bucket, prefix, server.options, **how)

    def test_open_reader_survives_deletion(self, storage: Storage, raw: Any) -> None:
        """It can't: there is nothing left to read. Then that is said, and no other object's bytes are taken for it."""
        for change in (
            lambda: raw.client.delete_object(Bucket=raw.bucket, Key=raw.prefix + "a"),
            lambda: raw.put("a", b"y" * 5000),
        ):
            raw.put("a", b"x" * 5000)
            reader = storage.open_reader("a")
            change()
            with pytest.raises(IntegrityError, match="while it was read"):
                reader.read_into(0, memoryview(bytearray(5000)))

    def test_the_server_s_abilities_are_found_out(self, storage: Storage) -> None:
        """This one refuses what exists; what it does with a wrong checksum it is asked, too."""
        storage.create("store.json", b"x" * 300)

        storage.probe("store.json", b"x" * 300)

        assert storage.capabilities.exclusive_create
        assert storage.capabilities.checks_writes

    def test_unfinished_uploads_are_listed(self, storage: Storage) -> None:
        piece = memoryview(bytes(6 << 20))
        writer = storage.open_writer("checkpoints/a/x.blocks")
        for _ in range(2):
            writer.write(writer.reserve(len(piece)), piece)

        assert [upload.key for upload in storage.uploads()] == ["checkpoints/a/x.blocks"]
        writer.abort()
        assert storage.uploads() == []
