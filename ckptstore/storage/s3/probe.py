"""What a server that speaks S3 really does: tried at one object, whose bytes are known and stay what they are."""

from __future__ import annotations

from typing import Any, NamedTuple

from ckptstore.errors import StorageError
from ckptstore.storage.s3.answers import about_object, put_object
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
    body = _read(client, path, key, {}, data)
    if body != data:
        raise StorageError(
            f"s3://{client.bucket}/{path} was written with {len(data)} bytes and read back with {len(body)} others: "
            "the server changes what it stores (some store the checksums of newer clients inside the object)",
            key=key,
        )
    first, last = len(data) // 3, len(data) // 2
    part = data[first : last + 1]
    if _read(client, path, key, {"Range": f"bytes={first}-{last}"}, part) != part:
        raise StorageError(f"s3://{client.bucket}: the server doesn't read ranges of an object", key=key)
    refuses_existing = client.run(lambda call: _refuses(call, path, data, {"IfNoneMatch": "*"}), "try", key)
    refuses_damaged = client.run(lambda call: _refuses(call, path, data, checksum(data + b"?")), "try", key)
    return Findings(refuses_existing, refuses_damaged)


def _read(client: S3Client, path: str, key: str, span: dict[str, str], expected: bytes) -> bytes:
    """What the server gives; asked a second time where that is not ``expected``: a flip on the way heals by itself."""

    async def read(call: Call) -> bytes:
        answer = await about_object(call, "get_object", Key=path, **span)
        async with answer["Body"] as body:
            data: bytes = await body.read()
        return data

    found = client.run(read, "read back", key)
    return found if found == expected else client.run(read, "read back", key)


async def _refuses(call: Call, path: str, data: bytes, extra: dict[str, Any]) -> bool:
    """Whether the server refuses to put ``data``, which is there already, for the reason that ``extra`` gives it."""
    try:
        await put_object(call, Key=path, Body=data, **(checksum(data) | extra))
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
