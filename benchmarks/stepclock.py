"""How long an optimizer's step hooks hold it up, measured from outside."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any, Self

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook


class StepClock:
    """Times the hooks of ``optimizer.step()`` that were registered before the ``with`` block begins.

    torch calls hooks of all optimizers first, then the optimizer's own in the order of their registration: one of the
    former starts the clock, one of the latter, registered last, stops it.

    Attributes:
        seconds: between the two at the last step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._begin = 0.0
        self.seconds = 0.0

    def __enter__(self) -> Self:
        self._first = register_optimizer_step_pre_hook(self._start)
        self._last = self._optimizer.register_step_pre_hook(self._stop)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._first.remove()
        self._last.remove()

    def _start(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._begin = time.perf_counter()

    def _stop(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self.seconds = time.perf_counter() - self._begin
