"""How long a server is tried: briefly where nobody ever answered, long where somebody did."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import pytest
from botocore.exceptions import EndpointConnectionError

from ckptstore.errors import NotFoundError, StorageError, UnavailableError
from ckptstore.storage.s3 import S3Storage, client
from ckptstore.storage.s3.client import S3Client
from ckptstore.storage.s3.failures import without_secrets
from tests.s3.seaweed import Seaweed


@pytest.fixture
def tries(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The methods that were called, each as often as it was tried."""
    called: list[str] = []
    send = S3Client._call

    async def noted(self: S3Client, method: str, /, **parameters: Any) -> dict[str, Any]:
        called.append(method)
        return await send(self, method, **parameters)

    monkeypatch.setattr(S3Client, "_call", noted)
    return called


@pytest.fixture
def nowhere() -> Iterator[str]:
    """An endpoint that refuses: bound, and not listening."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{reserved.getsockname()[1]}"


def test_where_nobody_ever_answered_it_is_over_soon(
    server: Seaweed, nowhere: str, tries: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "REACH_S", 0.0)
    storage = S3Storage("bucket", "runs", server.options | {"endpoint_url": nowhere})

    with pytest.raises(UnavailableError, match="Could not connect") as caught:
        storage.list("")

    assert tries == ["list_objects_v2"]
    assert caught.value.transient
    assert caught.value.outcome == "failed"


@pytest.mark.parametrize("answer", ["good", "no such key"])
def test_whoever_answered_is_waited_for(
    server: Seaweed, bucket: str, prefix: str, answer: str, tries: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the answer was. Here connections are refused twice, as while a server starts anew."""
    monkeypatch.setattr(client, "REACH_S", 0.0)
    storage = S3Storage(bucket, prefix, server.options)
    if answer == "good":
        storage.list("")
    else:
        with pytest.raises(NotFoundError):
            storage.size("a")
    asked = len(tries)
    noted, refused = S3Client._call, []

    async def refusing(self: S3Client, method: str, /, **parameters: Any) -> dict[str, Any]:
        if len(refused) < 2:
            refused.append(method)
            raise EndpointConnectionError(endpoint_url=server.endpoint)
        return await noted(self, method, **parameters)

    monkeypatch.setattr(S3Client, "_call", refusing)
    assert storage.list("") == []

    assert len(refused) == 2
    assert len(tries) == asked + 1


def test_a_request_that_can_not_even_be_made_is_tried_once(server: Seaweed, tries: list[str]) -> None:
    """A password in the endpoint, which is not repeated."""
    endpoint = server.endpoint.replace("://", "://me:geheim@")
    storage = S3Storage("bucket", "runs", server.options | {"endpoint_url": endpoint})

    with pytest.raises(StorageError) as caught:
        storage.list("")

    assert tries == ["list_objects_v2"]
    assert "geheim" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("at http://me:pw@host:1/x?y=z (us-east-1)", "at http://host:1/x (us-east-1)"),
        ('to "https://host/b?list-type=2&token=pw"', 'to "https://host/b"'),
        ("mail me@host?", "mail me@host?"),
        ("s3://bucket/a@b", "s3://bucket/a@b"),
    ],
)
def test_urls_are_told_without_their_secrets(text: str, said: str) -> None:
    assert without_secrets(text) == said
