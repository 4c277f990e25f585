"""A second server, in this process's memory, with other habits. It checks neither credentials nor checksums."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("moto", reason="there is no moto: pip install 'moto[s3]' flask flask-cors")
pytest.importorskip("flask_cors", reason="there is no flask: pip install flask flask-cors")

from botocore.config import Config
from botocore.session import get_session
from moto.server import ThreadedMotoServer

import ckptstore as cs
from ckptstore.errors import IntegrityError
from ckptstore.storage import Storage
from ckptstore.storage.s3 import S3Storage
from tests.s3.test_contract import BucketRaw
from tests.s3.test_machine import play
from tests.storage.contract import StorageContract

BUCKET = "bucket"


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """Of a server for this module's tests."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    yield url
    server.stop()


@pytest.fixture(scope="module")
def client(endpoint: str) -> Any:
    """A plain botocore client, past the code under test; there is ``BUCKET``."""
    client = get_session().create_client(
        "s3",
        endpoint_url=endpoint,
        aws_access_key_id="any",
        aws_secret_access_key="any",
        region_name="us-east-1",
        config=Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 1}),
    )
    client.create_bucket(Bucket=BUCKET)
    return client


@pytest.fixture
def options(endpoint: str, client: Any) -> dict[str, Any]:
    return {
        "key": "any",
        "secret": "any",
        "endpoint_url": endpoint,
        "client_kwargs": {"region_name": "us-east-1"},
    }


class TestMoto(StorageContract):
    rounds = 5

    @pytest.fixture
    def raw(self, client: Any, prefix: str) -> BucketRaw:
        return BucketRaw(client, BUCKET, f"{prefix}/")

    @pytest.fixture
    def storage(self, options: dict[str, Any], prefix: str) -> S3Storage:
        return S3Storage(BUCKET, prefix, options)

    @pytest.fixture
    def reopen(self, options: dict[str, Any], prefix: str) -> Callable[..., S3Storage]:
        return lambda **how: S3Storage(BUCKET, prefix, options, **how)

    def test_open_reader_survives_deletion(self, storage: Storage, raw: Any) -> None:
        """It can't; that is said, and no other object's bytes are taken for it."""
        for change in (
            lambda: raw.client.delete_object(Bucket=raw.bucket, Key=raw.prefix + "a"),
            lambda: raw.put("a", b"y" * 5000),
        ):
            raw.put("a", b"x" * 5000)
            reader = storage.open_reader("a")
            change()
            with pytest.raises(IntegrityError, match="while it was read"):
                reader.read_into(0, memoryview(bytearray(5000)))

    def test_what_it_does_not_check_is_found_out(self, storage: Storage) -> None:
        """It refuses what exists, and takes what was damaged on its way."""
        storage.create("store.json", b"x" * 300)

        storage.probe("store.json", b"x" * 300)

        assert storage.capabilities.exclusive_create
        assert not storage.capabilities.checks_writes
        assert storage.read("store.json", limit=300) == b"x" * 300


def test_a_store(options: dict[str, Any], prefix: str) -> None:
    with cs.open(f"s3://{BUCKET}/{prefix}", storage_options=options) as store:
        for step in (1, 2):
            store.save({"x": step}, step=step)
        store.delete("step:1")
        assert len(store.prune(grace_s=0).reclaimed) == 1
        assert store.load("latest") == {"x": 2}
        assert store.verify().ok


@pytest.mark.timeout(1800)
def test_any_history(endpoint: str, client: Any, monkeypatch: pytest.MonkeyPatch, full: bool) -> None:
    access = {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in (access | {"AWS_ENDPOINT_URL": endpoint}).items():
        monkeypatch.setenv(name, value)
    play(client, BUCKET, *((20, 25) if full else (3, 6)))
