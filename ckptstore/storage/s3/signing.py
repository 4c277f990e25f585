"""How requests are signed: what is left out, and one that is signed here and sent by others.

Parts of large objects are not hashed once more to be signed, also where the connection isn't encrypted.

Over TLS botocore leaves it out by itself. What a part holds is told by its digest, in records which are signed whole;
its checksum, which the server verifies, is among what is signed of the request.
"""

from __future__ import annotations

import time
from contextvars import ContextVar
from typing import Any

from botocore.config import Config

_VALID_S = 120.0
"""Servers take a signature for a quarter of an hour; credentials may be of a session that ends before."""

_kept: ContextVar[bool] = ContextVar("kept", default=False)


class Signed:
    """A request for a whole object, to which a range and a condition may be added, or one that carries a part of one.
    Both attributes are secret."""

    def __init__(self, url: str, headers: dict[str, str]) -> None:
        self.url, self.headers = url, headers
        self._until = time.monotonic() + _VALID_S

    def is_old(self) -> bool:
        """Whether it has to be signed anew."""
        return time.monotonic() >= self._until


class _Kept(BaseException):
    """Carries a request from where it would have been sent. No error, which botocore would log and try again."""

    def __init__(self, request: Any) -> None:
        super().__init__()
        self.request = request


async def signed_get(client: Any, **parameters: Any) -> Signed:
    """What ``client.get_object`` would send; it isn't sent."""
    return await _signed(client, "GetObject", client.get_object, parameters)


async def signed_part(client: Any, **parameters: Any) -> Signed:
    """What ``client.upload_part`` would send, but for the body; it isn't sent."""
    leave_parts_unsigned(client)
    return await _signed(client, "UploadPart", client.upload_part, parameters)


async def _signed(client: Any, operation: str, request: Any, parameters: dict[str, Any]) -> Signed:
    """What ``request`` would send.

    Not a presigned URL: for those botocore may choose a signature of old that many servers refuse, and some buckets
    take none.
    """
    client.meta.events.register(f"before-send.s3.{operation}", _keep, unique_id=f"ckptstore-{operation}")
    token = _kept.set(True)
    try:
        await request(**parameters)
    except _Kept as kept:
        fields = kept.request.headers.items()
        return Signed(kept.request.url, {name: _text(value) for name, value in fields})
    finally:
        _kept.reset(token)
    raise RuntimeError("the request was answered before it was sent")


def _keep(request: Any, **_: Any) -> None:
    if _kept.get():
        raise _Kept(request)


def _text(value: str | bytes) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else value


def leave_parts_unsigned(client: Any) -> None:
    """Let ``client`` do so, unless its configuration says whether payloads are signed. Safe to call again."""
    client.meta.events.register("before-sign.s3.UploadPart", _leave_unsigned, unique_id="ckptstore-parts")


def _leave_unsigned(request: Any, **_: Any) -> None:
    config = request.context["client_config"]
    settings = config.s3 or {}
    if settings.get("payload_signing_enabled") is None:
        unsigned = Config(s3={**settings, "payload_signing_enabled": False})
        request.context["client_config"] = config.merge(unsigned)
