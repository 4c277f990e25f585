"""How long, and how often, a request to something far away is tried again."""

from __future__ import annotations

from collections.abc import Callable

from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_delay, wait_random_exponential

DEADLINE_S = 120.0
"""For one request, all its tries included."""


def tries(is_transient: Callable[[BaseException], bool], end: float | Callable[[RetryCallState], bool]) -> Retrying:
    """A policy: again as long as what is raised is transient, with waits that grow and are drawn by lot.

    ``end`` is how long, in seconds, or a function that says when it is over.
    """
    return Retrying(
        stop=end if callable(end) else stop_after_delay(end),
        wait=wait_random_exponential(multiplier=0.2, max=10),
        retry=retry_if_exception(is_transient),
        reraise=True,
    )
