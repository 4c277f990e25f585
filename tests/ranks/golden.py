"""How the golden store of several ranks was made: ``python -m tests.ranks.golden`` writes it, once for each format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import distributed

import ckptstore as cs
from tests.ranks.models import spread
from tests.ranks.processes import run

PLACE = Path(__file__).parent.parent / "golden" / "ranks1"
SIZE = 3


def state(rank: int, model: torch.nn.Module) -> dict[str, Any]:
    """A sharded model and its optimizer, what is each rank's own, and what all have."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return {
        "model": model,
        "optimizer": optimizer,
        "own": {"x": torch.full((3,), float(rank)), "rank": rank},
        "all": torch.arange(4.0),
    }


def save(place: str) -> None:
    """Save it on this rank."""
    with cs.open(place) as store:
        store.save(state(distributed.get_rank(), spread("fsdp")), step=1, metrics={"loss": 0.5})


if __name__ == "__main__":
    run(SIZE, save, str(PLACE))
