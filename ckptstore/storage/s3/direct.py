"""Ranges and parts of objects on connections of the threads that move them, straight from and into their memory.

An event loop takes in and sends all on one thread, and copies it. This only saves that: whatever isn't just as it
should be is left to the requests by the event loop, which know what to make of it.
"""

from __future__ import annotations

import os
import ssl
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from http.client import HTTPConnection, HTTPMessage, HTTPResponse, HTTPSConnection
from typing import Any, NamedTuple
from urllib.parse import SplitResult, urlsplit

from botocore.httpsession import get_cert_path
from botocore.utils import get_environ_proxies

from ckptstore.storage.s3.signing import Signed

LEAST_BYTES = 1 << 18
"""Fewer are not worth a connection of their own."""
_CHUNK_BYTES = 1 << 20
_IDLE_S = 10.0
"""Servers close a connection that isn't used for longer."""
_FAILURES = 3
"""So many, one after the other, and it is left alone."""
_PAUSE_S = 60.0
_ELSEWHERE = {"proxies", "proxies_config", "client_cert", "connector_args", "http_session_cls"}
"""Settings of a connection that these ones don't have."""
_BUNDLES = ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE")

Accepts = Callable[[int, str], bool]
"""Whether an answer is of the right version, by the size of the whole object and its ETag."""


class _Unfit(Exception):  # noqa: N818 - never leaves this module
    """The answer is not the range that was asked for."""


class _Slot(NamedTuple):
    """Room for a connection, and perhaps one that was used before, for ``place``."""

    connection: HTTPConnection | None = None
    place: tuple[str, str] = ("", "")
    since: float = 0.0


