"""What the ranks of a test train: a small model, spread in one of the usual ways."""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed, nn

BATCH = 12
"""Divisible by every number of ranks that is tested."""


def plain(seed: int = 0) -> nn.Sequential:
    """Uneven on purpose: 7 and 5 rows don't divide by 2, 3 or 4."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 5))


def mesh(*shape: int, names: tuple[str, ...] | None = None) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def _shard(model: nn.Sequential, where: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=where)
    fully_shard(model, mesh=where)


def _split(model: nn.Sequential, where: Any) -> None:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    parallelize_module(model, where, {"0": ColwiseParallel(), "2": RowwiseParallel()})


def spread(kind: str, seed: int = 0) -> nn.Module:
    """The model as ``kind``: "plain", "ddp", "fsdp", "hsdp", "tp", "fsdp+tp"."""
    model, size = plain(seed), distributed.get_world_size()
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if kind == "fsdp":
        _shard(model, mesh(size))
    elif kind == "hsdp":
        _shard(model, mesh(2, size // 2, names=("replicas", "shards")))
    elif kind == "tp":
        _split(model, mesh(size))
    elif kind == "fsdp+tp":
        both = mesh(size // 2, 2, names=("dp", "tp"))
        _split(model, both["tp"])
        _shard(model, both["dp"])
    else:
        assert kind == "plain", kind
    return model


def train(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> list[float]:
    """Losses of steps ``first`` to ``last``: every rank has the whole batch, so that all kinds compute the same."""
    losses = []
    for step in range(first, last):
        numbers = torch.Generator().manual_seed(step)
        x, y = torch.randn(BATCH, 6, generator=numbers), torch.randn(BATCH, 5, generator=numbers)
        loss = nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def whole(value: torch.Tensor) -> torch.Tensor:
    """All of a tensor, on every rank."""
    full = getattr(value, "full_tensor", None)
    return (full() if full is not None else value).detach().clone()


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """All of the model, on every rank."""
    return {name.removeprefix("module."): whole(value) for name, value in model.state_dict().items()}
