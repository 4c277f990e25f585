"""How long, and how often, a request to something far away is tried again."""

from __future__ import annotations

import logging
from collections.abc import Callable

from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_delay, wait_random_exponential

DEADLINE_S = 120.0
"""For one request, all its tries included."""
PATIENCE_S = 900.0
"""The same where a training run saves: a network that is away for minutes must not end it."""
TELL_S = 10.0
"""When the log is told that something is waited for."""

_log = logging.getLogger("ckptstore")


class Outage:
    """Tells the log, once each time, that a place is waited for, and that it is back.

    Args:
        where: the place, for people.
        tell: what an error says, without secrets.
    """

    def __init__(self, where: str, tell: Callable[[BaseException], str], deadline_s: float) -> None:
        self._where, self._tell, self._deadline_s = where, tell, deadline_s
        self._waiting = False

    def waits(self, state: RetryCallState) -> None:
        """Called before each pause between two tries."""
        error = state.outcome.exception() if state.outcome is not None else None
        if self._waiting or error is None or (state.seconds_since_start or 0.0) < TELL_S:
            return
        self._waiting = True
        _log.warning("%s fails, and is tried again for %g s: %s", self._where, self._deadline_s, self._tell(error))

    def over(self) -> None:
        """Called after each success."""
        if self._waiting:
            self._waiting = False
            _log.warning("%s answers again", self._where)


def deadline_s(*, patient: bool) -> float:
    """How long a request is tried again, in seconds, where nobody says."""
    return PATIENCE_S if patient else DEADLINE_S


def tries(
    is_transient: Callable[[BaseException], bool], end: float | Callable[[RetryCallState], bool], outage: Outage
) -> Retrying:
    """A policy: again as long as what is raised is transient, with waits that grow and are drawn by lot.

    ``end`` is how long, in seconds, or a function that says when it is over.
    """
    return Retrying(
        stop=end if callable(end) else stop_after_delay(end),
        wait=wait_random_exponential(multiplier=0.2, max=10),
        retry=retry_if_exception(is_transient),
        before_sleep=outage.waits,
        reraise=True,
    )
