"""The kinds of faults, by name: each with the requests that it makes sense for, and what it leaves certain."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from tests.s3.bucket import error
from tests.s3.wire import Exchange, Fault, Request, Response

HANGS_S = 20.0
"""Longer than any client waits in these tests."""


def _always(request: Request) -> bool:
    return True


@dataclass(frozen=True)
class Kind:
    """One way to fail.

    Attributes:
        fits: whether it can happen to a request.
        heals: whether the client has to get over it, where it happens once.
        ambiguous: whether the client can't tell if the request was applied.
        slow: whether it is over only when the client's patience is.
    """

    name: str
    act: Fault
    fits: Callable[[Request], bool] = _always
    heals: bool = True
    ambiguous: bool = False
    slow: bool = False

    def __str__(self) -> str:
        return self.name


def _says(status: int, code: str) -> Fault:
    return lambda exchange: exchange.answer(error(status, code))


def _reset(exchange: Exchange) -> None:
    exchange.reset()


def _applied_and_reset(exchange: Exchange) -> None:
    exchange.apply()
    exchange.reset()


def _applied_and_closed(exchange: Exchange) -> None:
    exchange.apply()
    exchange.close()


def _applied_and_500(exchange: Exchange) -> None:
    exchange.apply()
    exchange.answer(error(500, "InternalError"))


def _hang(exchange: Exchange) -> None:
    exchange.server.ended.wait(HANGS_S)
    exchange.close()


def _applied_and_hang(exchange: Exchange) -> None:
    exchange.apply()
    _hang(exchange)


def _error_in_200(exchange: Exchange) -> None:
    exchange.answer(replace(error(200, "InternalError"), status=200))


def _empty_200(exchange: Exchange) -> None:
    exchange.answer(Response(200))


def _half(exchange: Exchange) -> None:
    response = exchange.apply()
    exchange.answer(response, sent=len(response.body) // 2)
    exchange.close()


def _flip(data: bytes) -> bytes:
    place = random.Random(len(data)).randrange(len(data))
    return data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :]


def _flipped_down(exchange: Exchange) -> None:
    response = exchange.apply()
    exchange.answer(replace(response, body=_flip(response.body)))


def _flipped_up(exchange: Exchange) -> None:
    exchange.answer(exchange.apply(replace(exchange.request, body=_flip(exchange.request.body))))


def _twice(exchange: Exchange) -> None:
    exchange.apply()
    exchange.answer(exchange.apply())


def _late(exchange: Exchange) -> None:
    exchange.server.late.append(exchange.request)
    exchange.reset()


def _keys_failed(exchange: Exchange) -> None:
    inner = "<Error><Key>x</Key><Code>InternalError</Code><Message>try again</Message></Error>"
    exchange.answer(Response(200, f"<DeleteResult>{inner}</DeleteResult>".encode(), {"content-type": "text/xml"}))


def _has_answer(request: Request) -> bool:
    return request.operation not in ("Head", "Put", "Part", "Abort", "DeleteOne")


def _has_body(request: Request) -> bool:
    return bool(request.body)


def _gets(request: Request) -> bool:
    return request.operation == "Get"


def _deletes(request: Request) -> bool:
    return request.operation == "Delete"


def _changes(request: Request) -> bool:
    return request.method not in ("GET", "HEAD")


KINDS = [
    Kind("500", _says(500, "InternalError"), ambiguous=True),
    Kind("503", _says(503, "SlowDown"), ambiguous=True),
    Kind("403", _says(403, "AccessDenied"), heals=False),
    Kind("404", _says(404, "NoSuchKey")),
    Kind("404 bucket", _says(404, "NoSuchBucket"), heals=False, fits=lambda request: request.method != "HEAD"),
    Kind("409", _says(409, "ConditionalRequestConflict")),
    Kind("429", _says(429, "TooManyRequests")),
    Kind("408", _says(408, "RequestTimeout")),
    Kind("reset", _reset, ambiguous=True),
    Kind("applied and reset", _applied_and_reset, ambiguous=True),
    Kind("applied and closed", _applied_and_closed, ambiguous=True),
    Kind("applied and 500", _applied_and_500, ambiguous=True),
    Kind("no answer", _hang, ambiguous=True, slow=True),
    Kind("applied and no answer", _applied_and_hang, _changes, ambiguous=True, slow=True),
    Kind("error in a 200", _error_in_200, lambda request: request.method != "HEAD", ambiguous=True),
    Kind("empty 200", _empty_200, ambiguous=True),
    Kind("half an answer", _half, _has_answer, ambiguous=True),
    Kind("flipped on the way down", _flipped_down, _gets),
    Kind("flipped on the way up", _flipped_up, _has_body),
    Kind("twice", _twice, _changes),
    Kind("late", _late, _changes, ambiguous=True),
    Kind("keys failed", _keys_failed, _deletes),
]
