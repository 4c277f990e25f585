"""Work in a thread of its own, waited for: not for ever, where it asks something far away that may never answer."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from ckptstore.errors import UnavailableError

T = TypeVar("T")


def apart(work: Callable[[], T]) -> T:
    """What ``work`` returns or raises; in the caller's thread where there is no room for one.

    The thread is a daemon: waiting for any other one holds a lock of Python for a moment, and without that a signal
    handler can begin no thread.
    """
    return _outcome(work, None)[0]


def within(seconds: float, work: Callable[[], T], doing: str) -> T:
    """``apart``, if ``work`` ends within ``seconds``; it goes on, unheard, where it doesn't.

    Raises:
        UnavailableError: no answer in time.
    """
    results = _outcome(work, seconds)
    if not results:
        raise UnavailableError(f"{doing}: no answer within {seconds:g} s")
    return results[0]


def _outcome(work: Callable[[], T], seconds: float | None) -> list[T]:
    """What ``work`` returns, alone in a list, which is empty where it takes longer than ``seconds``."""
    results: list[T] = []
    errors: list[BaseException] = []

    def act() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=act, name="ckptstore-apart", daemon=True)
    try:
        thread.start()
    except RuntimeError:
        act()
    else:
        thread.join(seconds)
    if errors:
        raise errors[0]
    return results
