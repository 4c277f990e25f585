"""Parts on connections of the writing threads: used where they may be, and never a reason for anything to fail."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from tenacity import wait_fixed

import ckptstore as cs
from ckptstore.errors import StorageError
from ckptstore.storage.s3 import S3Storage
from ckptstore.storage.s3.client import S3Client
from ckptstore.storage.s3.direct import Direct
from tests.s3.bucket import MemoryBucket
from tests.s3.kinds import KINDS, Kind
from tests.s3.seaweed import Seaweed
from tests.s3.test_direct import large, options, usual  # noqa: F401 - a fixture
from tests.s3.wire import Exchange, FaultyServer, Request, Response

PART = 6 << 20
DATA = random.Random(8).randbytes(3 * PART + 1000)


class Sends:
    """What ``Direct`` was asked to send, in bytes, and whether it is certain to have arrived."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.all: list[tuple[int, bool]] = []
        send = Direct.send

        def noted(own: Direct, signed: Any, pieces: Sequence[memoryview]) -> Any:
            answer = send(own, signed, pieces)
            self.all.append((sum(map(len, pieces)), answer is not None))
            return answer

        patch.setattr(Direct, "send", noted)


@pytest.fixture
def sends(monkeypatch: pytest.MonkeyPatch) -> Sends:
    return Sends(monkeypatch)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of the parts that the event loop sent."""
    numbers: list[int] = []
    call = S3Client._call

    async def noted(self: S3Client, method: str, /, **parameters: Any) -> dict[str, Any]:
        if method == "upload_part":
            numbers.append(parameters["PartNumber"])
        return await call(self, method, **parameters)

    monkeypatch.setattr(S3Client, "_call", noted)
    return numbers


@pytest.fixture
def memory() -> Iterator[FaultyServer]:
    with FaultyServer(MemoryBucket("bucket")) as server:
        yield server


def storage(server: FaultyServer, **more: Any) -> S3Storage:
    made = S3Storage("bucket", "runs", options(server, **more))
    made._client._tries.wait = wait_fixed(0.01)
    return made


def write(made: S3Storage, key: str = "a") -> None:
    """Put ``DATA`` there in four parts, the last of which is small."""
    writer = made.open_writer(key)
    try:
        for begin in range(0, len(DATA), PART):
            piece = memoryview(DATA)[begin : begin + PART]
            writer.write(writer.reserve(len(piece)), piece)
        assert writer.finish() == len(DATA)
    finally:
        writer.abort()


def there(server: FaultyServer, key: str = "runs/a") -> bytes:
    assert isinstance(server.handler, MemoryBucket)
    return server.handler.objects[key].data


def uploads(server: FaultyServer) -> int:
    assert isinstance(server.handler, MemoryBucket)
    return len(server.handler.uploads)


def test_blocks_are_sent_so_to_a_real_server(
    server: Seaweed, bucket: str, prefix: str, sends: Sends, slow: list[int]
) -> None:
    """All but what is small."""
    with cs.open(f"s3://{bucket}/{prefix}", storage_options=server.options) as store:
        store.save(large(), step=1)
        assert torch.equal(store.load()["w"], large()["w"])
    assert len(sends.all) >= 2
    assert all(arrived for _, arrived in sends.all)
    assert not slow


def test_each_part_is_sent_once_signed_and_with_its_checksum(
    memory: FaultyServer, sends: Sends, slow: list[int]
) -> None:
    write(storage(memory))

    assert there(memory) == DATA
    assert sends.all == [(PART, True)] * 3
    assert slow == [4], "what is small is left to the event loop"
    parts = [request for request in memory.requests if request.operation == "Part"]
    assert sorted(request.query["partNumber"] for request in parts) == ["1", "2", "3", "4"]
    for request in parts:
        assert "ci-access" in request.headers["authorization"]
        assert request.headers["x-amz-checksum-crc32"]
        assert request.headers["x-amz-content-sha256"] == "UNSIGNED-PAYLOAD"
        assert "expect" not in request.headers or request.query["partNumber"] == "4"


def test_what_all_requests_carry_is_sent_too(memory: FaultyServer, sends: Sends) -> None:
    extra = {"SSECustomerKey": "k" * 32, "SSECustomerAlgorithm": "AES256"}
    write(storage(memory, s3_additional_kwargs=extra, requester_pays=True, token="a session's"))

    assert [arrived for _, arrived in sends.all] == [True] * 3
    for sent in (request for request in memory.requests if request.operation == "Part"):
        assert sent.headers["x-amz-server-side-encryption-customer-algorithm"] == "AES256"
        assert sent.headers["x-amz-server-side-encryption-customer-key"]
        assert sent.headers["x-amz-request-payer"] == "requester"
        assert sent.headers["x-amz-security-token"] == "a session's"


@pytest.mark.parametrize("variable", ["http_proxy", "all_proxy"])
def test_proxies_are_left_to_the_event_loop(
    memory: FaultyServer, sends: Sends, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = storage(memory)
    writer = made.open_writer("a")
    slot = writer.reserve(PART)
    monkeypatch.setenv(variable, "http://127.0.0.1:9")
    part = writer._part_of[slot.number]
    part.pieces[slot.number] = DATA[:PART]
    upload = writer._begun()
    from ckptstore.storage.s3.body import Body

    body = Body(part.data())
    assert writer._send_direct(1, upload, body, body.checksum()) is None
    assert not sends.all
    monkeypatch.delenv(variable)
    writer.abort()
    assert uploads(memory) == 0


def test_a_server_that_asked_to_slow_down_is_asked_by_the_event_loop(
    memory: FaultyServer, sends: Sends, slow: list[int]
) -> None:
    made = storage(memory)
    made._client._gate.limit = 8.0
    write(made)
    assert (sends.all, slow) == ([], [1, 2, 3, 4])
    assert there(memory) == DATA


def early(exchange: Exchange) -> None:
    """Refused before the body was wanted; the connection is reset, as servers do then."""
    exchange.answer(Response(503, b"<Error><Code>SlowDown</Code></Error>"))
    exchange.reset()


def altered(**changed: Any) -> Callable[[Exchange], None]:
    def act(exchange: Exchange) -> None:
        exchange.answer(replace(exchange.apply(), **changed))

    return act


def nonsense(exchange: Exchange) -> None:
    exchange.apply()
    exchange.connection.sendall(b"no HTTP\r\n\r\n")
    exchange.close()


_PART = Request("PUT", "/bucket/runs/a?uploadId=1&partNumber=1", {}, b"x")
WRONG = [
    Kind("refused early", early),
    Kind("a 200 that says nothing", altered(headers={})),
    Kind("a 200 with an error", altered(body=b"<Error/>")),
    Kind("a 204", altered(status=204)),
    Kind("no HTTP", nonsense),
]
FITTING = [kind for kind in KINDS if kind.heals and kind.fits(_PART)]


@pytest.mark.parametrize("kind", FITTING + WRONG, ids=str)
def test_whatever_fails_is_left_to_the_event_loop(
    memory: FaultyServer, sends: Sends, slow: list[int], kind: Kind
) -> None:
    """Which sends the part again; the next one is tried as before."""
    made = storage(memory, config_kwargs={"read_timeout": 0.4 if kind.slow else 10.0})
    left = [kind.act]
    memory.arm(lambda number, request: left.pop() if left and request.operation == "Part" else None)
    write(made)
    memory.disarm()

    assert len(memory.fired) == 1, "the fault did not fire"
    assert there(memory) == DATA
    assert uploads(memory) == 0
    lost = [number for number, (_, arrived) in enumerate(sends.all, 1) if not arrived]
    # One that the server has got twice has arrived.
    assert slow == [*lost, 4]
    assert lost == ([] if kind.name == "twice" else [1])
    assert made._client._direct._failures == 0


def test_what_fails_for_good_leaves_no_upload(memory: FaultyServer, sends: Sends) -> None:
    """Not even where a part comes in after all, when nobody waits for it any more."""
    [late] = [kind.act for kind in KINDS if kind.name == "late"]
    acts: list[Any] = [late]

    def forbidden(exchange: Exchange) -> None:
        exchange.answer(Response(403, b"<Error><Code>AccessDenied</Code></Error>", {"content-type": "text/xml"}))

    def choose(number: int, request: Request) -> Any:
        if request.operation != "Part":
            return None
        return acts.pop() if acts else forbidden

    memory.arm(choose)
    with pytest.raises(StorageError, match="AccessDenied"):
        write(storage(memory))
    memory.disarm()
    assert len(memory.fired) >= 2
    assert [arrived for _, arrived in sends.all] == [False]
    assert uploads(memory) == 0
