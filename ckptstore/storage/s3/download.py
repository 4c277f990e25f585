"""One object on its way down, by ranges, always of the same version."""

from __future__ import annotations

from ckptstore.errors import ExistsError, IntegrityError, NotFoundError, StorageError
from ckptstore.storage.s3.client import Call, S3Client
from ckptstore.storage.s3.failures import Incomplete

_CHUNK_BYTES = 1 << 20


class S3Reader:
    """An object opened for reading.

    Attributes:
        size: in bytes.
    """

    def __init__(self, client: S3Client, path: str, key: str, size: int, etag: str) -> None:
        self.size = size
        self._client, self._path, self._key, self._etag = client, path, key, etag
        self._closed = False

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """Fill ``buffer`` from ``offset``; how many bytes there were. A connection that breaks is taken up again.

        Raises:
            IntegrityError: the object was removed or replaced.
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
            answer = await call("get_object", Key=self._path, Range=span, IfMatch=self._etag)
            body = answer["Body"]
            if not str(answer.get("ContentRange", "")).startswith(f"bytes {offset + done}-"):
                body.close()
                raise Incomplete("the answer is no such range")
            async with body:
                while done < wanted:
                    piece = await body.read(min(_CHUNK_BYTES, wanted - done))
                    if not piece:
                        raise Incomplete(f"the answer ended {wanted - done} bytes too early")
                    raw[done : done + len(piece)] = piece
                    done += len(piece)

        if wanted:
            try:
                self._client.run(fetch, "read", self._key)
            except NotFoundError as error:
                raise IntegrityError(f"{self._key} was removed while it was read", key=self._key) from error
            except ExistsError as error:
                # What the condition of the request was about: the version that was opened.
                raise IntegrityError(f"{self._key} was replaced while it was read", key=self._key) from error
        return wanted

    def close(self) -> None:
        """Release nothing. Safe to call twice."""
        self._closed = True
