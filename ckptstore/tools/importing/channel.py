"""Messages between the process that imports and the one that reads: frames of known length over a socket."""

from __future__ import annotations

import json
import socket
import struct
from typing import Any

from ckptstore.errors import FormatError

JSON, BYTES, ERROR, READ = b"J", b"B", b"E", b"R"
PULSE = b"P"
"""What a reader sends while it works: bytes done so far."""

_HEAD = struct.Struct("<cQ")
REQUEST = struct.Struct("<QQQ")
"""Which tensor, from which byte, how many."""

JSON_LIMIT = 256 << 20
_LIMITS = {JSON: JSON_LIMIT, ERROR: 1 << 20, READ: REQUEST.size, PULSE: 8}


class GoneError(Exception):
    """The other side has closed the socket, or died."""


def send(sock: socket.socket, kind: bytes, payload: bytes) -> None:
    """Send one frame.

    Raises:
        GoneError: nobody is there to take it.
    """
    try:
        sock.sendall(_HEAD.pack(kind, len(payload)) + payload)
    except TimeoutError:
        raise
    except OSError as error:
        raise GoneError from error


def send_begin(sock: socket.socket, kind: bytes, length: int) -> None:
    """Send the head of a frame, whose bytes the caller sends."""
    sock.sendall(_HEAD.pack(kind, length))


def send_json(sock: socket.socket, fields: Any, kind: bytes = JSON) -> None:
    """Send a JSON document."""
    send(sock, kind, json.dumps(fields, separators=(",", ":"), allow_nan=False).encode("ascii"))


def receive_head(sock: socket.socket) -> tuple[bytes, int]:
    """Kind and length of the next frame.

    Raises:
        GoneError: there is none.
        TimeoutError: none came in the time that the socket waits.
    """
    head = bytearray(_HEAD.size)
    receive_into(sock, memoryview(head))
    kind, length = _HEAD.unpack(head)
    return kind, length


def receive_payload(sock: socket.socket, kind: bytes, length: int) -> bytes:
    """What follows such a head.

    Raises:
        FormatError: no frame of this kind is as long.
        GoneError, TimeoutError: as ``receive_head``.
    """
    if length > _LIMITS.get(kind, 0):
        raise FormatError(f"a message of {length} bytes is longer than any here")
    data = bytearray(length)
    receive_into(sock, memoryview(data))
    return bytes(data)


def receive_into(sock: socket.socket, out: memoryview) -> None:
    """Fill ``out``.

    Raises:
        GoneError, TimeoutError: as ``receive_head``.
    """
    done = 0
    while done < len(out):
        try:
            count = sock.recv_into(out[done:])
        except TimeoutError:
            raise
        except OSError as error:
            raise GoneError from error
        if not count:
            raise GoneError
        done += count
