"""A proxy that puts a delay before every request, as the way to a bucket does, and counts what passes."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Mapping
from types import TracebackType
from typing import Any, NamedTuple, Self
from urllib.parse import parse_qs, unquote, urlsplit

_CHUNK_BYTES = 1 << 18
_NO_BODY = {"204", "304"}
_GATE_S = 20.0
"""After this a request is dropped: those that it waits for don't come."""


class Passed(NamedTuple):
    """One request that was answered."""

    kind: str
    """The method; a listing is a LIST."""
    key: str
    """Path with the bucket, or what is listed."""
    status: int
    sent: int
    """Bytes of the request's body."""
    got: int
    """Bytes of the answer's body."""
    signed: str
    """What it says of its body's SHA-256."""


class Latency:
    """The proxy, from ``with`` on. What it counts may be looked at while no request is under way.

    Args:
        endpoint: the server's.
        delay_s: seconds before each request goes on; others are not kept waiting.

    Attributes:
        gate: part of a target, and how many requests for such must be under way before the first of them goes on.
        most: at a time.
    """

    def __init__(self, endpoint: str, delay_s: float = 0.0) -> None:
        self.delay_s = delay_s
        self.gate: tuple[str, int] | None = None
        self._passed: list[Passed] = []
        self.most = self._now = 0
        self._waiting, self._open = 0, asyncio.Event()
        self._server = urlsplit(endpoint)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._tasks: set[asyncio.Task[None]] = set()
        self._port = 0

    def __enter__(self) -> Self:
        self._thread.start()
        self._port = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """``options`` of s3fs, by way of here."""
        return {**options, "endpoint_url": f"http://127.0.0.1:{self._port}"}

    def forget(self) -> None:
        """Count anew."""
        self._settle()
        self._passed, self.most = [], 0

    @property
    def passed(self) -> list[Passed]:
        """All requests in the order of their answers."""
        self._settle()
        return self._passed

    def _settle(self) -> None:
        """Wait until what was answered is counted: a client may go on before."""

        async def counted() -> None:
            while self._now:
                await asyncio.sleep(0.001)

        asyncio.run_coroutine_threadsafe(counted(), self._loop).result(_GATE_S)

    def kinds(self) -> Counter[str]:
        """How many requests of each kind."""
        return Counter(one.kind for one in self.passed)

    async def _listen(self) -> int:
        self._listener = await asyncio.start_server(self._accept, "127.0.0.1", 0, limit=1 << 20)
        port: int = self._listener.sockets[0].getsockname()[1]
        return port

    async def _stop(self) -> None:
        self._listener.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        to_server: asyncio.StreamWriter | None = None
        try:
            server, to_server = await asyncio.open_connection(self._server.hostname, self._server.port, limit=1 << 20)
            while await self._one(reader, writer, server, to_server):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError, TimeoutError):
            return
        finally:
            for end in (writer, to_server):
                if end is not None:
                    end.close()

    async def _one(
        self,
        client: asyncio.StreamReader,
        to_client: asyncio.StreamWriter,
        server: asyncio.StreamReader,
        to_server: asyncio.StreamWriter,
    ) -> bool:
        head = await client.readuntil(b"\r\n\r\n")
        self._now += 1
        self.most = max(self.most, self._now)
        try:
            first, fields = _parsed(head)
            await asyncio.sleep(self.delay_s)
            await self._pass_gate(first[1])
            if "expect" in fields:
                to_client.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                head = b"".join(line for line in head.splitlines(True) if not line.lower().startswith(b"expect:"))
            to_server.write(head)
            sent = await _body(client, to_server, fields)
            answer = await server.readuntil(b"\r\n\r\n")
            status, answered = _parsed(answer)
            to_client.write(answer)
            without = first[0] == "HEAD" or status[1] in _NO_BODY
            got = 0 if without else await _body(server, to_client, answered)
            await to_client.drain()
        finally:
            self._now -= 1
        signed = fields.get("x-amz-content-sha256", "")
        self._passed.append(_passed(first[0], first[1], int(status[1]), sent, got, signed))
        return "close" not in (fields.get("connection"), answered.get("connection"))

    async def _pass_gate(self, target: str) -> None:
        if self.gate is None or self.gate[0] not in target:
            return
        self._waiting += 1
        if self._waiting >= self.gate[1]:
            self._open.set()
        await asyncio.wait_for(self._open.wait(), _GATE_S)


def _parsed(head: bytes) -> tuple[list[str], dict[str, str]]:
    first, *lines = head.decode("latin-1").rstrip("\r\n").split("\r\n")
    fields = (line.partition(":") for line in lines)
    return first.split(" "), {name.lower(): value.strip().lower() for name, _, value in fields}


async def _body(source: asyncio.StreamReader, target: asyncio.StreamWriter, fields: Mapping[str, str]) -> int:
    """Pass a body on; its length."""
    if fields.get("transfer-encoding") == "chunked":
        return await _chunked(source, target)
    left = length = int(fields.get("content-length", 0))
    while left:
        piece = await source.read(min(left, _CHUNK_BYTES))
        if not piece:
            raise asyncio.IncompleteReadError(b"", left)
        left -= len(piece)
        target.write(piece)
        await target.drain()
    await target.drain()
    return length


async def _chunked(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> int:
    total = 0
    while True:
        line = await source.readuntil(b"\r\n")
        length = int(line.split(b";")[0], 16)
        target.write(line + await source.readexactly(length + 2))
        await target.drain()
        total += length
        if length == 0:
            return total


def _passed(method: str, target: str, *rest: Any) -> Passed:
    parts = urlsplit(target)
    asked = parse_qs(parts.query)
    if method == "GET" and "list-type" in asked:
        return Passed("LIST", asked.get("prefix", [""])[0], *rest)
    return Passed(method, unquote(parts.path).lstrip("/"), *rest)
