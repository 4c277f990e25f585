"""Ranges on connections of the reading threads: used where they may be, and never a reason for anything to fail."""

from __future__ import annotations

import os
import random
import shutil
import signal
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch
from tenacity import wait_fixed

import ckptstore as cs
from ckptstore.errors import IntegrityError, StorageError
from ckptstore.storage.s3 import S3Storage, direct
from ckptstore.storage.s3.client import S3Client
from ckptstore.storage.s3.direct import Direct
from ckptstore.storage.s3.download import S3Reader
from ckptstore.storage.s3.signing import Signed
from tests.s3.bucket import MemoryBucket, Stored
from tests.s3.kinds import KINDS, Kind
from tests.s3.seaweed import PUBLIC, Seaweed
from tests.s3.wire import Exchange, FaultyServer, Request, Response

DATA = random.Random(7).randbytes(3 << 20)
ETAG = '"the first one"'


class Fetches:
    """How many bytes ``Direct`` was asked for each time, and how many came."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.all: list[tuple[int, int]] = []
        fetch = Direct.fetch

        def noted(own: Direct, signed: Signed, begin: int, buffer: memoryview, *rest: Any) -> int:
            done = fetch(own, signed, begin, buffer, *rest)
            self.all.append((len(buffer), done))
            return done

        patch.setattr(Direct, "fetch", noted)

    @property
    def good(self) -> int:
        return sum(wanted == done for wanted, done in self.all)


@pytest.fixture
def fetches(monkeypatch: pytest.MonkeyPatch) -> Fetches:
    return Fetches(monkeypatch)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys that the event loop asked for."""
    keys: list[str] = []
    send = S3Client._call

    async def noted(self: S3Client, method: str, /, **parameters: Any) -> dict[str, Any]:
        if method == "get_object":
            keys.append(parameters["Key"])
        return await send(self, method, **parameters)

    monkeypatch.setattr(S3Client, "_call", noted)
    return keys


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """One for each connection that was made."""
    found: list[object] = []
    new = Direct._new

    def noted(own: Direct, url: Any) -> Any:
        found.append(url.netloc)
        return new(own, url)

    monkeypatch.setattr(Direct, "_new", noted)
    return found


