"""What a server that speaks S3 really does: tried at one object, whose bytes are known and stay what they are."""

from __future__ import annotations

from typing import Any, NamedTuple

from ckptstore.errors import StorageError
from ckptstore.storage.s3.client import Call, S3Client
from ckptstore.storage.s3.failures import is_conflict, is_unsupported, status_of
from ckptstore.storage.s3.upload import checksum


class Findings(NamedTuple):
    """As in ``Capabilities``."""

    exclusive_create: bool
    checks_writes: bool


def probe(client: S3Client, path: str, key: str, data: bytes) -> Findings:
    """Try the server at ``path``, which holds ``data``; each request that may be applied writes just ``data`` again.

    Raises:
        StorageError: it failed, can't read ranges, or gives other bytes than it got.
    """
    body = client.run(lambda call: _read(call, path, {}), "read back", key)
    if body != data:
        raise StorageError(
            f"s3://{client.bucket}/{path} was written with {len(data)} bytes and read back with {len(body)} others: "
            "the server changes what it stores (some store the checksums of newer clients inside the object)",
            key=key,
        )
    first, last = len(data) // 3, len(data) // 2
    part = client.run(lambda call: _read(call, path, {"Range": f"bytes={first}-{last}"}), "read a range of", key)
    if part != data[first : last + 1]:
        raise StorageError(f"s3://{client.bucket}: the server doesn't read ranges of an object", key=key)
    refuses_existing = client.run(lambda call: _refuses(call, path, data, {"IfNoneMatch": "*"}), "try", key)
    refuses_damaged = client.run(lambda call: _refuses(call, path, data, checksum(data + b"?")), "try", key)
    return Findings(refuses_existing, refuses_damaged)


async def _read(call: Call, path: str, span: dict[str, str]) -> bytes:
    answer = await call("get_object", Key=path, **span)
    async with answer["Body"] as body:
        data: bytes = await body.read()
    return data


async def _refuses(call: Call, path: str, data: bytes, extra: dict[str, Any]) -> bool:
    """Whether the server refuses to put ``data``, which is there already, for the reason that ``extra`` gives it."""
    try:
        await call("put_object", Key=path, Body=data, **(checksum(data) | extra))
    except Exception as error:
        if is_conflict(error):
            return True
        if is_unsupported(error):
            return False
        # Servers call it BadDigest, InvalidDigest, XAmzContentChecksumMismatch or just a bad request.
        if status_of(error) == 400 and "IfNoneMatch" not in extra:
            return True
        raise
    return False
