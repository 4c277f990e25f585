"""A server that speaks S3, its objects in memory: for tests that need thousands of fresh ones.

What it does was taken from the real server that the other tests use: the same contract is tested on both.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import threading
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import format_datetime
from typing import Any
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from tests.s3.wire import Request, Response

_PAGE = 1000


@dataclass(frozen=True)
class Stored:
    """One object."""

    data: bytes
    etag: str
    fields: dict[str, str]
    modified: datetime = field(default_factory=lambda: datetime.now(UTC))


@dataclass
class Open:
    """A multipart upload that was begun."""

    key: str
    fields: dict[str, str]
    parts: dict[int, bytes] = field(default_factory=dict)
    begun: datetime = field(default_factory=lambda: datetime.now(UTC))


class S3Error(Exception):
    """An answer that says what is wrong."""

    def __init__(self, status: int, code: str) -> None:
        super().__init__(code)
        self.response = error(status, code)


def error(status: int, code: str, message: str = "so it is") -> Response:
    """S3's way to say no."""
    text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>"
    return Response(status, text.encode(), {"content-type": "application/xml"})


class MemoryBucket:
    """The bucket of that name; every other one doesn't exist. ``page`` is how many keys one listing has at most."""

    def __init__(self, name: str, *, page: int = _PAGE) -> None:
        self.name, self.page = name, page
        self.objects: dict[str, Stored] = {}
        self.uploads: dict[str, Open] = {}
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()

    def snapshot(self) -> dict[str, Stored]:
        return dict(self.objects)

    def restore(self, objects: dict[str, Stored]) -> None:
        with self._lock:
            self.objects, self.uploads = dict(objects), {}

    def __call__(self, request: Request) -> Response:
        try:
            if request.path.lstrip("/").partition("/")[0] != self.name:
                raise S3Error(404, "NoSuchBucket")
            _check_body(request)
            handle: Callable[[Request], Response] = getattr(self, f"_{request.operation.lower()}")
            with self._lock:
                return handle(request)
        except S3Error as failed:
            return failed.response

    # -- objects -----------------------------------------------------------------------------------------

    def _get(self, request: Request) -> Response:
        found = self._existing(request.key)
        condition = request.headers.get("if-match")
        if condition is not None and condition != found.etag:
            raise S3Error(412, "PreconditionFailed")
        headers = {
            "etag": found.etag,
            "last-modified": format_datetime(found.modified, usegmt=True),
            "accept-ranges": "bytes",
            **found.fields,
        }
        span = request.headers.get("range")
        if span is None:
            return Response(200, found.data, headers)
        headers = {name: value for name, value in headers.items() if not name.startswith("x-amz-checksum")}
        first, last = (int(n) for n in span.removeprefix("bytes=").split("-"))
        if first >= len(found.data):
            raise S3Error(416, "InvalidRange")
        last = min(last, len(found.data) - 1)
        headers["content-range"] = f"bytes {first}-{last}/{len(found.data)}"
        return Response(206, found.data[first : last + 1], headers)

    _head = _get

    def _put(self, request: Request) -> Response:
        if request.headers.get("if-none-match") == "*" and request.key in self.objects:
            raise S3Error(412, "PreconditionFailed")
        return self._store(request.key, request.body, _fields(request))

    def _copy(self, request: Request) -> Response:
        source = request.headers["x-amz-copy-source"].lstrip("/").partition("/")[2]
        found = self._existing(source)
        self._store(request.key, found.data, found.fields)
        return _xml("CopyObjectResult", f"<ETag>{escape(found.etag)}</ETag>")

    def _delete(self, request: Request) -> Response:
        keys = [element.text or "" for element in ElementTree.fromstring(request.body).iter() if _is(element, "Key")]
        for key in keys:
            self.objects.pop(key, None)
        return _xml("DeleteResult", "".join(f"<Deleted><Key>{escape(key)}</Key></Deleted>" for key in keys))

    def _deleteone(self, request: Request) -> Response:
        self.objects.pop(request.key, None)
        return Response(204)

    # -- listings ----------------------------------------------------------------------------------------

    def _list(self, request: Request) -> Response:
        prefix, after = request.query.get("prefix", ""), request.query.get("continuation-token", "")
        limit = min(self.page, int(request.query.get("max-keys", self.page)))
        keys = sorted(key for key in self.objects if key.startswith(prefix) and key > after)
        shown, more = keys[:limit], len(keys) > limit
        rows = "".join(_row(key, self.objects[key]) for key in shown)
        token = f"<NextContinuationToken>{escape(shown[-1])}</NextContinuationToken>" if more else ""
        head = f"<Name>{self.name}</Name><Prefix>{escape(prefix)}</Prefix><KeyCount>{len(shown)}</KeyCount>"
        return _xml("ListBucketResult", f"{head}<IsTruncated>{str(more).lower()}</IsTruncated>{token}{rows}")

    def _listuploads(self, request: Request) -> Response:
        prefix = request.query.get("prefix", "")
        rows = "".join(
            f"<Upload><Key>{escape(u.key)}</Key><UploadId>{id}</UploadId><Initiated>{_iso(u.begun)}</Initiated></Upload>"
            for id, u in self.uploads.items()
            if u.key.startswith(prefix)
        )
        return _xml("ListMultipartUploadsResult", f"<Bucket>{self.name}</Bucket><IsTruncated>false</IsTruncated>{rows}")

    # -- uploads in parts --------------------------------------------------------------------------------

    def _begin(self, request: Request) -> Response:
        id = f"upload-{next(self._numbers)}"
        self.uploads[id] = Open(request.key, _fields(request))
        return _xml("InitiateMultipartUploadResult", f"<Key>{escape(request.key)}</Key><UploadId>{id}</UploadId>")

    def _part(self, request: Request) -> Response:
        self._opened(request).parts[int(request.query["partNumber"])] = request.body
        return Response(200, b"", {"etag": _etag(request.body)})

    def _complete(self, request: Request) -> Response:
        upload = self._opened(request)
        wanted = [element for element in ElementTree.fromstring(request.body) if _is(element, "Part")]
        data = b""
        for part in wanted:
            said = {element.tag.rpartition("}")[2]: element.text or "" for element in part}
            body = upload.parts.get(int(said["PartNumber"]))
            if body is None or said["ETag"] != _etag(body):
                raise S3Error(400, "InvalidPart")
            data += body
        del self.uploads[request.query["uploadId"]]
        self._store(upload.key, data, upload.fields)
        return _xml("CompleteMultipartUploadResult", f"<ETag>{escape(self.objects[upload.key].etag)}</ETag>")

    def _abort(self, request: Request) -> Response:
        self._opened(request)
        del self.uploads[request.query["uploadId"]]
        return Response(204)

    def _opened(self, request: Request) -> Open:
        upload = self.uploads.get(request.query["uploadId"])
        if upload is None or upload.key != request.key:
            raise S3Error(404, "NoSuchUpload")
        return upload

    def _existing(self, key: str) -> Stored:
        if key not in self.objects:
            raise S3Error(404, "NoSuchKey")
        return self.objects[key]

    def _store(self, key: str, data: bytes, fields: dict[str, str]) -> Response:
        self.objects[key] = Stored(data, _etag(data), fields)
        return Response(200, b"", {"etag": _etag(data)})