@pytest.fixture(autouse=True)
def usual(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy and no certificates of one's own, unless a test says so."""
    for name in ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        for spelled in {name, name.upper()}:
            monkeypatch.delenv(spelled, raising=False)


@pytest.fixture
def memory() -> Iterator[FaultyServer]:
    """A bucket that holds one object."""
    bucket = MemoryBucket("bucket")
    bucket.objects["runs/a"] = Stored(DATA, ETAG, {})
    with FaultyServer(bucket) as server:
        yield server


def options(server: FaultyServer, **more: Any) -> dict[str, Any]:
    endpoint = {"endpoint_url": f"http://127.0.0.1:{server.port}", "client_kwargs": {"region_name": "us-east-1"}}
    return {"key": "ci-access", "secret": "ci-secret", **endpoint, **more}


def reader(server: FaultyServer, **more: Any) -> S3Reader:
    storage = S3Storage("bucket", "runs", options(server, **more))
    storage._client._tries.wait = wait_fixed(0.01)
    return storage.open_reader("a", size=len(DATA))


def pool(opened: S3Reader) -> Direct:
    return opened._client._direct


def idle(opened: S3Reader) -> int:
    """How many connections are kept."""
    return sum(slot.connection is not None for slot in pool(opened)._slots)


def read(opened: S3Reader, begin: int = 0, end: int = len(DATA)) -> None:
    """See that these bytes are right."""
    found = bytearray(end - begin)
    assert opened.read_into(begin, memoryview(found)) == len(found)
    assert found == DATA[begin:end]


def large() -> dict[str, torch.Tensor]:
    return {"w": torch.arange(9 << 20, dtype=torch.int32)}


# -- where it is used ------------------------------------------------------------------------------------


def test_blocks_are_read_so_from_a_real_server(
    server: Seaweed, bucket: str, prefix: str, fetches: Fetches, slow: list[str]
) -> None:
    """All of them, and nothing but records by the event loop."""
    with cs.open(f"s3://{bucket}/{prefix}", storage_options=server.options) as store:
        store.save(large(), step=1)
    slow.clear()
    with cs.open(f"s3://{bucket}/{prefix}", storage_options=server.options, read_only=True) as store:
        assert torch.equal(store.load()["w"], large()["w"])

    assert fetches.good == len(fetches.all) >= 3
    assert not [key for key in slow if key.endswith(".safetensors")]


def test_one_connection_serves_one_thread(memory: FaultyServer, slow: list[str], made: list[object]) -> None:
    """Once the version is known, all requests are for that one."""
    opened = reader(memory)
    for begin in (0, 1 << 20, 2 << 20):
        read(opened, begin, begin + (1 << 20))

    assert (len(made), slow) == (1, [])
    sent = memory.requests
    assert [one.headers["range"] for one in sent] == [
        "bytes=0-1048575",
        "bytes=1048576-2097151",
        "bytes=2097152-3145727",
    ]
    assert [one.headers.get("if-match") for one in sent] == [None, ETAG, ETAG]
    assert all("ci-access" in one.headers["authorization"] for one in sent)
    assert {one.target for one in sent} == {"/bucket/runs/a"}


def test_anybody_may_read_what_is_public(server: Seaweed, fetches: Fetches, slow: list[str]) -> None:
    name, key = server.bucket(PUBLIC), uuid4().hex
    server.client().put_object(Bucket=name, Key=key, Body=DATA)
    anonymous = {name: value for name, value in server.options.items() if name not in ("key", "secret")}
    storage = S3Storage(name, "", anonymous | {"anon": True}, read_only=True)
    read(storage.open_reader(key, size=len(DATA)))

    assert (fetches.good, slow) == (1, [])


def test_what_all_requests_carry_is_sent_too(memory: FaultyServer, fetches: Fetches) -> None:
    """A key of the customer's, who pays, and a session."""
    extra = {"SSECustomerKey": "k" * 32, "SSECustomerAlgorithm": "AES256"}
    read(reader(memory, s3_additional_kwargs=extra, requester_pays=True, token="a session's"))

    assert fetches.good == 1
    [sent] = memory.requests
    assert sent.headers["x-amz-server-side-encryption-customer-algorithm"] == "AES256"
    assert sent.headers["x-amz-server-side-encryption-customer-key"]
    assert sent.headers["x-amz-request-payer"] == "requester"
    assert sent.headers["x-amz-security-token"] == "a session's"


def test_over_tls(
    memory: FaultyServer, fetches: Fetches, slow: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With certificates checked: the one of this server is first not trusted, and then it is."""
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl")
    key, cert = str(tmp_path / "key"), str(tmp_path / "cert")
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-keyout", key, "-out", cert]
    name = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*make, *name], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    plain = memory._server.socket
    memory._server.socket = context.wrap_socket(plain, server_side=True, do_handshake_on_connect=False)
    place = {"endpoint_url": f"https://127.0.0.1:{memory.port}"}

    assert reader(memory, **place)._read_direct(0, memoryview(bytearray(len(DATA)))) == 0
    assert fetches.all == [(len(DATA), 0)]
    assert memory.requests == []
    monkeypatch.setattr(direct, "get_cert_path", lambda verify: cert)
    read(reader(memory, **place))
    assert fetches.good == 1
    assert slow == []


# -- where it isn't --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "more"),
    [
        ({"http_proxy": "http://127.0.0.1:9"}, {}),
        ({"all_proxy": "http://127.0.0.1:9"}, {}),
        ({}, {"config_kwargs": {"proxies": {"http": "http://127.0.0.1:9"}}}),
        ({}, {"config_kwargs": {"connector_args": {"use_dns_cache": False}}}),
    ],
    ids=str,
)
def test_proxies_and_other_connections_are_left_to_the_event_loop(
    memory: FaultyServer,
    made: list[object],
    variables: dict[str, str],
    more: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert reader(memory, **more)._read_direct(0, memoryview(bytearray(len(DATA)))) == 0
    assert (made, memory.requests) == ([], [])


def test_a_host_without_proxy_is_reached_directly(
    memory: FaultyServer, fetches: Fetches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    read(reader(memory))
    assert fetches.good == 1


@pytest.mark.parametrize("how", ["verify", "AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE"])
def test_certificates_of_ones_own_are_left_to_the_event_loop(
    memory: FaultyServer, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there are any at all."""
    secure = {"endpoint_url": f"https://127.0.0.1:{memory.port}"}
    assert reader(memory, **secure)._client.signed("runs/a") is not None
    known: dict[str, Any] = {"region_name": "us-east-1"}
    if how == "verify":
        known["verify"] = False
    else:
        monkeypatch.setenv(how, ssl.get_default_verify_paths().openssl_cafile)
    assert reader(memory, **secure, client_kwargs=known)._client.signed("runs/a") is None
    assert reader(memory, client_kwargs=known)._client.signed("runs/a") is not None


def test_a_server_that_asked_to_slow_down_is_asked_by_the_event_loop(
    memory: FaultyServer, fetches: Fetches, slow: list[str]
) -> None:
    opened = reader(memory)
    opened._client._gate.limit = 8.0
    read(opened)
    assert (fetches.all, len(slow)) == ([], 1)


def test_small_ranges_are_left_to_the_event_loop(memory: FaultyServer, fetches: Fetches, slow: list[str]) -> None:
    read(reader(memory), 5, 1000)
    assert (fetches.all, len(slow)) == ([], 1)


def test_no_more_connections_than_are_allowed(memory: FaultyServer, slow: list[str]) -> None:
    opened = reader(memory, config_kwargs={"max_pool_connections": 1})
    taken = pool(opened)._slots.pop()
    read(opened)
    assert len(slow) == 1
    pool(opened)._slots.append(taken)
    read(opened)
    assert len(slow) == 1


# -- where it fails --------------------------------------------------------------------------------------


def altered(**changed: str) -> Callable[[Exchange], None]:
    """The right answer, but for some headers."""
    fields = {name.replace("_", "-"): value for name, value in changed.items()}

    def act(exchange: Exchange) -> None:
        answer = exchange.apply()
        exchange.answer(replace(answer, headers=answer.headers | fields))
        exchange.close()

    return act


def whole(exchange: Exchange) -> None:
    exchange.answer(Response(200, DATA, {"etag": ETAG}))


def nonsense(exchange: Exchange) -> None:
    exchange.connection.sendall(b"no HTTP\r\n\r\n")
    exchange.close()


def broken_off(exchange: Exchange) -> None:
    answer = exchange.apply()
    exchange.answer(answer, sent=len(answer.body) // 2)
    exchange.reset()


WRONG = [
    Kind("another begin", altered(content_range=f"bytes 1-{len(DATA)}/{len(DATA)}")),
    Kind("another end", altered(content_range=f"bytes 0-99/{len(DATA)}")),
    Kind("another size", altered(content_range=f"bytes 0-{len(DATA) - 1}/{len(DATA) + 1}")),
    Kind("no size", altered(content_range=f"bytes 0-{len(DATA) - 1}/*")),
    Kind("no range", altered(content_range="")),
    Kind("another version", altered(etag='"another"')),
    Kind("too long", altered(content_length=str(len(DATA) + 5))),
    Kind("a 200", whole),
    Kind("no HTTP", nonsense),
    Kind("broken off", broken_off),
]
UNNOTICED = "flipped on the way down"
"""Here: digests find it."""
FITTING = [kind for kind in KINDS if kind.name != UNNOTICED and kind.fits(Request("GET", "/bucket/runs/a", {}, b""))]


@pytest.mark.parametrize("kind", FITTING + WRONG, ids=str)
def test_whatever_fails_is_left_to_the_event_loop(
    memory: FaultyServer, fetches: Fetches, slow: list[str], kind: Kind
) -> None:
    """Which reads the bytes that are still missing, and them only."""
    opened = reader(memory, config_kwargs={"read_timeout": 0.4 if kind.slow else 10.0})
    opened._etag = ETAG
    memory.arm(lambda number, request: kind.act if number == 0 else None)
    read(opened)

    assert len(memory.fired) == 1, "the fault did not fire"
    [(wanted, done)] = fetches.all
    assert done < wanted
    assert len(slow) == 1
    assert memory.requests[1].headers["range"] == f"bytes={done}-{wanted - 1}"
    assert pool(opened)._failures == 1
    read(opened)
    assert (fetches.good, len(slow), pool(opened)._failures) == (1, 1, 0)


def test_what_was_received_before_it_broke_is_kept(memory: FaultyServer, fetches: Fetches) -> None:
    def act(exchange: Exchange) -> None:
        exchange.answer(exchange.apply(), sent=len(DATA) - 1000)
        exchange.close()

    memory.arm(lambda number, request: act if number == 0 else None)
    read(reader(memory))
    assert len(memory.fired) == 1
    [(_, done)] = fetches.all
    assert 2 << 20 <= done < len(DATA)
    assert memory.requests[1].headers["range"] == f"bytes={done}-{len(DATA) - 1}"


def test_flipped_bytes_are_found_by_their_digest(fetches: Fetches) -> None:
    """And read again."""
    [flip] = [kind.act for kind in KINDS if kind.name == UNNOTICED]
    with FaultyServer(MemoryBucket("bucket")) as server:
        with cs.open("s3://bucket/runs/a", storage_options=options(server)) as store:
            store.save(large(), step=1)
        left = [flip]

        def choose(number: int, request: Request) -> Any:
            return left.pop() if left and request.key.endswith(".safetensors") else None

        server.arm(choose)
        with cs.open("s3://bucket/runs/a", storage_options=options(server), read_only=True) as store:
            assert torch.equal(store.load()["w"], large()["w"])
        assert len(server.fired) == 1
    assert fetches.good == len(fetches.all)


def test_another_object_is_never_taken_for_the_first(memory: FaultyServer, fetches: Fetches) -> None:
    opened = reader(memory)
    read(opened, 0, 1 << 20)
    assert isinstance(memory.handler, MemoryBucket)
    memory.handler.objects["runs/a"] = Stored(DATA[::-1], '"the second one"', {})
    with pytest.raises(IntegrityError, match="was replaced while it was read"):
        read(opened, 1 << 20, 2 << 20)
    assert fetches.all == [(1 << 20, 1 << 20), (1 << 20, 0)]


@pytest.mark.parametrize("size", [len(DATA) - 5, len(DATA) + 5])
def test_an_object_of_another_size(memory: FaultyServer, fetches: Fetches, size: int) -> None:
    opened = S3Storage("bucket", "runs", options(memory)).open_reader("a", size=size)
    with pytest.raises(IntegrityError, match=f"has {len(DATA)} bytes, {size} were saved"):
        opened.read_into(0, memoryview(bytearray(1 << 20)))
    assert fetches.all == [(1 << 20, 0)]


def test_it_is_left_alone_after_three_failures(
    memory: FaultyServer, fetches: Fetches, slow: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a while; then one more is tried."""
    opened = reader(memory)
    with monkeypatch.context() as patch:
        patch.setattr(direct, "_target", lambda url: "/nowhere/a")
        for _ in range(5):
            read(opened)
        assert [one.target for one in memory.requests].count("/nowhere/a") == 3
        assert (len(fetches.all), fetches.good, len(slow)) == (3, 0, 5)

        pool(opened)._off_until = 0.0
        read(opened)
        read(opened)
        assert (len(fetches.all), len(slow)) == (4, 7)

    pool(opened)._off_until = 0.0
    read(opened)
    read(opened)
    assert (fetches.good, len(slow)) == (2, 7)


def test_a_connection_that_the_server_closed_is_no_failure(
    memory: FaultyServer, fetches: Fetches, slow: list[str]
) -> None:
    """The next one is made anew."""
    opened = reader(memory)
    ended = threading.Event()

    def answer_and_close(exchange: Exchange) -> None:
        exchange.answer(exchange.apply())
        exchange.close()
        ended.set()

    memory.arm(lambda number, request: answer_and_close if number == 0 else None)
    read(opened)
    assert ended.wait(10)
    read(opened)
    read(opened)
    assert [done for _, done in fetches.all] == [len(DATA), 0, len(DATA)]
    assert (len(slow), pool(opened)._failures) == (1, 0)


def test_connections_that_are_old_are_not_used(
    memory: FaultyServer, made: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct, "_IDLE_S", 0.0)
    opened = reader(memory)
    read(opened)
    read(opened)
    assert len(made) == 2


def test_requests_are_signed_anew_when_they_are_old(memory: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = reader(memory)
    read(opened)
    first = opened._signed
    read(opened)
    assert opened._signed is first
    monkeypatch.setattr(Signed, "is_old", lambda self: True)
    read(opened)
    assert opened._signed is not first


def test_an_interrupt_leaves_no_connection_behind(memory: FaultyServer) -> None:
    """Whose answer is still under way, and would be taken for that to the next request."""
    opened = reader(memory)

    def interrupt(exchange: Exchange) -> None:
        exchange.answer(exchange.apply(), sent=len(DATA) // 2)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        exchange.server.ended.wait(20)

    memory.arm(lambda number, request: interrupt if number == 0 else None)
    with pytest.raises(KeyboardInterrupt):
        opened.read_into(0, memoryview(bytearray(len(DATA))))
    assert len(memory.fired) == 1
    assert (idle(opened), len(pool(opened)._slots)) == (0, 64)
    read(opened)


def test_a_fork_uses_no_connection_of_its_parent(memory: FaultyServer, slow: list[str]) -> None:
    opened = reader(memory)
    read(opened)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            read(opened)
        except StorageError:
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert len(memory.requests) == 1
    read(opened)
    assert (len(memory.requests), slow) == (2, [])


def test_a_closed_storage_keeps_no_idle_connection(memory: FaultyServer) -> None:
    storage = S3Storage("bucket", "runs", options(memory))
    opened = storage.open_reader("a", size=len(DATA))
    read(opened)
    assert idle(opened) == 1
    storage.close()
    assert idle(opened) == 0
