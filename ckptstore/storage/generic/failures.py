"""What an error of some file system means. Each has errors of its own; what they have in common is looked for.

Their packages are not imported here: an error is known by its class's name and by the HTTP status that it carries.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from typing import Any

from ckptstore.errors import (
    CheckpointError,
    ExistsError,
    NotFoundError,
    StorageError,
    StorageFullError,
    UnavailableError,
)

_NEVER_SENT = {
    *("ClientConnectorError", "ServiceRequestError", "NewConnectionError", "ConnectTimeout", "ConnectTimeoutError"),
    *("EndpointConnectionError", "NoValidConnectionsError", "ConnectError"),
}
"""There was no connection (aiohttp, azure, urllib3, requests, botocore, paramiko, httpx)."""

_NO_ANSWER = {
    *("ClientConnectionError", "ClientPayloadError", "HTTPClientError", "ResponseParserError", "IncompleteReadError"),
    *("ServiceResponseError", "Timeout", "ChunkedEncodingError", "ProxyError", "TransportError", "SSHException"),
    *("TimeoutError", "ConnectionError", "EOFError", "ChecksumError"),
}
"""The connection failed before, while or after the server did what it was asked for."""

_DENIED = {
    *("GoogleAuthError", "ClientAuthenticationError", "NoCredentialsError", "PartialCredentialsError"),
    *("AuthenticationException", "PermissionError", "BadHostKeyException"),
}

_BUSY = {408, 409, 425, 429, 500, 502, 503, 504}
"""Status codes after which the same request may succeed; 409 is another conditional write to the same key."""

_BUSY_ERRNOS = {
    *(errno.EBUSY, errno.EAGAIN, errno.ETIMEDOUT, errno.ECONNRESET, errno.ECONNABORTED, errno.EPIPE, errno.ESTALE),
    *(errno.ENETUNREACH, errno.EHOSTUNREACH, getattr(errno, "EREMOTEIO", errno.EBUSY)),
}

_FULL = {errno.ENOSPC, errno.EDQUOT}


class Incomplete(Exception):  # noqa: N818 - what happened to an object on its way, dealt with by asking again
    """There are fewer or more bytes than there must be."""


def status_of(error: BaseException) -> int:
    """HTTP status of the answer, as far as the error or its cause carries one; else 0."""
    for one in _chain(error):
        answer = getattr(one, "response", None)
        if isinstance(answer, dict):
            found: Any = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
            if isinstance(found, int):
                return found
        for holder in (one, answer):
            for name in ("status_code", "status", "code"):
                found = getattr(holder, name, None)
                if isinstance(found, str) and found.isdigit():
                    found = int(found)
                if isinstance(found, int) and 100 <= found < 600:
                    return found
    return 0


def is_missing(error: BaseException) -> bool:
    """Whether the object isn't there. That its server can't be reached is something else."""
    if not isinstance(error, FileNotFoundError):
        return status_of(error) == 404
    # fsspec's HTTPFileSystem calls every failure to look at a file "not found", and keeps the cause.
    causes = list(_chain(error))[1:]
    return not any(is_transient(cause) or is_denied(cause) for cause in causes)


def is_denied(error: BaseException) -> bool:
    """Whether the credentials are missing, wrong, or don't allow it."""
    if status_of(error) in (401, 403) or _is_called(error, _DENIED):
        return True
    # gcsfs makes no more of it than a text.
    return type(error) is OSError and str(error).startswith("Forbidden")


def is_taken(error: BaseException) -> bool:
    """Whether the key exists, and that was what the request made sure of."""
    return isinstance(error, FileExistsError) or status_of(error) == 412


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed later."""
    if isinstance(error, CheckpointError) or is_denied(error) or is_taken(error):
        return False
    if isinstance(error, FileNotFoundError):
        return not is_missing(error)
    status = status_of(error)
    if status:
        return status in _BUSY
    if isinstance(error, Incomplete | socket.gaierror) or _is_called(error, _NEVER_SENT | _NO_ANSWER):
        return True
    # paramiko makes no more than a text of a connection that is gone.
    return isinstance(error, OSError) and (error.errno in _BUSY_ERRNOS or str(error) == "Socket is closed")


def may_be_applied(error: BaseException) -> bool:
    """Whether the server may have done what it was asked for. What isn't known may have done anything."""
    if isinstance(error, FileNotFoundError | ConnectionRefusedError | socket.gaierror | NotImplementedError):
        return False
    if is_taken(error) or is_denied(error) or _is_called(error, _NEVER_SENT):
        return False
    status = status_of(error)
    return status >= 500 or status < 300


def translate(error: Exception, doing: str, where: str, key: str, said: str, *, unsure: bool) -> CheckpointError:
    """The error to raise for one of a file system; ``said`` is its text, without secrets.

    ``unsure``: this or an earlier try may have been applied.
    """
    if isinstance(error, CheckpointError):
        return error
    place = f"{where}: {doing} failed"
    if is_missing(error):
        return NotFoundError(f"{where} doesn't exist", key=key)
    if is_taken(error):
        return ExistsError(f"{where} exists already, and nothing is ever overwritten", key=key)
    outcome: Any = "unknown" if unsure else "failed"
    if isinstance(error, OSError) and error.errno in _FULL:
        return StorageFullError(f"{place}: {said}", outcome=outcome, key=key)
    if is_denied(error):
        return UnavailableError(
            f"{place}: {said}. Give credentials by the environment or storage_options, and see what they allow",
            transient=False,
            outcome=outcome,
            key=key,
        )
    if isinstance(error, NotImplementedError):
        return StorageError(f"{place}: this kind of storage can't do that", outcome=outcome, key=key)
    if is_transient(error):
        return UnavailableError(f"{place}: {said}", outcome=outcome, key=key)
    return StorageError(f"{place}: {said}", outcome=outcome, key=key)


def _is_called(error: BaseException, names: set[str]) -> bool:
    return any(cls.__name__ in names for cls in type(error).__mro__)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__
