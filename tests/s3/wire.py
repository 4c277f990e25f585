"""HTTP as far as S3 needs it, and every way in which a server or the network may fail at one request.

``FaultyServer`` reads a request whole, numbers it, and asks ``handler`` for the answer: a bucket in memory, or a real
server. What the fault for that number says happens on the way.
"""

from __future__ import annotations

import socket
import socketserver
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol
from urllib.parse import parse_qsl, unquote, urlsplit

_REASONS = {100: "Continue", 200: "OK", 204: "No Content", 206: "Partial Content"}


@dataclass(frozen=True)
class Request:
    """One request, as it was sent."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes

    @property
    def path(self) -> str:
        return unquote(urlsplit(self.target).path)

    @property
    def query(self) -> dict[str, str]:
        return dict(parse_qsl(urlsplit(self.target).query, keep_blank_values=True))

    @property
    def key(self) -> str:
        """The object's, "" for requests about the bucket."""
        return self.path.lstrip("/").partition("/")[2]

    @property
    def operation(self) -> str:
        """S3's name of what is asked for."""
        names = {"uploads": ("ListUploads", "Begin"), "delete": ("", "Delete")}
        for word, (get, post) in names.items():
            if word in self.query:
                return get if self.method == "GET" else post
        if "uploadId" in self.query:
            return {"PUT": "Part", "POST": "Complete", "DELETE": "Abort"}[self.method]
        if self.method == "PUT" and not self.key:
            return "CreateBucket"
        if self.method == "PUT":
            return "Copy" if "x-amz-copy-source" in self.headers else "Put"
        return {"GET": "Get" if self.key else "List", "HEAD": "Head", "DELETE": "DeleteOne"}[self.method]

    def __str__(self) -> str:
        return f"{self.operation} {self.key or self.query.get('prefix', '')}"


@dataclass(frozen=True)
class Response:
    """One answer. Of a HEAD's, ``body`` is not sent."""

    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


Handler = Callable[[Request], Response]


class Fault(Protocol):
    """What happens to one request."""

    def __call__(self, exchange: Exchange) -> None:
        """Answer, or don't."""


class Exchange:
    """One request on its connection."""

    def __init__(self, server: FaultyServer, connection: socket.socket, request: Request) -> None:
        self.server, self.connection, self.request = server, connection, request
        self.closed = False

    def apply(self, request: Request | None = None) -> Response:
        """Have the server behind do it."""
        return self.server.handler(request or self.request)

    def answer(self, response: Response, *, sent: int | None = None) -> None:
        """Send ``response``; only the first ``sent`` bytes of its body, where given."""
        status = f"{response.status} {_REASONS.get(response.status, 'Whatever')}"
        headers = {"content-length": str(len(response.body)), **response.headers}
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        body = b"" if self.request.method == "HEAD" else response.body[:sent]
        self.connection.sendall(f"HTTP/1.1 {status}\r\n{head}\r\n".encode() + body)

    def close(self) -> None:
        """End the connection in order."""
        self.closed = True
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def reset(self) -> None:
        """End it as by a power cut: the client gets ECONNRESET."""
        self.closed = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()


class FaultyServer:
    """A server on loopback. ``faults`` maps numbers of requests, from 0 at ``arm``, to what happens to them."""

    def __init__(self, handler: Handler) -> None:
        self.handler = handler
        self.requests: list[Request] = []
        self.fired: list[Request] = []
        self.late: list[Request] = []
        self._choose: Callable[[int, Request], Fault | None] = lambda number, request: None
        self._lock = threading.Lock()
        self.ended = threading.Event()
        self._server = _Server(("127.0.0.1", 0), _Connection)
        self._server.faulty = self
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    def __enter__(self) -> FaultyServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def arm(self, choose: Callable[[int, Request], Fault | None]) -> None:
        """From now on, have ``choose`` say what happens to each request; count from 0 again."""
        with self._lock:
            self.requests, self.fired, self.late = [], [], []
            self._choose = choose

    def disarm(self) -> None:
        """Do what is asked for, from now on; first what is late."""
        with self._lock:
            self._choose = lambda number, request: None
            late, self.late = self.late, []
        for request in late:
            self.handler(request)

    def serve(self, exchange: Exchange) -> None:
        """Count one request and let happen what shall happen to it."""
        with self._lock:
            number = len(self.requests)
            self.requests.append(exchange.request)
            fault = self._choose(number, exchange.request)
            late, self.late = self.late, []
            if fault is not None:
                self.fired.append(exchange.request)
        if fault is None:
            exchange.answer(exchange.apply())
        else:
            fault(exchange)
        for request in late:
            self.handler(request)


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128
    faulty: FaultyServer


class _Connection(socketserver.StreamRequestHandler):
    disable_nagle_algorithm = True

    def handle(self) -> None:
        assert isinstance(self.server, _Server)
        with suppress(OSError):
            while (request := self._read()) is not None:
                exchange = Exchange(self.server.faulty, self.connection, request)
                self.server.faulty.serve(exchange)
                if exchange.closed:
                    return

    def finish(self) -> None:
        with suppress(OSError):
            super().finish()

    def _read(self) -> Request | None:
        first = self.rfile.readline().decode("latin-1").split()
        if len(first) != 3:
            return None
        headers: dict[str, str] = {}
        while line := self.rfile.readline().strip():
            name, _, value = line.decode("latin-1").partition(":")
            headers[name.lower()] = value.strip()
        if headers.get("expect", "").lower() == "100-continue":
            self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        length = int(headers.get("content-length", "0"))
        body = self.rfile.read(length)
        return Request(first[0], first[1], headers, body) if len(body) == length else None
