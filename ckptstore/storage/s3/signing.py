"""Parts of large objects are not hashed once more to be signed, also where the connection isn't encrypted.

Over TLS botocore leaves it out by itself. What a part holds is told by its digest, in records which are signed whole;
its checksum, which the server verifies, is among what is signed of the request.
"""

from __future__ import annotations

from typing import Any

from botocore.config import Config


def leave_parts_unsigned(client: Any) -> None:
    """Let ``client`` do so, unless its configuration says whether payloads are signed. Safe to call again."""
    client.meta.events.register("before-sign.s3.UploadPart", _leave_unsigned, unique_id="ckptstore-parts")


def _leave_unsigned(request: Any, **_: Any) -> None:
    config = request.context["client_config"]
    settings = config.s3 or {}
    if settings.get("payload_signing_enabled") is None:
        unsigned = Config(s3={**settings, "payload_signing_enabled": False})
        request.context["client_config"] = config.merge(unsigned)
