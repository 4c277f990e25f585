"""One object on its way down, by ranges, always of the same version."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from ckptstore.errors import ExistsError, IntegrityError, NotFoundError, StorageError
from ckptstore.storage.s3.client import Call, S3Client
from ckptstore.storage.s3.failures import Incomplete, status_of

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
        done = 0

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

        if wanted:
            self._run(fetch)
        return wanted

    def close(self) -> None:
        """Release nothing. Safe to call twice."""
        self._closed = True

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
        """All requests run on one thread, so the first to be answered decides."""
        if self._etag is None:
            total = str(answer.get("ContentRange", "")).rpartition("/")[2]
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
