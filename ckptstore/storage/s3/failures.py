"""What an error of a request means: for trying again, for what may have happened, and for whoever gets to see it."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable
from socket import gaierror
from typing import Any, Literal

import aiohttp
from botocore import exceptions as boto
from botocore.parsers import ResponseParserError

from ckptstore.errors import (
    CheckpointError,
    ExistsError,
    NotFoundError,
    StorageError,
    StorageFullError,
    UnavailableError,
)
from ckptstore.storage.s3.scrub import scrubbed

_LONGEST = 300
"""Characters of what others say."""

_NEVER_SENT = (
    aiohttp.ClientConnectorError,
    gaierror,
    boto.ConnectTimeoutError,
    boto.ProxyConnectionError,
    boto.SSLError,
)
"""There was no connection."""

_NO_ANSWER = (
    boto.HTTPClientError,
    boto.ConnectionError,
    ResponseParserError,
    boto.IncompleteReadError,
    boto.FlexibleChecksumError,
    aiohttp.ClientError,
    asyncio.TimeoutError,
    OSError,
)
"""The connection failed before, while or after the server did what it was asked for."""

_BUSY = {408, 409, 425, 429, 500, 502, 503, 504}
"""Status codes after which the same request may succeed; 409 is another conditional write to the same key."""

_RETRIED_CODES = {
    "RequestTimeout",
    "SlowDown",
    "Throttling",
    "BadDigest",
    "XAmzContentChecksumMismatch",
    "XAmzContentSHA256Mismatch",
    "MalformedXML",
    "InvalidPart",
    "InvalidPartOrder",
    "InternalError",
    "ServiceUnavailable",
}
"""Also where the status says otherwise. A checksum that doesn't fit was damaged on its way, as was XML that is none, or
that names parts which aren't there."""

_TOO_MUCH = {429, 503}
_TOO_MUCH_CODES = {"SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "TooManyRequests"}

_FULL_CODES = {"QuotaExceeded", "StorageFull", "XMinioStorageFull", "InsufficientCapacity"}


_USER = re.compile(r"(://)[^/@\s]*@")
_QUERY = re.compile(r"(://[^\s?\"'`]*)\?[^\s\"'`]*")


class Incomplete(Exception):  # noqa: N818 - what happened to an answer, dealt with by asking again
    """The answer ended too early, lacks what every such answer has, or contradicts another one."""


def code_of(error: BaseException) -> str:
    """S3's own name of the error, as ``NoSuchKey``; "" where the server sent none."""
    return str(_answer(error).get("Error", {}).get("Code", ""))


def status_of(error: BaseException) -> int:
    """HTTP status of the answer; 0 where there was none."""
    return int(_answer(error).get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def is_missing(error: BaseException) -> bool:
    """Whether the key isn't there. A missing bucket or upload is something else."""
    return status_of(error) == 404 and code_of(error) not in ("NoSuchBucket", "NoSuchUpload")


def is_conflict(error: BaseException) -> bool:
    """Whether a condition of the request wasn't met."""
    return status_of(error) == 412


def is_unsupported(error: BaseException | None) -> bool:
    """Whether the server says that it doesn't know what it was asked for."""
    return error is not None and (status_of(error) == 501 or code_of(error) == "NotImplemented")


def is_too_much(error: BaseException) -> bool:
    """Whether the server wants fewer requests at a time."""
    return status_of(error) in _TOO_MUCH or code_of(error) in _TOO_MUCH_CODES


def is_retried(code: str) -> bool:
    """Whether what S3 calls ``code`` may succeed later, whatever the status."""
    return code in _RETRIED_CODES | _TOO_MUCH_CODES


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed later."""
    if isinstance(error, CheckpointError) or is_unsupported(error):
        return False
    if isinstance(error, boto.HTTPClientError) and isinstance(error.kwargs.get("error"), ValueError):
        # Such a request can't even be made.
        return False
    if isinstance(error, boto.ClientError):
        return status_of(error) in _BUSY or is_retried(code_of(error))
    return isinstance(error, (*_NEVER_SENT, *_NO_ANSWER, Incomplete))


def is_never_sent(error: BaseException) -> bool:
    """Whether there was no connection to send the request on."""
    if isinstance(error, boto.EndpointConnectionError):
        # So aiobotocore also calls a connection that broke when the request had been sent.
        error = error.kwargs.get("error", error)
    return isinstance(error, _NEVER_SENT)


def may_be_applied(error: BaseException) -> bool:
    """Whether the server may have done what it was asked for: it gave no answer, or one of a gateway before it."""
    if isinstance(error, boto.ClientError):
        return status_of(error) >= 500 or status_of(error) < 300
    return isinstance(error, (*_NO_ANSWER, Incomplete)) and not is_never_sent(error)


def translate(error: BaseException, doing: str, where: str, key: str, secrets: Iterable[str] = ()) -> CheckpointError:
    """The error to raise for one of s3fs, botocore or the connection; ``doing`` and ``where`` for its message."""
    if isinstance(error, CheckpointError):
        return error
    place, code = f"{where}: {doing} failed", code_of(error)
    said = _said(error, set(secrets))
    if is_missing(error):
        return NotFoundError(f"{where} doesn't exist", key=key)
    if is_conflict(error):
        return ExistsError(f"{where} exists already, and nothing is ever overwritten", key=key)
    if code == "NoSuchUpload":
        return StorageError(f"{place}: its upload was dropped, as when prune takes the save for dead", key=key)
    if code == "NoSuchBucket":
        return StorageError(f"{place}: there is no such bucket; make it first, or mend the URL", key=key)
    if code in _FULL_CODES:
        return StorageFullError(f"{place}: {said}", key=key)
    if status_of(error) in (401, 403) or isinstance(error, boto.NoCredentialsError | boto.PartialCredentialsError):
        return UnavailableError(
            f"{place}: {said}. Give credentials by the environment or storage_options, and see what they allow",
            transient=False,
            key=key,
        )
    outcome: Literal["failed", "unknown"] = "unknown" if may_be_applied(error) else "failed"
    if is_transient(error):
        return UnavailableError(f"{place}: {said}", outcome=outcome, key=key)
    return StorageError(f"{place}: {said}", outcome=outcome, key=key)


def without_secrets(text: str) -> str:
    """``text`` without the users, passwords and queries of the URLs in it."""
    return _QUERY.sub(r"\1", _USER.sub(r"\1", text))


def _said(error: BaseException, secrets: set[str]) -> str:
    # Cut only when nothing is left to be found: half a secret isn't recognised.
    if isinstance(error, boto.ClientError):
        message = scrubbed(str(_answer(error).get("Error", {}).get("Message", "")), secrets)[:_LONGEST]
        return f"{code_of(error) or 'error'} ({status_of(error)}) {message}".strip(" .")
    return without_secrets(scrubbed(f"{type(error).__name__}: {error}", secrets))[:_LONGEST].rstrip(".")


def _answer(error: BaseException) -> dict[str, Any]:
    return error.response if isinstance(error, boto.ClientError) else {}
