"""What a request carries, straight from memory.

botocore takes no memoryview, and of ``BytesIO`` aiohttp makes a copy only to learn its length. This is read by the
one to be signed and iterated over by the other to be sent, without ever being copied.
"""

from __future__ import annotations

import os
import zlib
from base64 import b64encode
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import suppress

from ckptstore.errors import StorageError

_SENT_BYTES = 1 << 18
"""Handed to the socket at a time: more would be copied by asyncio, as the socket takes no more."""


class Body:
    """Pieces of memory, one after the other; they must not change before ``close``."""

    def __init__(self, pieces: Iterable[bytes | memoryview]) -> None:
        self._pieces = [memoryview(piece).cast("B") for piece in pieces]
        self._length = sum(map(len, self._pieces))
        self._at = 0
        self._closed = False

    def __len__(self) -> int:
        return self._length

    @property
    def pieces(self) -> Sequence[memoryview]:
        """What it is made of."""
        return self._pieces

    def checksum(self) -> dict[str, str]:
        """The header by which the server verifies what it got."""
        value = 0
        for piece in self._pieces:
            value = zlib.crc32(piece, value)
        return {"ChecksumCRC32": b64encode(value.to_bytes(4, "big")).decode()}

    def tell(self) -> int:
        """Where ``read`` goes on."""
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Let ``read`` go on there."""
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        return self._at

    def read(self, count: int = -1) -> bytes | memoryview:
        """At most ``count`` bytes; fewer where a piece ends. All that are left, as a copy, where it is negative."""
        if count < 0:
            return b"".join(iter(lambda: self.read(_SENT_BYTES), b""))
        found = self._slice(self._at, count)
        self._at += len(found)
        return found

    async def __aiter__(self) -> AsyncIterator[memoryview]:
        at = 0
        while at < self._length:
            piece = self._slice(at, _SENT_BYTES)
            at += len(piece)
            yield piece

    def close(self) -> None:
        """Let go of the memory: whoever would still send it, after an interrupt, fails instead."""
        self._closed = True
        for piece in self._pieces:
            # Where the socket is just taking from it, it ends with that.
            with suppress(BufferError):
                piece.release()

    def _slice(self, at: int, count: int) -> memoryview:
        if self._closed:
            raise StorageError("the request was broken off")
        for piece in self._pieces:
            if at < len(piece):
                return piece[at : at + count]
            at -= len(piece)
        return memoryview(b"")
