"""A small run in this process, and its store in memory: for what needs no process of its own."""

from __future__ import annotations

import random
import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ckptstore as cs
from ckptstore.storage.memory import MemoryStorage
from tests.background.holding import Fault

WIDTH = 4


def url() -> str:
    """A store in memory that nobody else has."""
    return f"memory://{uuid.uuid4().hex}"


def listed(place: str) -> list[tuple[int, list[str]]]:
    """Steps and reasons of all checkpoints, in the order in which they were saved."""
    with cs.open(place) as store:
        return [(c.step, list(c.reasons)) for c in store.checkpoints()]


def steps(place: str) -> list[int]:
    return [step for step, _ in listed(place)]


def failing(**only: Any) -> Fault:
    """No data is written to any store in memory."""
    return Fault(MemoryStorage, "open_writer", cs.StorageFullError("no space left on the device"), **only)


def settle(ckpt: cs.Checkpointer) -> None:
    """Wait for the save in the background; what came of it isn't told yet."""
    if ckpt._saving._handle is not None:
        ckpt._saving._handle.join()


@contextmanager
def warned() -> Iterator[list[str]]:
    """All warnings of the block, as text, when it is over."""
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        yield texts
    texts += [str(warning.message) for warning in record]


class Loop:
    """A model that learns, and all that a run has besides."""

    def __init__(self, place: str | cs.Store, seed: int = 1, parts: str = "", **options: Any) -> None:
        """``parts``: names of those that the state has, all by default."""
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        self.model: nn.Module = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.1), nn.Linear(WIDTH, 1))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 3)
        self.data = DataLoader(TensorDataset(torch.arange(24.0)), batch_size=2, shuffle=True)
        state = {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "data": self.data,
        }
        wanted = parts.split() or list(state)
        options = {"verbose": False, "signals": False, "poll": None, **options}
        self.ckpt = cs.Checkpointer(place, {name: state[name] for name in wanted}, **options)
        self.losses: dict[int, float] = {}
        self.seen: dict[int, list[float]] = {}

    def learn(self, inputs: torch.Tensor) -> torch.Tensor:
        """One optimizer step."""
        inputs = inputs.reshape(-1, 1).expand(-1, WIDTH) / 24
        loss = (self.model(inputs) - inputs.sum(1, keepdim=True).sin()).square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        return loss.detach()

    def step(self, **values: Any) -> None:
        """One step on data that the loop draws itself."""
        self.ckpt.step(**{"loss": self.learn(torch.rand(2)), **values})

    def until(self, last: int, *, epochs: int = 9, evaluate: Mapping[int, float] | None = None) -> Loop:
        """Train until step ``last``; ``evaluate`` has the metrics that are reported after steps."""
        ckpt = self.ckpt
        for _ in ckpt.epochs(epochs):
            for (batch,) in ckpt.batches(self.data):
                loss = self.learn(batch)
                ckpt.step(loss=loss)
                self.losses[ckpt.progress.step] = loss.item()
                self.seen[ckpt.progress.step] = batch.tolist()
                if evaluate is not None and ckpt.progress.step in evaluate:
                    ckpt.report(val_loss=evaluate[ckpt.progress.step])
                if ckpt.progress.step == last:
                    return self
        return self

    @property
    def weights(self) -> list[float]:
        return torch.cat([p.detach().flatten() for p in self.model.parameters()]).tolist()


def run(place: str, until: int, *, resume: Any = True, seed: int = 1, **options: Any) -> Loop:
    """One process of a run, as it were: it ends well after step ``until``."""
    loop = Loop(place, seed, **{"final": False, **options})
    with loop.ckpt as ckpt:
        ckpt.resume(resume)
        loop.until(until)
    return loop
