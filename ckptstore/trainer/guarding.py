"""Watching a value of each step for divergence, without making training wait for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import torch

from ckptstore.errors import DivergedError
from ckptstore.policy.guard import Diverged, Divergence
from ckptstore.view import View


class Guard:
    """Sees the values of one run by the rule that its user gave."""

    def __init__(self, rule: Diverged) -> None:
        self.watch = rule.watch()
        self._metric = rule.metric
        self._on_their_way: deque[tuple[int, torch.Tensor, torch.cuda.Event]] = deque()

    def see(self, step: int, values: Mapping[str, Any]) -> Divergence | None:
        """Look at what was measured of the state after ``step`` steps."""
        value = values.get(self._metric)
        if value is None:
            return None
        if not (isinstance(value, torch.Tensor) and value.is_cuda):
            return self.watch.see(step, float(value))
        self._send(step, value)
        return self._arrived()

    def _send(self, step: int, value: torch.Tensor) -> None:
        # Asking for the number at once would make the processor wait for all that the device has yet to do.
        host = torch.empty((), dtype=torch.float32, pin_memory=True)
        host.copy_(value.detach().reshape(()), non_blocking=True)
        sent = torch.cuda.Event()  # type: ignore[no-untyped-call]
        sent.record(torch.cuda.current_stream(value.device))
        self._on_their_way.append((step, host, sent))

    def _arrived(self) -> Divergence | None:
        while self._on_their_way and self._on_their_way[0][2].query():  # type: ignore[no-untyped-call]
            step, host, _ = self._on_their_way.popleft()
            if (found := self.watch.see(step, host.item())) is not None:
                return found
        return None


def error_of(found: Divergence, store: View) -> DivergedError:
    """The error that ends a run which has diverged; it names the last checkpoint that was good."""
    good = next((c for c in reversed(store.checkpoints()) if c.step <= found.since), None)
    if good is None:
        return DivergedError(f"{found}. No checkpoint is that old: begin anew, in another place")
    return DivergedError(
        f"{found}. The last good checkpoint is {good.id}: `ckptstore rollback {store.url} {good.id}` makes it the "
        f"latest again, or resume({good.id!r}) goes on from it, as a new line of history",
        id=good.id,
        step=good.step,
    )