def _check_body(request: Request) -> None:
    """As a server does that was given the means to: refuse what was damaged on its way up."""
    signed = request.headers.get("x-amz-content-sha256", "")
    if len(signed) == 64 and hashlib.sha256(request.body).hexdigest() != signed:
        raise S3Error(400, "XAmzContentSHA256Mismatch")
    crc = request.headers.get("x-amz-checksum-crc32")
    if crc is not None and base64.b64encode(zlib.crc32(request.body).to_bytes(4, "big")).decode() != crc:
        raise S3Error(400, "BadDigest")


def _fields(request: Request) -> dict[str, str]:
    return {name: value for name, value in request.headers.items() if name.startswith("x-amz-meta-")}


def _etag(data: bytes) -> str:
    return f'"{hashlib.md5(data).hexdigest()}"'


def _row(key: str, stored: Stored) -> str:
    return (
        f"<Contents><Key>{escape(key)}</Key><LastModified>{_iso(stored.modified)}</LastModified>"
        f"<ETag>{escape(stored.etag)}</ETag><Size>{len(stored.data)}</Size></Contents>"
    )


def _iso(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%S.000Z")


def _is(element: Any, name: str) -> bool:
    return bool(element.tag.rpartition("}")[2] == name)


def _xml(root: str, inner: str) -> Response:
    text = f"<?xml version='1.0'?><{root} xmlns='http://s3.amazonaws.com/doc/2006-03-01/'>{inner}</{root}>"
    return Response(200, text.encode(), {"content-type": "application/xml"})
