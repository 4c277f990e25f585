"""Objects copied by the server, without their bytes coming here."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from ckptstore.errors import CheckpointError
from ckptstore.storage.s3.answers import told
from ckptstore.storage.s3.client import Call, S3Client
from ckptstore.storage.s3.failures import Incomplete

COPIED_AT_ONCE_BYTES = 5 << 30
"""S3 copies no larger object in one request."""
_PART_BYTES = 1 << 30


def copy_within(client: S3Client, source: str, target: str, size: int, key: str) -> None:
    """Have the server copy ``source`` over ``target``, both full names in the bucket; ``key`` is for messages.

    Raises:
        StorageError: the copy failed, or there is no source; ``target`` is what it was, or the copy.
    """
    origin = {"Bucket": client.bucket, "Key": source}
    if size <= COPIED_AT_ONCE_BYTES:
        client.run(lambda call: _copy(call, target, origin), "replace", key)
        return
    begun = client.run(lambda call: call("create_multipart_upload", Key=target), "replace", key)
    upload = {"Key": target, "UploadId": begun["UploadId"]}
    try:
        parts = [
            _copy_part(client, upload, number, origin, offset, min(offset + _PART_BYTES, size) - 1, key)
            for number, offset in enumerate(range(0, size, _PART_BYTES), start=1)
        ]
        whole = {"Parts": parts}
        client.run(lambda call: call("complete_multipart_upload", MultipartUpload=whole, **upload), "replace", key)
    except BaseException:
        with suppress(CheckpointError):
            client.run(lambda call: call("abort_multipart_upload", **upload), "abort", key)
        raise


async def _copy(call: Call, target: str, origin: dict[str, str]) -> None:
    # The source was there a moment ago, and nobody else knows its name.
    answer = await told(call, "copy_object", Key=target, CopySource=origin)
    if not answer.get("CopyObjectResult", {}).get("ETag"):
        raise Incomplete("the answer doesn't say that it was copied")


def _copy_part(
    client: S3Client, upload: dict[str, Any], number: int, origin: dict[str, str], first: int, last: int, key: str
) -> dict[str, Any]:
    async def copy(call: Call) -> dict[str, Any]:
        span = f"bytes={first}-{last}"
        return await told(
            call, "upload_part_copy", PartNumber=number, CopySource=origin, CopySourceRange=span, **upload
        )

    return {"PartNumber": number, "ETag": client.run(copy, "replace", key)["CopyPartResult"]["ETag"]}
