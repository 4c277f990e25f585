"""One large object on its way up: in parts where it has several, at once where it is small."""

from __future__ import annotations

import base64
import threading
import zlib
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from ckptstore.errors import CheckpointError, StorageError
from ckptstore.storage.base import Slot
from ckptstore.storage.s3.client import Call, S3Client
from ckptstore.storage.s3.failures import code_of, is_missing

LEAST_PART_BYTES = 5 << 20
"""S3 takes no smaller part but the last."""
MOST_PARTS = 10_000


def checksum(data: bytes) -> dict[str, str]:
    """The header by which the server verifies what it got."""
    return {"ChecksumCRC32": base64.b64encode(zlib.crc32(data).to_bytes(4, "big")).decode()}


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
    pieces: dict[int, bytes] = field(default_factory=dict)
    closed: bool = False

    @property
    def length(self) -> int:
        return sum(slot.length for slot in self.slots)

    @property
    def full(self) -> bool:
        return self.closed and len(self.pieces) == len(self.slots)

    def data(self) -> bytes:
        if len(self.slots) == 1:
            return self.pieces[self.slots[0].number]
        return b"".join(self.pieces[slot.number] for slot in self.slots)


class S3Writer:
    """An object in the making; invisible until ``finish``. ``write`` sends, and returns when the server has it."""

    def __init__(self, client: S3Client, path: str, key: str, size: int | None) -> None:
        self._client, self._path, self._key, self._size = client, path, key, size
        self._lock = threading.Lock()
        self._parts: list[_Part] = []
        self._part_of: dict[int, _Part] = {}
        self._end = 0
        self._upload: str | None = None
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
                part.pieces[slot.number] = bytes(data)
                # The last of a known size is known to be the only one, and then goes up at once.
                ready = part.full and not self._is_only(part)
            if ready:
                self._send(part)
        except BaseException:
            self._state = "failed"
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
                self._put(b"".join(part.data() for part in self._parts))
            else:
                for part in self._parts:
                    if part.number not in self._sent:
                        self._send(part)
                self._complete()
        except BaseException:
            self._state = "failed"
            raise
        self._state = "finished"
        return self._end

    def abort(self) -> None:
        """Drop the upload. Never raises; does nothing after ``finish``."""
        if self._state in ("finished", "aborted"):
            return
        self._state = "aborted"
        upload = self._upload
        if upload is not None:
            with suppress(CheckpointError):
                self._client.run(
                    lambda call: call("abort_multipart_upload", Key=self._path, UploadId=upload), "abort", self._key
                )

    def _is_only(self, part: _Part) -> bool:
        return part.number == 1 and self._size is not None and part.length == self._size

    def _check_open(self, doing: str) -> None:
        if self._state != "open":
            raise StorageError(f"{self._key}: can't {doing}, it is {self._state} already", key=self._key)

    def _put(self, data: bytes) -> None:
        extra = checksum(data)
        self._client.run(lambda call: call("put_object", Key=self._path, Body=data, **extra), "write", self._key)

    def _begun(self) -> str:
        with self._beginning:
            if self._upload is None:
                answer = self._client.run(
                    lambda call: call("create_multipart_upload", Key=self._path, ChecksumAlgorithm="CRC32"),
                    "begin an upload",
                    self._key,
                )
                self._upload = str(answer["UploadId"])
            return self._upload

    def _send(self, part: _Part) -> None:
        upload, data = self._begun(), part.data()
        extra = checksum(data)

        async def send(call: Call) -> dict[str, Any]:
            return await call(
                "upload_part", Key=self._path, UploadId=upload, PartNumber=part.number, Body=data, **extra
            )

        answer = self._client.run(send, "write", self._key)
        sent = {"PartNumber": part.number, "ETag": answer["ETag"]}
        # Servers that keep it want to see it again.
        sent |= extra if answer.get("ChecksumCRC32") else {}
        with self._lock:
            self._sent[part.number] = sent
            part.pieces.clear()

    def _complete(self) -> None:
        parts = [self._sent[number] for number in sorted(self._sent)]
        retried = False

        async def complete(call: Call) -> None:
            nonlocal retried
            try:
                await call(
                    "complete_multipart_upload",
                    Key=self._path,
                    UploadId=self._upload,
                    MultipartUpload={"Parts": parts},
                )
            except Exception as error:
                # The answer to an earlier try was lost, and the upload is no more because it is an object now.
                lost = retried and (code_of(error) == "NoSuchUpload" or is_missing(error))
                retried = True
                if not lost or (await call("head_object", Key=self._path))["ContentLength"] != self._end:
                    raise

        self._client.run(complete, "complete", self._key)
