"""The order in which a pass takes its samples: noted when it begins, told again, and dealt to any number of ranks.

An order is a dict: ``sampler`` and ``length``, with what else that sampler's order depends on; ``splits``, for each
time that what was left went to other loaders how many samples each of those before had used; and ``share``, of how
many loaders this one is which, None where the pass isn't dealt yet.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler, SequentialSampler

from ckptstore.state import rng

Fields = dict[str, Any]
Samples = npt.NDArray[np.int64]

_KNOWN = (DistributedSampler, RandomSampler, SequentialSampler)


def _outer(loader: Any) -> Any:
    return loader.sampler if loader.batch_sampler is None else loader.batch_sampler


def sampler_of(source: object) -> Any:
    """The sampler whose order the batches of a loader keep; None where it is another kind, or batches are mixed."""
    if not isinstance(source, DataLoader):
        return None
    found = _outer(source)
    if type(found) is BatchSampler:
        found = found.sampler
    return found if isinstance(found, _KNOWN) else None


def batches(source: DataLoader[Any], samples: list[int]) -> Iterable[Any]:
    """``samples`` in the place of those that its sampler would give, in batches of its size."""
    outer = _outer(source)
    return BatchSampler(samples, outer.batch_size, outer.drop_last) if type(outer) is BatchSampler else samples


def noted(source: object) -> Fields | None:
    """The order of the pass that begins now; None where it isn't known how to tell it again.

    To be called when the sampler is about to give its first sample, since a random one draws then.
    """
    sampler = sampler_of(source)
    # Not their subclasses: those may give any order.
    if type(sampler) is DistributedSampler:
        order = {
            "sampler": "distributed",
            "length": len(sampler.dataset),  # type: ignore[arg-type]
            "replicas": sampler.num_replicas,
            "shuffle": bool(sampler.shuffle),
            "seed": int(sampler.seed + sampler.epoch),
            "drop_last": bool(sampler.drop_last),
        }
    elif type(sampler) is SequentialSampler:
        order = {"sampler": "sequential", "length": len(sampler.data_source)}
    elif type(sampler) is RandomSampler and _is_permutation(sampler):
        order = {"sampler": "random", "length": sampler.num_samples, "generator": _generator(sampler)}
    else:
        return None
    return order | {"splits": [], "share": share_of(source)}


def _is_permutation(sampler: RandomSampler) -> bool:
    on_cpu = sampler.generator is None or sampler.generator.device.type == "cpu"
    return on_cpu and not sampler.replacement and sampler.num_samples == len(sampler.data_source)


def _generator(sampler: RandomSampler) -> torch.Tensor:
    """The state of the generator that the order comes from."""
    generator = sampler.generator
    if generator is None:
        # What the sampler is about to do, with a copy of the process's generator.
        process, generator = torch.Generator(), torch.Generator()
        process.set_state(torch.get_rng_state())
        generator.manual_seed(int(torch.empty((), dtype=torch.int64).random_(generator=process).item()))
    state: torch.Tensor = generator.get_state()
    return state


def share_of(source: object) -> Fields | None:
    """Of how many loaders this one is which, by its sampler: one that knows nothing of ranks is the only one.

    None where the order of its batches isn't that of a sampler of torch's.
    """
    sampler = sampler_of(source)
    if sampler is None:
        return None
    replicas, replica = 1, 0
    if isinstance(sampler, DistributedSampler):
        replicas, replica = sampler.num_replicas, sampler.rank
    # Where incomplete batches are dropped, samples that are added could complete one.
    drop = any(getattr(owner, "drop_last", False) for owner in (sampler, _outer(source)))
    return {"replicas": replicas, "replica": replica, "drop": drop}


def length_of(source: object) -> int:
    """How many samples the sampler of a loader chooses from."""
    sampler = sampler_of(source)
    data: Any = sampler.dataset if isinstance(sampler, DistributedSampler) else sampler.data_source
    return len(data)


def knows_ranks(source: object) -> bool:
    """Whether the loader reads only its rank's samples."""
    return isinstance(sampler_of(source), DistributedSampler)


def _whole(order: Fields, name: str) -> Samples:
    """All samples of the pass, in the order in which they are dealt to the ranks that began it.

    Raises:
        FormatError, StateError: the generator's state is malformed.
    """
    count = order["length"]
    if not count:
        return np.zeros(0, np.int64)
    if order["sampler"] == "sequential":
        return np.arange(count)
    if order["sampler"] == "random":
        generator = torch.Generator()
        rng.set_state("torch_generator", generator, order["generator"], f"{name}/order/generator")
        return np.fromiter(RandomSampler(range(count), generator=generator), np.int64, count)
    alone = DistributedSampler(range(count), 1, 0, order["shuffle"], order["seed"])  # type: ignore[arg-type, var-annotated]
    dealt = DistributedSampler(range(count), order["replicas"], 0, drop_last=order["drop_last"])  # type: ignore[arg-type, var-annotated]
    # Cut, or begun again where it is too short: as the sampler does.
    return np.resize(np.fromiter(alone, np.int64, count), dealt.total_size)


def left(samples: Samples, used: list[int]) -> Samples:
    """What is left, in order, of samples that were dealt one by one to ranks, of which each used so many of its own."""
    place = np.arange(len(samples))
    counts = np.array([min(count, len(samples)) for count in used])
    return samples[place // len(used) >= counts[place % len(used)]]


def told(order: Fields, name: str) -> Samples:
    """The samples that were left at the latest split, in the order in which they are dealt.

    Raises:
        FormatError, StateError: the generator's state is malformed.
    """
    samples = _whole(order, name)
    for used in order["splits"]:
        samples = left(samples, used)
    return samples


def dealt(samples: Samples, share: Fields, start: int = 0, stop: int | None = None) -> list[int]:
    """The part of one of the loaders, or some of it. All get as many: where needed, the first ones come again.

    Where its ``drop`` says so, those that don't suffice for all are left out instead.
    """
    replicas, count = share["replicas"], len(samples)
    each = count // replicas if share["drop"] else -(-count // replicas)
    turns = np.arange(min(start, each), each if stop is None else min(stop, each))
    places = turns * replicas + share["replica"]
    part: list[int] = samples[places % max(count, 1)].tolist()
    return part
