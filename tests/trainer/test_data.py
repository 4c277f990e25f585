"""A run that is interrupted at any batch and resumed reads and draws what the uninterrupted one does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from tests.trainer.runs import Numbers, Program, Run, drawn, run_killed, run_plain, run_resumed, run_whole

SIZE = 11


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


class Uneven:
    """Batches of 1, 2, 3, 1, 2, … samples, in an order drawn anew for each pass."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.generator = generator()

    def __iter__(self) -> Any:
        order = torch.randperm(self.count, generator=self.generator).tolist()
        size = 1
        while order:
            yield order[:size]
            order = order[size:]
            size = size % 3 + 1


class Lazy:
    """Draws each sample from the process's random numbers when it is asked for."""

    def __iter__(self) -> Any:
        for _ in range(SIZE):
            yield int(torch.randint(SIZE, ()))

    def __len__(self) -> int:
        return SIZE


class Doubled(DataLoader[Any]):
    """A loader with a loop of its own, as many have."""

    def __iter__(self) -> Any:
        for batch in super().__iter__():
            yield batch * 2


def weighted() -> WeightedRandomSampler:
    return WeightedRandomSampler([1.0 + index for index in range(SIZE)], SIZE, generator=generator())


def distributed() -> DistributedSampler[int]:
    return DistributedSampler(Numbers(SIZE), num_replicas=2, rank=1)


LOADERS: dict[str, Callable[..., DataLoader[Any]]] = {
    "in order": lambda **o: DataLoader(Numbers(SIZE), batch_size=3, **o),
    "one by one": lambda **o: DataLoader(Numbers(SIZE), batch_size=None, **o),
    "shuffled": lambda **o: DataLoader(Numbers(SIZE), batch_size=3, shuffle=True, **o),
    "dropping": lambda **o: DataLoader(Numbers(SIZE), batch_size=3, shuffle=True, drop_last=True, **o),
    "generator": lambda **o: DataLoader(Numbers(SIZE), batch_size=3, shuffle=True, generator=generator(), **o),
    "replacing": lambda **o: DataLoader(
        Numbers(SIZE), batch_size=3, sampler=RandomSampler(range(SIZE), replacement=True, num_samples=40), **o
    ),
    "replacing, generator": lambda **o: DataLoader(
        Numbers(SIZE),
        batch_size=7,
        sampler=RandomSampler(range(SIZE), replacement=True, num_samples=70, generator=generator()),
        **o,
    ),
    "pinned": lambda **o: DataLoader(Numbers(SIZE), batch_size=3, shuffle=True, pin_memory=True, **o),
    "subset": lambda **o: DataLoader(Numbers(SIZE), batch_size=2, sampler=SubsetRandomSampler([1, 4, 6, 7, 9]), **o),
    "weighted": lambda **o: DataLoader(Numbers(SIZE), batch_size=4, sampler=weighted(), **o),
    "distributed": lambda **o: DataLoader(Numbers(SIZE), batch_size=2, sampler=distributed(), **o),
    "uneven": lambda **o: DataLoader(Numbers(SIZE), batch_sampler=Uneven(SIZE), **o),
    "lists of indices": lambda **o: DataLoader(
        Many(),
        batch_size=None,
        sampler=BatchSampler(RandomSampler(range(SIZE)), 3, drop_last=False),
        **o,
    ),
    "lazy": lambda **o: DataLoader(Numbers(SIZE), batch_size=3, sampler=Lazy(), **o),
    "own loop": lambda **o: Doubled(Numbers(SIZE), batch_size=3, shuffle=True, **o),
    "sequential, shared generator": lambda **o: DataLoader(
        Numbers(SIZE), batch_size=3, sampler=SequentialSampler(range(SIZE)), generator=generator(), **o
    ),
}


class Many(torch.utils.data.Dataset[Any]):
    """Takes lists of indices."""

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: list[int]) -> list[int]:
        return list(index)


def epochs_over(make: Callable[[], Any], epochs: int = 3) -> Program:
    """The usual loop, with random numbers drawn before and after each of its passes."""

    def program(run: Run) -> None:
        loader = make()
        while run.epoch < epochs:
            sampler = getattr(loader, "sampler", None)
            if isinstance(sampler, DistributedSampler):
                sampler.set_epoch(run.epoch)
            drawn()
            for batch in run.feeds.batches(loader):
                run.step(run.epoch, batch if isinstance(batch, list | int) else batch.tolist())
            drawn()
            run.feeds.end_epoch()
            run.epoch += 1

    return program


def check_everywhere(program: Program, every: int = 1) -> None:
    """Plain, uninterrupted and resumed after each step: the same batches and random numbers."""
    expected = run_plain(program)
    assert run_whole(program) == expected
    for steps in range(1, len(expected), every):
        resumed = run_resumed(program, run_killed(program, steps))
        assert resumed.events == expected[steps:], f"after {steps} steps"


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator")
@pytest.mark.parametrize("name", LOADERS)
def test_every_loader_continues_after_every_step(name: str) -> None:
    """Three epochs, interrupted after each step."""
    check_everywhere(epochs_over(LOADERS[name]))


@pytest.mark.parametrize("persistent", [False, True], ids=["workers", "persistent workers"])
@pytest.mark.parametrize("name", ["shuffled", "generator", "uneven", "distributed", "own loop", "one by one"])
def test_workers_change_nothing(name: str, persistent: bool) -> None:
    """With two workers, interrupted after some steps, of which some end an epoch."""
    program = epochs_over(lambda: LOADERS[name](num_workers=2, persistent_workers=persistent), epochs=2)
    check_everywhere(program, every=7 if name == "one by one" else 4)
