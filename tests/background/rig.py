"""A small training run that does everything a run can do to its state between two saves, and knows what it was."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from blake3 import blake3
from torch import nn

import ckptstore.opening  # noqa: F401 - modules that take the size of a block at import must not see the small one
from ckptstore.engine import plan
from ckptstore.format import tensorfile
from ckptstore.state import staging

BLOCK = 8 << 10
"""Bytes in a block here, so that a small state has many."""

Digests = dict[str, bytes]


@contextmanager
def small_blocks() -> Iterator[None]:
    """Blocks of 8 KiB, and tensors of 1 KiB read in place."""
    with mock.patch.object(tensorfile, "BLOCK_BYTES", BLOCK), mock.patch.object(staging, "IN_PLACE_BYTES", 1 << 10):
        yield


@contextmanager
def slow_reads(chance: random.Random) -> Iterator[list[int]]:
    """Reading a block takes up to a millisecond, before and after; the list counts the blocks read."""
    fill, hash_in_place = plan.PlannedFile.fill, plan.PlannedFile.hash_in_place
    read = [0]
    lock = threading.Lock()

    def around(action: Callable[..., None]) -> Callable[..., None]:
        def slowly(*arguments: Any) -> None:
            with lock:
                pauses = [chance.random() / 1000 if chance.random() < 0.3 else 0.0 for _ in range(2)]
                read[0] += 1
            time.sleep(pauses[0])
            action(*arguments)
            time.sleep(pauses[1])

        return slowly

    with (
        mock.patch.object(plan.PlannedFile, "fill", around(fill)),
        mock.patch.object(plan.PlannedFile, "hash_in_place", around(hash_in_place)),
    ):
        yield read


class Net(nn.Module):
    """Trained, frozen, tied, renormed and tiny parameters, and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(64, 64)
        self.renormed = nn.Embedding(32, 64, max_norm=0.5)
        self.base = nn.Linear(64, 64)
        self.base.requires_grad_(False)
        self.a = nn.Linear(64, 64)
        self.b = nn.Linear(64, 64)
        self.norm = nn.BatchNorm1d(64)
        self.head = nn.Linear(64, 64, bias=False)
        self.head.weight = self.emb.weight
        self.register_buffer("average", torch.zeros(64, 64))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.emb(tokens) + self.renormed(tokens % 32) + self.base(self.emb(tokens))
        return self.head(self.norm(self.b(torch.relu(self.a(x)))))


class Run:
    """Model, two optimizers, scheduler, averaged copy; each method but the last few is something that a run may do."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.told: Callable[[], None] = lambda: None
        """Called after each single write that no fence comes before."""
        torch.manual_seed(chance.randrange(1 << 30))
        self.model = Net()
        first = [*self.model.emb.parameters(), *self.model.a.parameters(), *self.model.norm.parameters()]
        second = [*self.model.renormed.parameters(), *self.model.b.parameters()]
        kind = chance.choice([{}, {"foreach": True}, {"fused": True}, {"foreach": False}])
        self.adam = torch.optim.AdamW(first, lr=0.01, **kind)
        self.sgd = torch.optim.SGD(second, lr=0.01, momentum=0.9)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.adam, 2)
        self.ema = {name: value.detach().clone() for name, value in self.model.named_parameters()}
        self.spare = nn.Parameter(torch.randn(64, 64))
        self.backward()
        self.adam.step()
        self.sgd.step()

    @property
    def state(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "adam": self.adam,
            "sgd": self.sgd,
            "scheduler": self.scheduler,
            "ema": self.ema,
            "spare": self.spare,
        }

    def forward(self) -> None:
        """Changes batch statistics and, unseen by any hook, the rows of the renormed embedding."""
        self.model(torch.randint(0, 64, (8,)))
        self.told()

    def backward(self) -> None:
        self.model(torch.randint(0, 64, (8,))).square().mean().backward()
        self.told()
        for optimizer in (self.adam, self.sgd):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is None:
                        parameter.grad = torch.randn_like(parameter)

    def step(self) -> None:
        self.backward()
        self.chance.choice([self.adam, self.sgd]).step()

    def step_all(self) -> None:
        self.backward()
        self.adam.step()
        self.sgd.step()
        self.scheduler.step()

    def average(self) -> None:
        """Writes copies that no optimizer has."""
        for name, value in self.model.named_parameters():
            self.ema[name].lerp_(value.detach(), 0.1)
            self.told()
        self.model.average.add_(1)

    def load_model(self) -> None:
        load_other(self.model)

    def load_part(self) -> None:
        load_other(self.model.a)

    def load_optimizer(self) -> None:
        self.adam.load_state_dict(self.adam.state_dict())
        for state in self.adam.state.values():
            if "exp_avg" in state:
                state["exp_avg"] = torch.randn_like(state["exp_avg"])

    def add_group(self) -> None:
        """Trains what was frozen, once."""
        known = {id(parameter) for group in self.sgd.param_groups for parameter in group["params"]}
        if id(self.model.base.weight) not in known:
            self.model.base.weight.requires_grad_(True)
            self.sgd.add_param_group({"params": [self.model.base.weight]})
            self.step_all()

    def new_memory(self) -> None:
        """A parameter gets other memory; what is still read of the old one doesn't change."""
        weight = self.model.b.weight
        weight.data = torch.randn_like(weight)

    def nap(self) -> None:
        time.sleep(self.chance.random() / 300)

    def write_by_hand(self) -> None:
        """What no hook sees: clips every weight, one after the other."""
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.mul_(0.9)
                self.told()

    def write_unseen(self) -> None:
        """What not even version counters see."""
        for parameter in self.model.parameters():
            parameter.data.numpy()[:] += 1

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor by a name of its own."""
        tensors = {f"model/{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"ema/{name}": value for name, value in self.ema.items()}
        tensors["spare"] = self.spare
        names = {id(parameter): f"model/{name}" for name, parameter in self.model.named_parameters()}
        for title, optimizer in (("adam", self.adam), ("sgd", self.sgd)):
            for parameter, state in optimizer.state.items():
                for key, value in state.items():
                    if isinstance(value, torch.Tensor):
                        tensors[f"{title}/{names[id(parameter)]}/{key}"] = value
        return tensors


def load_other(module: nn.Module) -> None:
    """Fill a module with other values, as from a checkpoint."""
    other = {}
    for name, value in module.state_dict().items():
        other[name] = torch.randn_like(value) if value.is_floating_point() else value + 1
    module.load_state_dict(other)


def loaded_digests(state: dict[str, Any]) -> Digests:
    """The same of a state loaded as plain data."""
    tensors = {f"model/{name}": value for name, value in state["model"].items()}
    tensors |= {f"ema/{name}": value for name, value in state["ema"].items()}
    tensors["spare"] = state["spare"]
    for title in ("adam", "sgd"):
        for parameter, values in state[title]["state"].items():
            tensors |= {
                f"{title}/{parameter}/{key}": value for key, value in values.items() if isinstance(value, torch.Tensor)
            }
    return {name: digest(value) for name, value in tensors.items()}


def digests(tensors: dict[str, torch.Tensor]) -> Digests:
    """What every tensor holds now."""
    return {name: digest(value) for name, value in tensors.items()}


def digest(tensor: torch.Tensor) -> bytes:
    return blake3(tensor.detach().contiguous().numpy().tobytes()).digest()
