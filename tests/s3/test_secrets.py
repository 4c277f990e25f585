"""Credentials stay where they were given: in no message, no log, no traceback and no object."""

from __future__ import annotations

import io
import logging
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import ckptstore
from ckptstore.errors import CheckpointError
from ckptstore.storage.s3 import S3Storage
from ckptstore.storage.s3.client import S3Client
from tests.s3.bucket import MemoryBucket, Stored, error
from tests.s3.wire import Exchange, FaultyServer

CANARIES = ["CANARYKEY0123456789", "CANARYSECRET/abc+def", "CANARYTOKEN=="]
KEY, SECRET, TOKEN = CANARIES
USER = "CANARYUSER:CANARYPASSWORD"


def options(endpoint: str, **more: Any) -> dict[str, Any]:
    return {
        "key": KEY,
        "secret": SECRET,
        "token": TOKEN,
        "endpoint_url": endpoint,
        "client_kwargs": {"region_name": "eu-test-7"},
        "deadline_s": 0.05,
        **more,
    }


@contextmanager
def logged() -> Iterator[io.StringIO]:
    """All that ckptstore logs."""
    text = io.StringIO()
    handler, logger = logging.StreamHandler(text), logging.getLogger("ckptstore")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        yield text
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def tell_tales(exchange: Exchange) -> None:
    """A server that repeats what it was sent."""
    headers = exchange.request.headers
    told = f"{headers.get('authorization')} {headers.get('x-amz-security-token')} {KEY} {TOKEN}"
    exchange.answer(error(403, "InvalidAccessKeyId", told))


def refused(exchange: Exchange) -> None:
    exchange.answer(error(403, "AccessDenied"))


def broken(exchange: Exchange) -> None:
    exchange.answer(error(500, "InternalError"))


def reset(exchange: Exchange) -> None:
    exchange.reset()


Doing = Callable[[ckptstore.Store], object]
OPERATIONS: list[Doing] = [
    lambda store: store.save({"w": torch.ones(3)}, step=2),
    lambda store: store.save({"w": torch.ones(3)}, step=2, mode="async").result(),
    lambda store: store.load(),
    lambda store: store.checkpoints(),
    lambda store: store.prune(),
    lambda store: store.verify(),
    lambda store: store.delete("latest"),
]


def everything_said(store_of: Callable[[], ckptstore.Store]) -> str:
    """Messages, reprs, tracebacks and logs of every operation, each of which fails."""
    said = []
    with logged() as log:
        for operate in OPERATIONS:
            with pytest.raises(CheckpointError) as caught:
                operate(store_of())
            raised = caught.value
            said += [str(raised), repr(raised), *map(str, vars(raised).values()), *traceback.format_exception(raised)]
    return "\n".join([*said, log.getvalue()])


def assert_no_canary(text: str) -> None:
    for canary in [*CANARIES, *USER.split(":"), "CANARY"]:
        assert canary not in text


@pytest.mark.parametrize("fault", [tell_tales, refused, broken, reset], ids=lambda fault: fault.__name__)
def test_failing_requests_tell_no_secret(fault: Callable[[Exchange], None]) -> None:
    """Nor does a server's message that repeats them. Where it failed is told: endpoint and region."""
    with FaultyServer(MemoryBucket("bucket")) as server:
        endpoint = f"http://127.0.0.1:{server.port}"
        server.arm(lambda number, request: fault)
        said = everything_said(lambda: ckptstore.open("s3://bucket/a", storage_options=options(endpoint)))
        assert server.fired

    assert_no_canary(said)
    assert said.count(f"at {endpoint} (eu-test-7)") >= len(OPERATIONS)


