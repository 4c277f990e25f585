"""How long an optimizer's step is held up by its hooks, measured from outside."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any, Self

import torch


class StepClock:
    """Steps an optimizer and times what comes before the step proper: all hooks that wait for something.

    torch calls hooks of all optimizers first, then the optimizer's own in the order of their registration. One that is
    registered when the ``with`` block begins, and so comes last, stops the clock.

    Attributes:
        seconds: from the last call of ``step`` until its hooks had ended.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._begin = 0.0
        self.seconds = 0.0

    def __enter__(self) -> Self:
        self._last = self._optimizer.register_step_pre_hook(self._stop)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._last.remove()

    def step(self) -> None:
        """One step."""
        self._begin = time.perf_counter()
        self._optimizer.step()

    def _stop(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self.seconds = time.perf_counter() - self._begin
