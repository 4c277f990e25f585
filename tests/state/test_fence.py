"""Where the fence of a step stands: before the update, and behind the closure that computes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ckptstore.state import staging
from ckptstore.state.staging import Window, fence


class Early(torch.optim.SGD):
    """Changes its parameters before it runs its closure, as some optimizers do."""

    def step(self, closure: Any = None) -> Any:
        self.param_groups[0]["params"][0].data.add_(1)
        return super().step(closure)


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.LBFGS, Early])
@pytest.mark.parametrize("by_name", [True, False])
def test_a_closure_is_run_before_the_fence(cls: type[torch.optim.Optimizer], by_name: bool) -> None:
    """As torch's own optimizers do it; of others nobody knows what comes first."""
    weights = torch.nn.Parameter(torch.ones(3))
    optimizer = cls([weights], lr=0.1)  # type: ignore[call-arg]
    fence(optimizer)
    seen: list[str] = []
    window = Window({weights.data_ptr()}, set())
    window.open(lambda frozen: (seen.append(f"fence at {weights.sum().item():.0f}"), window.shut())[0])

    def closure() -> torch.Tensor:
        seen.append("closure")
        optimizer.zero_grad()
        loss = (weights**2).sum()
        loss.backward()
        return loss

    step: Callable[..., Any] = optimizer.step
    step(closure=closure) if by_name else step(closure)
    expected = ["fence at 3", "closure"] if cls is Early else ["closure", "fence at 3"]
    assert seen[:2] == expected
    assert weights.sum().item() != 3
    assert not staging._open