def test_secrets_of_the_environment_are_none_either(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_SESSION_TOKEN", TOKEN)
    with FaultyServer(MemoryBucket("bucket")) as server:
        endpoint = f"http://127.0.0.1:{server.port}"
        server.arm(lambda number, request: tell_tales)
        given = options(endpoint)
        for name in ("key", "secret", "token"):
            del given[name]
        said = everything_said(lambda: ckptstore.open("s3://bucket/a", storage_options=given))
        assert KEY in server.fired[0].headers["authorization"]

    assert_no_canary(said)


def test_wrong_places_tell_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody listens, no such host, a user in the endpoint's URL, no such bucket."""
    monkeypatch.setattr("ckptstore.storage.s3.client.REACH_S", 0.5)
    with FaultyServer(MemoryBucket("bucket")) as server:
        endpoints = ["http://127.0.0.1:1", "http://nowhere.invalid:80", f"http://{USER}@127.0.0.1:1"]
        for place in [*endpoints, f"http://127.0.0.1:{server.port}"]:
            said = everything_said(lambda: ckptstore.open("s3://missing/a", storage_options=options(place)))  # noqa: B023
            assert_no_canary(said)
            assert f"{place.replace(USER + '@', '')} (eu-test-7)" in said


@pytest.mark.parametrize(
    "wrong",
    [
        {"nonsense": SECRET},
        {"client_kwargs": {"nonsense": SECRET}},
        {"config_kwargs": {"nonsense": SECRET}},
        {"config_kwargs": SECRET},
        {"client_kwargs": {"aws_secret_access_key": SECRET, "verify": TOKEN}},
        {"endpoint_url": f"no url {SECRET}"},
        {"deadline_s": SECRET},
    ],
    ids=str,
)
def test_wrong_options_tell_no_secret(wrong: dict[str, Any]) -> None:
    """Also where the secret stands in the wrong place."""
    given = options("http://127.0.0.1:1") | wrong
    assert_no_canary(everything_said(lambda: ckptstore.open("s3://bucket/a", storage_options=given)))


def test_no_object_holds_a_secret() -> None:
    """Nor its metadata, nor the store's repr."""
    bucket = MemoryBucket("bucket")
    with FaultyServer(bucket) as server, logged() as log:
        given = options(f"http://127.0.0.1:{server.port}", deadline_s=30)
        with ckptstore.open("s3://bucket/a", storage_options=given) as store:
            for step in (1, 2):
                store.save({"w": torch.ones(3)}, step=step)
            store.hold("latest", "precious")
            store.delete("step:1")
            store.prune(grace_s=0)
            shown = repr(store) + store.url + repr(store.checkpoints())

    stored = [*bucket.objects, *(str(stored) for stored in bucket.objects.values())]
    assert len(stored) >= 10
    assert_no_canary("\n".join([shown, log.getvalue(), *stored]))


@pytest.mark.parametrize("fault", [tell_tales, refused, broken, reset], ids=lambda fault: fault.__name__)
def test_large_reads_tell_no_secret_either(fault: Callable[[Exchange], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Which are signed here and sent by the reading thread."""
    signed: list[Any] = []
    sign = S3Client.signed

    def noted(self: S3Client, path: str) -> Any:
        signed.append(sign(self, path))
        return signed[-1]

    monkeypatch.setattr(S3Client, "signed", noted)
    data = bytes(1 << 20)
    bucket = MemoryBucket("bucket")
    bucket.objects["a/x"] = Stored(data, '"x"', {})
    with FaultyServer(bucket) as server, logged() as log:
        storage = S3Storage("bucket", "a", options(f"http://127.0.0.1:{server.port}"))
        server.arm(lambda number, request: fault)
        with pytest.raises(CheckpointError) as caught:
            storage.open_reader("x", size=len(data)).read_into(0, memoryview(bytearray(data)))
        raised = caught.value
        said = [str(raised), repr(raised), *map(str, vars(raised).values()), *traceback.format_exception(raised)]
        assert len(server.fired) >= 2, "it was not tried in both ways"
        assert KEY in server.fired[0].headers["authorization"]

    assert signed[0].headers["X-Amz-Security-Token"] == TOKEN
    assert_no_canary("\n".join([*said, repr(signed), log.getvalue()]))
