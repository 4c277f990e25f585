"""The ranks of a job, simulated in one process: each has a loader and positions of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, DistributedSampler

from ckptstore.trainer.data import Feeds
from tests.trainer.runs import Numbers

SIZE = 24

State = dict[str, Any]
Batch = list[int]
Make = Callable[[int, int], Any]
"""The loader of a rank, of so many."""


class Options(NamedTuple):
    """What a job's loaders have in common."""

    count: int = SIZE
    shuffle: bool = True
    seed: int = 3
    epoch: int = 1
    drop_samples: bool = False
    drop_batches: bool = False


def sampler(options: Options, rank: int, size: int) -> DistributedSampler[int]:
    data = Numbers(options.count)
    made: DistributedSampler[int] = DistributedSampler(
        data, size, rank, options.shuffle, options.seed, options.drop_samples
    )
    made.set_epoch(options.epoch)
    return made


USUAL = Options()


def loaders(batch_size: int | None, options: Options = USUAL, **more: Any) -> Make:
    def make(rank: int, size: int) -> DataLoader[int]:
        share = sampler(options, rank, size)
        more.setdefault("drop_last", options.drop_batches)
        return DataLoader(share.dataset, batch_size=batch_size, sampler=share, **more)

    return make


class Fleet:
    """The ranks of a job in one process, in step with each other."""

    def __init__(self, size: int, make: Make, states: list[State] | None = None, then: State | None = None) -> None:
        self.size = size
        self.said: list[str] = []
        self.feeds = [Feeds(self.said.append) for _ in range(size)]
        self.loaders = [make(rank, size) for rank in range(size)]
        if states is not None:
            for rank, feeds in enumerate(self.feeds):
                feeds.load_state_dicts(states, rank, size, then)
        self.readings: list[Iterator[Any]] = []
        self.begin()

    def begin(self) -> None:
        """A new pass, on all ranks."""
        pairs = zip(self.feeds, self.loaders, strict=True)
        self.readings = [feeds.batches(loader) for feeds, loader in pairs]

    def step(self) -> list[Batch]:
        """The batches of all ranks, used; nothing at the end, which all find together."""
        batches = [batch for reading in self.readings for batch in [next(reading, None)] if batch is not None]
        assert len(batches) in (0, self.size), "a rank waits for the others in vain"
        if batches:
            for feeds in self.feeds:
                feeds.stepped()
        return [batch.tolist() if isinstance(batch, torch.Tensor) else [batch] for batch in batches]

    def steps(self, count: int | None = None) -> list[list[Batch]]:
        """So many steps, or all that are left of the pass."""
        done: list[list[Batch]] = []
        while count is None or len(done) < count:
            batches = self.step()
            if not batches:
                break
            done.append(batches)
        return done

    def states(self) -> list[State]:
        return [feeds.state_dict() for feeds in self.feeds]


def together(steps: list[list[Batch]]) -> list[Batch]:
    """The batch of all ranks, for each step."""
    return [sorted(index for batch in batches for index in batch) for batches in steps]


def read(steps: list[list[Batch]]) -> Counter[int]:
    return Counter(chain.from_iterable(together(steps)))


def uninterrupted(size: int, make: Make) -> list[list[Batch]]:
    """What a plain loop on all ranks reads."""
    return [
        [batch.tolist() if isinstance(batch, torch.Tensor) else [batch] for batch in batches]
        for batches in zip(*(make(rank, size) for rank in range(size)), strict=True)
    ]


def plain(**options: Any) -> DataLoader[int]:
    return DataLoader(Numbers(SIZE), **{"batch_size": 4, **options})


def own(number: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def shared(batch_size: int, each: int) -> Make:
    """Loaders of which ``each`` ranks in a row read the same samples, as those that share the model's layers."""
    return lambda rank, size: loaders(batch_size)(rank // each, size // each)


def two_steps(size: int = 2, make: Make | None = None) -> list[State]:
    fleet = Fleet(size, make or loaders(2))
    fleet.steps(2)
    return fleet.states()
