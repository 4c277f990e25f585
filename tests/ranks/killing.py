"""A rank that is killed at a named moment of a save."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

from ckptstore.state.peers import Peers
from ckptstore.storage.local import LocalStorage

Moment = tuple[str, str, str, int]
"""Before or after which call, with what in its key, for which time."""

EVERYBODY: dict[str, Moment] = {
    "before it asks": ("before", "put", "/ask/", 1),
    "after it has asked": ("after", "put", "/ask/", 1),
    "before it opens its file": ("before", "open_writer", "checkpoints/", 1),
    "after it has opened its file": ("after", "open_writer", "checkpoints/", 1),
    "before it opens its last file": ("before", "open_writer", "checkpoints/", 2),
    "before it writes its part": ("before", "create", "/part-", 1),
    "after it has written its part": ("after", "create", "/part-", 1),
    "before it reports": ("before", "put", "/done/", 1),
}
OTHERS: dict[str, Moment] = {
    "before it is answered": ("before", "get", "/answer/", 1),
    "after it has reported": ("after", "put", "/done/", 1),
    "when it begins to wait": ("before", "get", "/outcome", 1),
    "while it waits": ("before", "get", "/outcome", 3),
}
RANK_0: dict[str, Moment] = {
    "when it reads the parts": ("before", "read", "/part-00002", 1),
    "before it writes the manifest": ("before", "create", "/manifest.json", 1),
    "before it commits": ("before", "create", "commits/", 1),
    "after it has committed": ("after", "create", "commits/", 1),
}
SUCCESS = {"after it has reported", "when it begins to wait", "while it waits", "after it has committed"}
"""Moments after which what counts is on storage."""

CASES = [
    (rank, name, moment) for rank in range(4) for name, moment in {**EVERYBODY, **(OTHERS if rank else RANK_0)}.items()
]


def arm(moment: Moment) -> None:
    """Kill this process there."""
    when, call, part, times = moment
    owner: Any = Peers if call in ("put", "get") else LocalStorage
    real: Callable[..., Any] = getattr(owner, call)
    left = [times]

    def hooked(self: Any, key: str, *args: Any, **options: Any) -> Any:
        hit = part in key
        left[0] -= hit
        # Another thread may come by meanwhile.
        now = hit and left[0] == 0
        if now and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(self, key, *args, **options)
        if now and when == "after":
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, call, hooked)
