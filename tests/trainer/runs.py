"""Runs that read data and draw random numbers, interrupted anywhere, for comparing with one that isn't."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any
from uuid import uuid4

import numpy as np
import torch

import ckptstore
from ckptstore import RNG
from ckptstore.trainer.data import Feeds


class Numbers(torch.utils.data.Dataset[int]):
    """Gives its indices, and counts what it was asked for in this process."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.asked: list[int] = []

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self.count:
            raise IndexError(index)
        self.asked.append(int(index))
        return int(index)


class Interrupted(Exception):
    """The end of a run, wherever it was asked for."""


Event = tuple[Any, ...]
Epoch = Callable[["Run"], Iterator[None]]


def seeded(seed: int = 7) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def drawn() -> tuple[float, float, float]:
    """A number of each generator of the process."""
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def plain(batch: Any) -> Any:
    return batch.tolist() if isinstance(batch, torch.Tensor) else batch


class Run:
    """A process: it reads, steps, and dies after ``die_after`` steps with what it saved then."""

    def __init__(self, die_after: int | None = None, die_at_call: int | None = None) -> None:
        self.said: list[str] = []
        self.feeds: Any = Feeds(self.said.append)
        self.events: list[Event] = []
        self.steps = 0
        self.die_after = die_after
        self.calls = 0
        self.die_at_call = die_at_call
        self.epoch = 0
        self.saved: dict[str, Any] = {}

    def step(self, *event: Any) -> None:
        self.events.append((*event, drawn()))
        self.steps += 1
        self.feeds.stepped()
        if self.steps == self.die_after:
            self.die()

    def between(self, last: bool) -> None:
        """Called before each batch: the other moment at which a run saves."""
        del last
        self.calls += 1
        if self.calls == self.die_at_call:
            self.die()

    def die(self) -> None:
        self.saved = {"feeds": self.feeds.state_dict(), "rng": RNG().state_dict(), "epoch": self.epoch}
        raise Interrupted

    def resume(self, saved: dict[str, Any]) -> None:
        self.epoch = saved["epoch"]
        self.feeds.load_state_dict(saved["feeds"], saved["rng"])
        RNG().load_state_dict(saved["rng"])


def through_store(saved: dict[str, Any]) -> dict[str, Any]:
    """What comes back from a store."""
    store = ckptstore.open(f"memory://{uuid4().hex}")
    store.save(saved, step=1)
    loaded: dict[str, Any] = store.load("latest")
    return loaded


class Nothing:
    """What a loop without Feeds does."""

    def batches(
        self, source: Any, name: str = "data", *, between: Callable[[bool], None] = lambda last: None
    ) -> Iterator[Any]:
        return iter(source)

    def stepped(self) -> None:
        pass

    def end_epoch(self) -> None:
        pass


Program = Callable[[Run], None]


def run_plain(program: Program) -> list[Event]:
    """The events of the program without anything of ours."""
    run = Run()
    run.feeds = Nothing()
    seeded()
    program(run)
    return run.events


def run_whole(program: Program) -> list[Event]:
    """The events of an uninterrupted run."""
    run = Run()
    seeded()
    program(run)
    return run.events


def run_killed(program: Program, steps: int) -> dict[str, Any]:
    """What a run saved after so many steps, as it comes back from a store."""
    run = Run(die_after=steps)
    seeded()
    try:
        program(run)
    except Interrupted:
        return through_store(run.saved)
    raise AssertionError(f"the run had only {run.steps} steps")


def run_resumed(program: Program, saved: dict[str, Any]) -> Run:
    """A new process that continues; its own random numbers stand elsewhere at first."""
    run = Run()
    seeded()
    run.resume(saved)
    program(run)
    return run
