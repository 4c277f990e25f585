"""Questions to something far away that may never answer."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from ckptstore.errors import UnavailableError

T = TypeVar("T")


def within(seconds: float, work: Callable[[], T], doing: str) -> T:
    """What ``work`` returns or raises, if it ends within ``seconds``; it goes on, unheard, where it doesn't.

    Raises:
        UnavailableError: no answer in time.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def act() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=act, name="ckptstore-ask", daemon=True)
    try:
        thread.start()
    except RuntimeError:
        act()
    else:
        thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise UnavailableError(f"{doing}: no answer within {seconds:g} s")
    return results[0]
