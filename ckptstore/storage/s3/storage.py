"""Objects in a bucket, below one prefix."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace as changed
from functools import partial
from itertools import islice
from typing import Any

from ckptstore.errors import ExistsError, FormatError, NotFoundError, StorageError
from ckptstore.storage.base import Capabilities, Entry, Upload, check_key, check_prefix
from ckptstore.storage.s3.answers import about_object, listing, put_object, tells_of_object, told
from ckptstore.storage.s3.client import Call, S3Client
from ckptstore.storage.s3.download import S3Reader
from ckptstore.storage.s3.failures import (
    Incomplete,
    code_of,
    is_conflict,
    is_missing,
    is_retried,
    is_unsupported,
    may_be_applied,
)
from ckptstore.storage.s3.move import copy_within
from ckptstore.storage.s3.probe import Findings, probe
from ckptstore.storage.s3.upload import S3Writer, checksum

_NONCE = "ckptstore-nonce"
_DELETED_AT_ONCE = 1000
_IN_FLIGHT = 8


class S3Storage:
    """Objects whose keys begin with ``prefix`` in ``bucket``.

    Args:
        bucket: which must exist.
        prefix: "" or names joined by "/".
        options: of ``s3fs.S3FileSystem``: credentials, endpoint, encryption. Without them the usual AWS environment
            is asked.
        read_only: refuse every write.
        patient: try requests again for minutes, as a run does that must not end with its network.

    Raises:
        StorageError: options that s3fs doesn't take.
    """

    def __init__(
        self,
        bucket: str,
        prefix: str,
        options: Mapping[str, Any],
        *,
        read_only: bool = False,
        patient: bool = False,
    ) -> None:
        self.url = f"s3://{bucket}/{prefix}".rstrip("/")
        self.capabilities = Capabilities(
            durability="power-cut", atomic_create=True, direct_io=False, kind="s3", in_flight=_IN_FLIGHT
        )
        self._prefix = f"{prefix}/" if prefix else ""
        self._client = S3Client(bucket, self._prefix, options, patient=patient)
        self._read_only = read_only
        self._closed = False

    def list(self, prefix: str) -> list[Entry]:
        """All objects under ``prefix``, sorted by key; see ``Storage.list``."""
        self._check_opened()
        path = self._prefix + check_prefix(prefix)

        async def pages(call: Call) -> list[Entry]:
            found: list[Entry] = []
            more: dict[str, str] = {}
            while True:
                page = await listing(call, "list_objects_v2", Prefix=path, **more)
                found += map(self._entry, page.get("Contents", []))
                if not page.get("IsTruncated"):
                    return found
                more = {"ContinuationToken": page["NextContinuationToken"]}

        return sorted(self._client.run(pages, "list", prefix))

    def size(self, key: str) -> int:
        """Size in bytes; see ``Storage.size``."""
        return int(self._head(key)["ContentLength"])

    def read(self, key: str, *, limit: int) -> bytes:
        """The whole object; see ``Storage.read``."""
        path = self._path(key)

        async def get(call: Call) -> bytes:
            answer = await about_object(call, "get_object", Key=path)
            size = int(answer["ContentLength"])
            body = answer["Body"]
            async with body:
                if size > limit:
                    raise FormatError(f"{self.url}/{key} has {size} bytes; at most {limit} are accepted here", key=key)
                data: bytes = await body.read()
            if len(data) != size:
                raise Incomplete(f"{len(data)} of {size} bytes")
            return data

        return self._client.run(get, "read", key)

    def create(self, key: str, data: bytes) -> None:
        """Put a small object unless the key is taken; see ``Storage.create``.

        A try whose answer was lost may have been applied, and some gateways send a request twice: a random number
        beside the data tells whose work it is that stands in the way.
        """
        path = self._path(key, writing=True)
        nonce, unsure = secrets.token_hex(16), False
        fields = {"Key": path, "Body": data, "Metadata": {_NONCE: nonce}, **checksum(data)}

        async def put(call: Call) -> None:
            nonlocal unsure
            try:
                if self.capabilities.exclusive_create:
                    await put_object(call, IfNoneMatch="*", **fields)
                else:
                    await self._put_unless_seen(call, fields, nonce if unsure else "")
            except Exception as error:
                unsure = unsure or may_be_applied(error)
                if not is_conflict(error) or await _nonce_at(call, path) != nonce:
                    raise

        try:
            self._client.run(put, "create", key)
        except StorageError as error:
            if self.capabilities.exclusive_create and is_unsupported(error.__cause__):
                self.capabilities = changed(self.capabilities, exclusive_create=False)
                self.create(key, data)
                return
            if unsure:
                error.outcome = "unknown"
            raise

    def open_writer(self, key: str, *, size: int | None = None) -> S3Writer:
        """Begin a large object; see ``Storage.open_writer``."""
        path = self._path(key, writing=True)

        async def look(call: Call) -> None:
            # That there is none is believed: such a key has a random part, and nobody else writes it.
            tells_of_object(await call("head_object", Key=path))

        try:
            self._client.run(look, "look at", key)
        except NotFoundError:
            return S3Writer(self._client, path, key, size)
        raise ExistsError(f"{self.url}/{key} exists already, and nothing is ever overwritten", key=key)

    def open_reader(self, key: str, *, size: int | None = None) -> S3Reader:
        """Open an object for reading; see ``Storage.open_reader``."""
        if size is not None:
            return S3Reader(self._client, self._path(key), key, size)
        head = self._head(key)
        return S3Reader(self._client, self._path(key), key, int(head["ContentLength"]), head["ETag"])

    def delete(self, keys: Iterable[str]) -> None:
        """Remove objects; see ``Storage.delete``. A key that ends in "/" is no object here."""
        names = [check_key(key.removesuffix("/")) for key in keys if not key.endswith("/") or check_prefix(key)]
        self._check_writable()
        paths = iter([self._prefix + name for name in names])
        while batch := tuple(islice(paths, _DELETED_AT_ONCE)):
            self._delete(batch)

    def replace(self, key: str, by: str) -> None:
        """Put ``by`` in the place of ``key``, copied by the server; see ``Storage.replace``."""
        target, source = self._path(key, writing=True), self._path(by)
        copy_within(self._client, source, target, int(self._head(by)["ContentLength"]), key)
        self._delete([source])

    def probe(self, key: str, data: bytes) -> None:
        """Try conditions, checksums, ranges and reading back; see ``Storage.probe``."""
        found: Findings = probe(self._client, self._path(key, writing=True), key, data)
        self.capabilities = changed(
            self.capabilities, exclusive_create=found.exclusive_create, checks_writes=found.checks_writes
        )

    def uploads(self) -> Sequence[Upload]:
        """Multipart uploads that are not complete; see ``Storage.uploads``."""
        self._check_opened()

        async def pages(call: Call) -> list[Upload]:
            found: list[Upload] = []
            more: dict[str, str] = {}
            while True:
                page = await listing(call, "list_multipart_uploads", Prefix=self._prefix, **more)
                for item in page.get("Uploads", []):
                    key = item["Key"][len(self._prefix) :]
                    found.append(Upload(key, item["UploadId"], item["Initiated"].timestamp()))
                if not page.get("IsTruncated"):
                    return found
                more = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page.get("NextUploadIdMarker", "")}

        return sorted(self._client.run(pages, "list uploads below", ""))

    def abort_uploads(self, uploads: Iterable[Upload]) -> None:
        """Drop the parts that were sent; see ``Storage.abort_uploads``."""
        self._check_writable()
        for upload in uploads:
            path = self._path(upload.key, writing=True)
            self._client.run(partial(_abort, path=path, token=upload.token), "abort the upload of", upload.key)

    def close(self) -> None:
        """Close idle connections; the others are shared. Safe to call twice."""
        self._closed = True
        self._client.close()

    async def _put_unless_seen(self, call: Call, fields: Mapping[str, Any], own_nonce: str) -> None:
        """What can be done where the server knows no conditions: look, then put. Another may come in between."""
        try:
            found = await call("head_object", Key=fields["Key"])
        except Exception as error:
            if not is_missing(error):
                raise
            await put_object(call, **fields)
            return
        if not own_nonce or found.get("Metadata", {}).get(_NONCE) != own_nonce:
            key = fields["Key"][len(self._prefix) :]
            raise ExistsError(f"{self.url}/{key} exists already, and nothing is ever overwritten", key=key)

    def _delete(self, paths: Sequence[str]) -> None:
        async def delete(call: Call) -> None:
            # Not quietly: then an answer that says nothing at all is noticed.
            answer = await told(call, "delete_objects", Delete={"Objects": [{"Key": path} for path in paths]})
            failures = [failed for failed in answer.get("Errors", []) if failed.get("Code") != "NoSuchKey"]
            if "Deleted" not in answer and "Errors" not in answer:
                raise Incomplete("the answer doesn't say what was deleted")
            for failed in failures:
                said = f"{failed.get('Key')} can't be removed: {failed.get('Code')} {failed.get('Message', '')}"
                if is_retried(failed.get("Code", "")):
                    raise Incomplete(said)
                raise StorageError(f"{self.url}: {said}")

        self._client.run(delete, "delete", paths[0][len(self._prefix) :])

    def _entry(self, listed: dict[str, Any]) -> Entry:
        return Entry(listed["Key"][len(self._prefix) :], int(listed["Size"]), listed["LastModified"].timestamp())

    def _head(self, key: str) -> dict[str, Any]:
        path = self._path(key)
        return self._client.run(lambda call: about_object(call, "head_object", Key=path), "look at", key)

    def _path(self, key: str, *, writing: bool = False) -> str:
        check_key(key)
        if writing:
            self._check_writable()
        self._check_opened()
        return self._prefix + key

    def _check_opened(self) -> None:
        if self._closed:
            raise StorageError(f"{self.url} was closed")

    def _check_writable(self) -> None:
        if self._read_only:
            raise StorageError(f"{self.url} was opened read-only; open it without read_only=True to write")
        self._check_opened()


async def _nonce_at(call: Call, path: str) -> str:
    """What ``create`` wrote beside an object that was in its way."""
    try:
        found = await call("head_object", Key=path)
    except Exception as error:
        if is_missing(error):
            raise Incomplete("it is said to exist, and isn't there") from error
        raise
    return str(found.get("Metadata", {}).get(_NONCE, ""))


async def _abort(call: Call, *, path: str, token: str) -> None:
    try:
        await told(call, "abort_multipart_upload", Key=path, UploadId=token)
    except Exception as error:
        if code_of(error) != "NoSuchUpload":
            raise
