"""One large object on its way up: in parts where it has several, at once where it is small."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import Any

from ckptstore.errors import CheckpointError, StorageError
from ckptstore.storage.base import Slot
from ckptstore.storage.s3.answers import listing, put_object, told
from ckptstore.storage.s3.body import Body
from ckptstore.storage.s3.client import Call, S3Client
from ckptstore.storage.s3.direct import LEAST_BYTES
from ckptstore.storage.s3.failures import Incomplete, code_of, may_be_applied

LEAST_PART_BYTES = 5 << 20
"""S3 takes no smaller part but the last."""
MOST_PARTS = 10_000
_SETTLE_S = 5.0
"""How long an interrupted save waits for the name of the upload that it has just begun, to be able to abort it."""


def checksum(data: bytes) -> dict[str, str]:
    """The header by which the server verifies what it got."""
    return Body([data]).checksum()


def part_bytes(number: int, size: int | None) -> int:
    """How large part ``number`` (from 1) should be at least, of an object of ``size`` bytes, None where unknown.

    Of unknown size, parts grow as their number does: 10,000 parts hold more than 1 TB.
    """
    if size is not None:
        return max(LEAST_PART_BYTES, -(-size // (MOST_PARTS - 1)))
    return LEAST_PART_BYTES << (0 if number <= 5000 else 4 if number <= 8000 else 7)


@dataclass
class _Part:
    """Slots that follow each other, sent together."""

    number: int
    slots: list[Slot] = field(default_factory=list)
    pieces: dict[int, bytes | memoryview] = field(default_factory=dict)
    closed: bool = False

    @property
    def length(self) -> int:
        return sum(slot.length for slot in self.slots)

    @property
    def full(self) -> bool:
        return self.closed and len(self.pieces) == len(self.slots)

    def data(self) -> list[bytes | memoryview]:
        return [self.pieces[slot.number] for slot in self.slots]


class S3Writer:
    """An object in the making; invisible until ``finish``. ``write`` sends, and returns when the server has it."""

    def __init__(self, client: S3Client, path: str, key: str, size: int | None) -> None:
        self._client, self._path, self._key, self._size = client, path, key, size
        self._lock = threading.Lock()
        self._parts: list[_Part] = []
        self._part_of: dict[int, _Part] = {}
        self._end = 0
        self._upload: str | None = None
        self._strays = False
        """Whether the server may hold an upload of this object that isn't known here."""
        self._lost = False
        """Whether a part may be on its way still that nobody waits for any more."""
        self._settled = threading.Event()
        self._settled.set()
        self._beginning = threading.Lock()
        self._sent: dict[int, dict[str, Any]] = {}
        self._state = "open"

    def reserve(self, length: int) -> Slot:
        """Take the next ``length`` bytes."""
        with self._lock:
            slot = Slot(len(self._part_of), self._end, length)
            self._end += length
            if not self._parts or self._parts[-1].closed:
                self._parts.append(_Part(len(self._parts) + 1))
            part = self._part_of[slot.number] = self._parts[-1]
            part.slots.append(slot)
            part.closed = part.length >= part_bytes(part.number, self._size)
        return slot

    def write(self, slot: Slot, data: memoryview) -> None:
        """Send ``data``, or keep a copy until its neighbours are there, where it is too small for a part.

        Raises:
            StorageError: the object must be aborted.
        """
        self._check_open("write")
        try:
            if data.nbytes != slot.length:
                raise StorageError(f"{self._key}: {data.nbytes} bytes for a slot of {slot.length}", key=self._key)
            part = self._part_of[slot.number]
            with self._lock:
                part.pieces[slot.number] = data
                # The last of a known size is known to be the only one, and then goes up at once.
                ready = part.full and not self._is_only(part)
                if not ready:
                    part.pieces[slot.number] = bytes(data)
            if ready:
                self._send(part)
        except BaseException as error:
            self._failed(error)
            raise

    def finish(self) -> int:
        """Complete the object, which is durable and visible then; its size.

        Raises:
            StorageError: the object must be aborted.
        """
        self._check_open("finish")
        try:
            missing = [n for n, part in self._part_of.items() if n not in part.pieces and part.number not in self._sent]
            if missing:
                raise StorageError(f"{self._key}: slot {missing[0]} was never written", key=self._key)
            if self._upload is None:
                self._put([piece for part in self._parts for piece in part.data()])
            else:
                for part in self._parts:
                    if part.number not in self._sent:
                        self._send(part)
                self._complete()
        except BaseException as error:
            self._failed(error)
            raise
        self._state = "finished"
        if self._strays:
            self._drop_strays()
        return self._end

    def abort(self) -> None:
        """Drop the upload. Never raises; does nothing after ``finish``."""
        if self._state in ("finished", "aborted"):
            return
        self._state = "aborted"
        if self._strays:
            # An interrupt may have come just when its beginning was on the way.
            self._settled.wait(_SETTLE_S)
        if self._upload is not None:
            with suppress(CheckpointError):
                self._abort(self._upload)
        if self._strays:
            self._drop_strays()

    def _failed(self, error: BaseException) -> None:
        self._state = "failed"
        # What is on its way still may come in after the upload was aborted, and open it again.
        cut_off = not isinstance(error, Exception) or getattr(error, "outcome", "") == "unknown"
        self._strays = self._strays or ((cut_off or self._lost) and self._upload is not None)

    def _abort(self, upload: str) -> None:
        self._client.run(
            lambda call: call("abort_multipart_upload", Key=self._path, UploadId=upload), "abort", self._key
        )

    def _drop_strays(self) -> None:
        """Abort every upload of this object; none is wanted any more."""

        async def uploads(call: Call) -> list[str]:
            page = await listing(call, "list_multipart_uploads", Prefix=self._path)
            return [item["UploadId"] for item in page.get("Uploads", []) if item["Key"] == self._path]

        with suppress(CheckpointError):
            for upload in self._client.run(uploads, "list uploads of", self._key):
                self._abort(upload)

    def _is_only(self, part: _Part) -> bool:
        return part.number == 1 and self._size is not None and part.length == self._size

    def _check_open(self, doing: str) -> None:
        if self._state != "open":
            raise StorageError(f"{self._key}: can't {doing}, it is {self._state} already", key=self._key)

    def _put(self, data: Sequence[bytes | memoryview]) -> None:
        with closing(Body(data)) as body:
            fields = {"Key": self._path, "Body": body, **body.checksum()}
            self._client.run(lambda call: put_object(call, **fields), "write", self._key)

    def _begun(self) -> str:
        with self._beginning:
            if self._upload is None:
                self._begin()
            assert self._upload is not None
            return self._upload

    def _begin(self) -> None:
        lost = False

        async def begin(call: Call) -> None:
            nonlocal lost
            self._settled.clear()
            try:
                self._check_open("begin")
                answer = await told(call, "create_multipart_upload", Key=self._path, ChecksumAlgorithm="CRC32")
                if not answer.get("UploadId"):
                    raise Incomplete("the answer doesn't name the upload")
            except Exception as error:
                lost = lost or may_be_applied(error)
                raise
            else:
                self._upload = str(answer["UploadId"])
            finally:
                self._settled.set()

        # For the case of an interrupt, whose place is not known.
        self._strays = True
        try:
            self._client.run(begin, "begin an upload", self._key, settle_s=_SETTLE_S)
            self._strays = lost
        except Exception:
            self._strays = lost
            raise

    def _send(self, part: _Part) -> None:
        upload = self._begun()
        with closing(Body(part.data())) as body:
            extra = body.checksum()

            async def send(call: Call) -> dict[str, Any]:
                answer = await told(
                    call, "upload_part", Key=self._path, UploadId=upload, PartNumber=part.number, Body=body, **extra
                )
                if not answer.get("ETag"):
                    raise Incomplete("the answer doesn't say that the part was stored")
                return answer

            answer = self._send_direct(part.number, upload, body, extra) or self._client.run(send, "write", self._key)
        sent = {"PartNumber": part.number, "ETag": answer["ETag"]}
        # Servers that keep it want to see it again.
        sent |= extra if answer.get("ChecksumCRC32") else {}
        with self._lock:
            self._sent[part.number] = sent
            part.pieces.clear()

    def _send_direct(self, number: int, upload: str, body: Body, extra: dict[str, str]) -> dict[str, Any] | None:
        """The answer to a part that was sent on a connection of this thread's own; None where that isn't certain."""
        direct = self._client.direct()
        if direct is None or len(body) < LEAST_BYTES:
            return None
        place = {"Key": self._path, "UploadId": upload, "PartNumber": number}
        signed = self._client.signed_part(**place, Body=body, **extra)
        if signed is None:
            return None
        headers = direct.send(signed, body.pieces)
        if headers is None:
            self._lost = True
            return None
        self._client.answered()
        return {"ETag": headers["ETag"], "ChecksumCRC32": headers.get("x-amz-checksum-crc32")}

    def _complete(self) -> None:
        parts = [self._sent[number] for number in sorted(self._sent)]

        async def complete(call: Call) -> None:
            try:
                answer = await told(
                    call,
                    "complete_multipart_upload",
                    Key=self._path,
                    UploadId=self._upload,
                    MultipartUpload={"Parts": parts},
                )
                if not answer.get("ETag"):
                    raise Incomplete("the answer doesn't say that the upload was completed")
            except Exception as error:
                # The answer to an earlier try was lost, and the upload is no more because it is an object now.
                if code_of(error) != "NoSuchUpload" or await self._size_there(call) != self._end:
                    raise

        self._client.run(complete, "complete", self._key)

    async def _size_there(self, call: Call) -> int:
        found = await call("head_object", Key=self._path)
        return int(found.get("ContentLength", -1))
