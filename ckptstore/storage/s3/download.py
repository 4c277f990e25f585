"""One object on its way down, by ranges, always of the same version."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable
from typing import Any

from ckptstore.errors import ExistsError, IntegrityError, NotFoundError, StorageError
from ckptstore.storage.s3.client import Call, S3Client
from ckptstore.storage.s3.direct import LEAST_BYTES
from ckptstore.storage.s3.failures import Incomplete, status_of
from ckptstore.storage.s3.signing import Signed

_CHUNK_BYTES = 1 << 20


class S3Reader:
    """An object opened for reading.

    Args:
        etag: the version to be read; None for the one that the first read finds, which then must have ``size`` bytes.

    Attributes:
        size: in bytes.
    """

    def __init__(self, client: S3Client, path: str, key: str, size: int, etag: str | None = None) -> None:
        self.size = size
        self._client, self._path, self._key, self._etag = client, path, key, etag
        self._closed = False
        self._signed: Signed | None = None
        self._signing, self._deciding = threading.Lock(), threading.Lock()

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """Fill ``buffer`` from ``offset``; how many bytes there were. A connection that breaks is taken up again.

        Raises:
            IntegrityError: the object is missing, of another size, or was removed or replaced.
            StorageError: the read failed.
        """
        if self._closed:
            raise StorageError(f"{self._key} was closed", key=self._key)
        raw = buffer.cast("B")
        wanted = max(0, min(len(raw), self.size - offset))
        done = self._read_direct(offset, raw[:wanted])

        async def fetch(call: Call) -> None:
            nonlocal done
            span = f"bytes={offset + done}-{offset + wanted - 1}"
            version = {"IfMatch": self._etag} if self._etag else {}
            try:
                answer = await call("get_object", Key=self._path, Range=span, **version)
            except Exception as error:
                if status_of(error) != 416:
                    raise
                # There is no such range: it is shorter than it should be.
                head = await call("head_object", Key=self._path)
                raise self._misfit(int(head["ContentLength"])) from error
            body = answer["Body"]
            if not str(answer.get("ContentRange", "")).startswith(f"bytes {offset + done}-"):
                body.close()
                raise Incomplete("the answer is no such range")
            async with body:
                self._check_version(answer)
                while done < wanted:
                    piece = await body.read(min(_CHUNK_BYTES, wanted - done))
                    if not piece:
                        raise Incomplete(f"the answer ended {wanted - done} bytes too early")
                    raw[done : done + len(piece)] = piece
                    done += len(piece)

        if done < wanted:
            self._run(fetch)
        return wanted

    def close(self) -> None:
        """Release nothing. Safe to call twice."""
        self._closed = True

    def _read_direct(self, offset: int, buffer: memoryview) -> int:
        """How many bytes of ``buffer`` could be filled on a connection of this thread's own."""
        direct = self._client.direct()
        if direct is None or len(buffer) < LEAST_BYTES:
            return 0
        with self._signing:
            if self._signed is None or self._signed.is_old():
                self._signed = self._client.signed(self._path)
            signed = self._signed
        if signed is None:
            return 0
        done = direct.fetch(signed, offset, buffer, self._etag, self._is_this)
        if done == len(buffer):
            self._client.answered()
        else:
            # Perhaps for what it is signed with.
            self._signed = None
        return done

    def _is_this(self, size: int, etag: str) -> bool:
        """Whether that is the version to be read, which the first answer decides."""
        with self._deciding:
            if self._etag is None and size == self.size and etag:
                self._etag = etag
            return size == self.size and etag == self._etag

    def _run(self, fetch: Callable[[Call], Awaitable[None]]) -> None:
        try:
            self._client.run(fetch, "read", self._key)
        except NotFoundError as error:
            what = "was removed while it was read" if self._etag else "is missing"
            raise IntegrityError(f"{self._key} {what}", key=self._key) from error
        except ExistsError as error:
            # What the condition of the request was about: the version that was opened.
            raise self._replaced() from error

    def _check_version(self, answer: dict[str, Any]) -> None:
        """The first to be answered decides."""
        total = str(answer.get("ContentRange", "")).rpartition("/")[2]
        with self._deciding:
            if self._etag is None:
                if total.isdigit() and int(total) != self.size:
                    raise self._misfit(int(total))
                self._etag = answer["ETag"]
            elif answer["ETag"] != self._etag:
                raise self._replaced()

    def _replaced(self) -> IntegrityError:
        return IntegrityError(f"{self._key} was replaced while it was read", key=self._key)

    def _misfit(self, size: int) -> IntegrityError:
        return IntegrityError(
            f"{self._key} has {size} bytes, {self.size} were saved", key=self._key, expected=self.size, actual=size
        )
