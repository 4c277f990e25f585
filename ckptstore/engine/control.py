"""Requests from outside to the run that saves here: asked for, looked for, and answered by being removed."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from ckptstore.errors import (
    CheckpointError,
    ExistsError,
    FormatError,
    IntegrityError,
    NotFoundError,
    UnavailableError,
)
from ckptstore.format import layout
from ckptstore.format.digest import sha256
from ckptstore.format.records import SMALL_LIMIT, ControlRecord, now, seal, unseal
from ckptstore.storage.base import Storage

_log = logging.getLogger("ckptstore")

Action: TypeAlias = Literal["save", "stop"]
ACTIONS: tuple[Action, ...] = get_args(Action)

_TRIES = 20
"""How often a request is made where others are made and answered at the same time."""
_PAUSE_S = 0.25
"""Between two looks whether a request was taken up."""


@dataclass(frozen=True)
class Request:
    """One request that lies there.

    Attributes:
        action: "save" at once and go on, or "stop": save and end.
        nonce: tells it from every other. A run remembers those it found when it began, and answers them unheeded.
        problem: what is wrong with it, None where it is good. A damaged one asks for nothing and is only answered.
        host, pid: the process that asked, for people.
        created: when, by that one's clock, for people.
    """

    action: Action
    nonce: str
    problem: str | None = None
    host: str = ""
    pid: int = 0
    created: str = ""


def ask(storage: Storage, store_id: str, action: Action) -> Request:
    """Ask the run that saves here to ``action``.

    Raises:
        ExistsError: it was asked already and has not answered.
        StorageError: the storage failed.
    """
    return _ask(storage, _new(store_id, action))


def ask_and_wait(storage: Storage, store_id: str, action: Action, timeout_s: float) -> bool:
    """``ask``, and ``wait`` for the answer. However it ends, no request of this call is left unanswered.

    Raises:
        ExistsError: it was asked already and has not answered.
        StorageError: the storage failed.
    """
    record = _new(store_id, action)
    try:
        return wait(storage, _ask(storage, record), timeout_s)
    except BaseException:
        # Also where Ctrl-C comes before the asking has returned.
        with suppress(CheckpointError):
            answer(storage, _request(record))
        raise


def _new(store_id: str, action: Action) -> ControlRecord:
    return ControlRecord(
        store_id=store_id,
        action=action,
        nonce=secrets.token_hex(16),
        host=socket.gethostname()[:200],
        pid=os.getpid(),
        created=now(),
    )


def _ask(storage: Storage, record: ControlRecord) -> Request:
    action = record.action
    for _ in range(_TRIES):
        try:
            storage.create(layout.control_key(action), seal(record))
        except ExistsError as error:
            found = look(storage, action)
            if found is None:
                # Answered since.
                continue
            # Ours, if an answer was lost on the way and the request came twice.
            if found.nonce != record.nonce:
                raise _unanswered(storage, found) from error
        return _request(record)
    raise UnavailableError(f"{storage.url}: others ask for {action!r} and are answered all the time; try again")


def poll(storage: Storage) -> list[Request]:
    """The requests that lie there.

    Raises:
        StorageError: the storage failed.
    """
    # One listing of what is mostly empty. Reading what is mostly missing takes a bucket four requests: it looks twice.
    there = {entry.key for entry in storage.list(layout.CONTROL)}
    asked = [action for action in ACTIONS if layout.control_key(action) in there]
    return [found for action in asked if (found := look(storage, action)) is not None]


def look(storage: Storage, action: Action) -> Request | None:
    """The request to ``action``, if one lies there.

    Raises:
        StorageError: the storage failed.
    """
    key, data = layout.control_key(action), b""
    problem: CheckpointError | None = None
    # A flip on the way up heals by itself, and so does one that was just being written where that takes time.
    for _ in range(2):
        try:
            data = storage.read(key, limit=SMALL_LIMIT)
            record = unseal(data, key, [ControlRecord])
            if record.action == action:
                return _request(record)
            problem = IntegrityError(f"{key} holds a request to {record.action}", key=key)
        except NotFoundError:
            return None
        except (IntegrityError, FormatError) as error:
            problem = error
    return Request(action, sha256(data), problem=str(problem))


def answer(storage: Storage, request: Request) -> bool:
    """Remove ``request``, before what it asks for is done; whether it still lay there.

    So whoever asks anew, because this one is gone, gets a save of his own. Another one that took its place stays. That
    ``request`` was damaged is logged here, once.

    Raises:
        StorageError: the storage failed; it may still lie there.
    """
    found = look(storage, request.action)
    if found is None or found.nonce != request.nonce:
        return False
    if request.problem is not None:
        _log.warning("%s: a request is removed, as nobody can tell what it asks for: %s", storage.url, request.problem)
    storage.delete([layout.control_key(request.action)])
    return True


def wait(storage: Storage, request: Request, timeout_s: float) -> bool:
    """Whether ``request`` is answered within ``timeout_s`` seconds. One that isn't is taken back.

    A run that looked right before it was taken back may heed it all the same.

    Raises:
        StorageError: the storage failed.
    """
    end = time.monotonic() + timeout_s
    while (found := look(storage, request.action)) is not None and found.nonce == request.nonce:
        left = end - time.monotonic()
        if left <= 0:
            return not answer(storage, request)
        time.sleep(min(_PAUSE_S, left))
    return True


def _request(record: ControlRecord) -> Request:
    return Request(record.action, record.nonce, None, record.host, record.pid, record.created)


def _unanswered(storage: Storage, found: Request) -> ExistsError:
    key = layout.control_key(found.action)
    if found.problem is not None:
        since = f"a damaged request lies there ({found.problem})"
    else:
        since = f"it was asked at {found.created} by process {found.pid} on {found.host}"
    return ExistsError(
        f"{storage.url} was asked to {found.action} already, and no run has answered: {since}. Is a run there that "
        "looks for requests? The next one that begins removes it",
        key=key,
    )