class Direct:
    """Connections to one server. All methods are thread-safe, and need no lock that an interrupt might leave taken.

    Args:
        most: connections at a time.
        patience_s: no connection and no answer are waited for longer, whatever ``config`` says.
        config: of botocore.
        verify: what the client was given to check certificates by, if anything.
    """

    def __init__(self, most: int, patience_s: float, config: Mapping[str, Any], verify: object = None) -> None:
        self._slots = deque([_Slot()] * most)
        self._connect_s = min(patience_s, config["connect_timeout"])
        self._read_s = min(patience_s, config["read_timeout"])
        self._verify, self._possible = verify, not _ELSEWHERE & set(config)
        self._context: ssl.SSLContext | None = None
        self._failures, self._off_until = 0, 0.0
        weakref.finalize(self, _close, self._slots)

    def is_on(self) -> bool:
        """Whether it is worth a try."""
        return self._possible and (self._failures < _FAILURES or time.monotonic() >= self._off_until)

    def suits(self, url: str, bundle: object) -> bool:
        """Whether ``url`` is reached without a proxy, and its certificate checked as usual. ``bundle``: configured."""
        unusual = self._verify is not None or bundle is not None or any(map(os.environ.get, _BUNDLES))
        if "@" in url or (url.startswith("https:") and unusual):
            return False
        return not set(get_environ_proxies(url)) - {"no"}

    def failed(self) -> None:
        """Count one more in a row."""
        self._failures += 1
        self._off_until = time.monotonic() + _PAUSE_S

    def fetch(self, signed: Signed, begin: int, buffer: memoryview, etag: str | None, accepts: Accepts) -> int:
        """Fill ``buffer`` from byte ``begin`` of an object; how many bytes of it are there, fewer where it failed.

        Args:
            etag: the only version to be answered with, where it is known.
        """
        done = 0
        span = f"bytes={begin}-{begin + len(buffer) - 1}"
        condition = {"If-Match": etag} if etag else {}

        def receive(connection: HTTPConnection, target: str) -> HTTPResponse:
            nonlocal done
            connection.request("GET", target, headers=signed.headers | {"Range": span} | condition)
            response = connection.getresponse()
            for count in _received(response, begin, buffer, accepts):
                done += count
            return response

        self._exchange(signed.url, receive)
        return done

    def send(self, signed: Signed, pieces: Sequence[memoryview]) -> HTTPMessage | None:
        """Send ``pieces`` as what ``signed`` carries; the headers of the answer, None where it isn't certain.

        The server may have got all, in that case: only a request that may be repeated can be sent so.
        """
        answer: HTTPMessage | None = None

        def put(connection: HTTPConnection, target: str) -> HTTPResponse:
            nonlocal answer
            connection.putrequest("PUT", target, skip_accept_encoding=True)
            for name, value in signed.headers.items():
                # Nothing is waited for: a server that doesn't want it ends the connection.
                if name.lower() != "expect":
                    connection.putheader(name, value)
            connection.endheaders()
            for piece in pieces:
                for at in range(0, len(piece), _CHUNK_BYTES):
                    # Not all at once: the timeout is for one call, however much that has to send.
                    connection.sock.sendall(piece[at : at + _CHUNK_BYTES])
            response = connection.getresponse()
            with response:
                said = response.read(_CHUNK_BYTES)
            if response.status != 200 or said.strip() or not response.headers.get("ETag"):
                raise _Unfit
            answer = response.headers
            return response

        self._exchange(signed.url, put)
        return answer

    def _exchange(self, url: str, act: Callable[[HTTPConnection, str], HTTPResponse]) -> None:
        """Have ``act`` send a request for a target and take in the answer, on a connection that is free, if one is."""
        try:
            slot = self._slots.pop()
        except IndexError:
            return
        place, kept, used = urlsplit(url), None, False
        connection = None
        try:
            connection, used = self._connection(slot, place)
            response = act(connection, _target(place))
            kept = connection if response.isclosed() and connection.sock is not None else None
            self._failures = 0
        except Exception as error:
            # On one that was used before it may just be that the server has closed it meanwhile.
            if not used or isinstance(error, _Unfit):
                self.failed()
        finally:
            self._put_back(connection, kept, place)

    def close(self) -> None:
        """End what isn't in use. Safe to call twice, and to go on after."""
        _close(self._slots)

    def _connection(self, slot: _Slot, url: SplitResult) -> tuple[HTTPConnection, bool]:
        """A connection, and whether it was used before."""
        if slot.connection is not None:
            if slot.place == (url.scheme, url.netloc) and time.monotonic() - slot.since < _IDLE_S:
                return slot.connection, True
            slot.connection.close()
        made = self._new(url)
        try:
            made.connect()
            made.sock.settimeout(self._read_s)
        except BaseException:
            made.close()
            raise
        return made, False

    def _new(self, url: SplitResult) -> HTTPConnection:
        if url.scheme != "https":
            return HTTPConnection(url.hostname or "", url.port, timeout=self._connect_s)
        if self._context is None:
            context = ssl.create_default_context(cafile=get_cert_path(True))
            context.set_alpn_protocols(["http/1.1"])
            self._context = context
        return HTTPSConnection(url.hostname or "", url.port, timeout=self._connect_s, context=self._context)

    def _put_back(self, connection: HTTPConnection | None, kept: HTTPConnection | None, url: SplitResult) -> None:
        if kept is not None:
            self._slots.append(_Slot(kept, (url.scheme, url.netloc), time.monotonic()))
            return
        self._slots.appendleft(_Slot())
        if connection is not None:
            connection.close()


def _received(response: HTTPResponse, begin: int, buffer: memoryview, accepts: Accepts) -> Iterator[int]:
    """Take in the body; after each piece, how long it is."""
    with response:
        span, _, total = response.headers.get("Content-Range", "").partition("/")
        whole = span == f"bytes {begin}-{begin + len(buffer) - 1}" and response.length == len(buffer)
        if response.status != 206 or not whole or not total.isdigit():
            raise _Unfit
        if not accepts(int(total), response.headers.get("ETag", "")):
            raise _Unfit
        done = 0
        while done < len(buffer):
            count = response.readinto(buffer[done : done + _CHUNK_BYTES])
            if not count:
                raise _Unfit
            done += count
            yield count


def _target(url: SplitResult) -> str:
    return (url.path or "/") + (f"?{url.query}" if url.query else "")


def _close(slots: deque[_Slot]) -> None:
    for _ in range(len(slots)):
        with suppress(IndexError):
            slot = slots.pop()
            slots.appendleft(_Slot())
            if slot.connection is not None:
                slot.connection.close()
