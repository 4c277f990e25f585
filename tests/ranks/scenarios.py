"""What can be wrong with one of four ranks. Each scenario runs on all of them, one after the other in one job."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import distributed

import ckptstore as cs
from ckptstore.engine import joint
from ckptstore.engine.crew import Crew
from ckptstore.errors import StorageFullError
from ckptstore.format.records import PartRecord
from ckptstore.state.tensors import TensorSource
from ckptstore.storage.local import LocalStorage
from ckptstore.store import Store
from tests.ranks.models import mesh
from tests.ranks.test_kills import state

TIMEOUT_S = 3.0
ODD = 2
"""The rank with which something is wrong."""

Scenario = Callable[[Store, int], Any]
FAIL: dict[str, tuple[Scenario, str]] = {}
"""By name: what every rank does after step 1 was saved, and what all must be told."""


def fails(words: str) -> Callable[[Scenario], Scenario]:
    def add(scenario: Scenario) -> Scenario:
        FAIL[scenario.__name__] = scenario, words
        return scenario

    return add


@contextmanager
def hook(owner: Any, name: str, change: Callable[..., Any], *, active: bool) -> Iterator[list[int]]:
    """Have ``change(real, self, *args)`` take the place of a method, on one rank; how often it was called."""
    real, called = getattr(owner, name), [0]

    def changed(self: Any, *args: Any, **options: Any) -> Any:
        called[0] += 1
        return change(real, self, *args, **options)

    with mock.patch.object(owner, name, changed) if active else mock.patch.object(owner, name, real):
        yield called
    if active:
        assert called[0], f"{name} was never called: nothing was injected"


@fails("rank 2: 12|another step each .*rank 2: 12")
def another_step(store: Store, rank: int) -> Any:
    return store.save(state(2, rank), step=12 if rank == ODD else 2)


@fails("another epoch each .*rank 2: 7")
def another_epoch(store: Store, rank: int) -> Any:
    return store.save(state(2, rank), step=2, epoch=7 if rank == ODD else 1)


@fails("rank 2.*can't be stored without pickle")
def a_value_that_can_not_be_stored(store: Store, rank: int) -> Any:
    return store.save({**state(2, rank), **({"bad": object()} if rank == ODD else {})}, step=2)


@fails("rank 2.*no number")
def a_metric_that_is_no_number(store: Store, rank: int) -> Any:
    return store.save(state(2, rank), step=2, metrics={"loss": "high" if rank == ODD else 1.0})


@fails("rank 2.*no space left")
def a_full_disk(store: Store, rank: int) -> Any:
    def full(real: Any, self: Any, key: str, **options: Any) -> Any:
        raise StorageFullError("no space left", key=key)

    with hook(LocalStorage, "open_writer", full, active=rank == ODD):
        return store.save(state(2, rank), step=2, mode="async").result()


@fails("rank 2.*hasn't come to a save")
def one_does_not_come(store: Store, rank: int) -> Any:
    if rank == ODD:
        # When it comes, all others are gone; it gets the same answer.
        time.sleep(2 * TIMEOUT_S + 3)
    return store.save(state(2, rank), step=2)


@fails("rank 2.*hasn't written its part")
def one_is_slow(store: Store, rank: int) -> Any:
    def slow(real: Any, self: Any, key: str, *args: Any, **options: Any) -> Any:
        if "/part-" in key:
            time.sleep(2 * TIMEOUT_S + 3)
        return real(self, key, *args, **options)

    with hook(LocalStorage, "create", slow, active=rank == ODD):
        return store.save(state(2, rank), step=2)


@fails("rank 2 is at a load, rank 0 at a save")
def one_loads(store: Store, rank: int) -> Any:
    return store.load(into=state(0, rank)) if rank == ODD else store.save(state(2, rank), step=2)


@fails("rank 2.*took part in another save: 5 ranks, plan")
def another_world_size(store: Store, rank: int) -> Any:
    def five(real: Any, *args: Any, **fields: Any) -> Any:
        return PartRecord(*args, **{**fields, "world_size": 5})

    with mock.patch.object(joint, "PartRecord", lambda **f: five(None, **f)) if rank == ODD else mock.MagicMock():
        return store.save(state(2, rank), step=2)


@fails("rank 2.*took part in another save: 4 ranks, plan 00000000")
def another_plan(store: Store, rank: int) -> Any:
    def other(**fields: Any) -> Any:
        return PartRecord(**{**fields, "plan": "0" * 64})

    with mock.patch.object(joint, "PartRecord", other) if rank == ODD else mock.MagicMock():
        return store.save(state(2, rank), step=2)


_SHARDED: dict[str, Any] = {}
"""A tensor that is spread over all: made once, as that takes all of them."""


@fails("'w'.*missing or overlaps another, that of rank 2, it seems")
def a_shard_is_missing(store: Store, rank: int) -> Any:
    return store.save({} if rank == ODD else _SHARDED, step=2)


@fails("'w'.*missing or overlaps another, that of rank 2, it seems")
def shards_overlap(store: Store, rank: int) -> Any:
    def moved(real: Any, self: Any) -> Any:
        box = real.fget(self)
        return ((3, 0), box[1]) if box is not None else None

    with _region(moved, active=rank == ODD):
        return store.save(_SHARDED, step=2)


@contextmanager
def _region(change: Callable[..., Any], *, active: bool) -> Iterator[None]:
    real = TensorSource.region
    with mock.patch.object(TensorSource, "region", property(lambda self: change(real, self)) if active else real):
        yield


@fails("'w' is whole of .* on rank 2, and a shard of")
def whole_on_one(store: Store, rank: int) -> Any:
    return store.save({"w": torch.zeros(8, 5)} if rank == ODD else _SHARDED, step=2)


def _after_report(change: Callable[[Path], None], rank: int, url: str) -> Any:
    """Do something to what was written when this rank reports that it was."""

    def report(real: Any, self: Crew, name: str, message: Any) -> Any:
        (folder,) = Path(url.removeprefix("file://"), "checkpoints").glob("*step2*")
        change(folder)
        return real(self, name, message)

    return hook(Crew, "report", report, active=rank == ODD)


@fails("rank 2.*its part is not what rank 0 finds")
def its_part_is_missing(store: Store, rank: int) -> Any:
    with _after_report(lambda folder: (folder / "part-00002.json").unlink(), rank, store.url):
        return store.save(state(2, rank), step=2)


@fails("rank 2.*its part is not what rank 0 finds.*damaged")
def its_part_is_damaged(store: Store, rank: int) -> Any:
    def flip(folder: Path) -> None:
        path = folder / "part-00002.json"
        data = bytearray(path.read_bytes())
        data[20] ^= 1
        path.write_bytes(data)

    with _after_report(flip, rank, store.url):
        return store.save(state(2, rank), step=2)


@fails("own-r00002.safetensors disappeared")
def its_file_is_missing(store: Store, rank: int) -> Any:
    with _after_report(lambda folder: (folder / "own-r00002.safetensors").unlink(), rank, store.url):
        return store.save(state(2, rank), step=2)


@fails("own-r00002.safetensors has .* bytes")
def its_file_is_cut_short(store: Store, rank: int) -> Any:
    with _after_report(lambda folder: os.truncate(folder / "own-r00002.safetensors", 100), rank, store.url):
        return store.save(state(2, rank), step=2)


@fails("rank 0.*the disk of rank 0 is gone|the disk of rank 0 is gone")
def rank_0_can_not_write_the_manifest(store: Store, rank: int) -> Any:
    def gone(real: Any, self: Any, key: str, *args: Any, **options: Any) -> Any:
        if key.endswith("/manifest.json"):
            raise cs.StorageError("the disk of rank 0 is gone", key=key)
        return real(self, key, *args, **options)

    with hook(LocalStorage, "create", gone, active=rank == 0):
        return store.save(state(2, rank), step=2)


@fails("rank 0 said nothing|because of rank 0")
def rank_0_says_nothing(store: Store, rank: int) -> Any:
    """The others give up first, and condemn the id: then rank 0, which wakes up, can't commit it."""

    def slow(real: Any, self: Any, key: str, *args: Any, **options: Any) -> Any:
        if key.endswith("/manifest.json"):
            time.sleep(TIMEOUT_S + 5)
        return real(self, key, *args, **options)

    with hook(LocalStorage, "create", slow, active=rank == 0):
        return store.save(state(2, rank), step=2)


@fails("rank 2.*was written to, by something else than an optimizer's step")
def one_writes_while_it_is_read(store: Store, rank: int) -> Any:
    weight = torch.full((200_000,), float(rank), requires_grad=True)
    weight.grad = torch.ones_like(weight)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    distributed.barrier()

    def touched(real: Any, self: Any, *args: Any, **options: Any) -> Any:
        with torch.no_grad():
            weight.add_(1)
        return real(self, *args, **options)

    with hook(TensorSource, "read_into", touched, active=rank == ODD):
        handle = store.save(
            {"own": [weight.data_ptr() * 0 + rank], "w": weight, "o": optimizer}, step=2, mode="overlapped"
        )
        return handle.result()


@fails("rank 2 doesn't see what rank 0 has written to .*not each machine's own disk")
def a_disk_of_its_own(store: Store, rank: int) -> Any:
    """The same path on two machines, and no shared folder behind it."""
    place = store.url.removeprefix("file://") + "-elsewhere" * (rank == ODD)
    with cs.open(f"{place}/shared", rank_timeout=TIMEOUT_S) as other:
        other._storage.url = "file:///checkpoints/run"
        return other.save(state(2, rank), step=2)


@fails("another url each .*rank 2: 'file:.*-elsewhere")
def another_url(store: Store, rank: int) -> Any:
    """Each rank makes up the name of the folder from its own clock."""
    place = store.url.removeprefix("file://") + "-elsewhere" * (rank == ODD)
    with cs.open(place + "/own", rank_timeout=TIMEOUT_S) as other:
        return other.save(state(2, rank), step=2)


def run_all(folder: str, names: list[str]) -> dict[str, tuple[str, str, float]]:
    """Each scenario in a store of its own: how it ended on this rank."""
    from torch.distributed.tensor import Shard, distribute_tensor

    rank, found = distributed.get_rank(), {}
    _SHARDED["w"] = distribute_tensor(torch.arange(40.0).reshape(8, 5), mesh(4), [Shard(0)])
    for name in names:
        scenario, _ = FAIL[name]
        with cs.open(f"{folder}/{name}", rank_timeout=TIMEOUT_S) as store:
            store.save(state(1, rank), step=1)
            began = time.monotonic()
            try:
                found[name] = ("saved", str(scenario(store, rank)), 0.0)
            except cs.CheckpointError as error:
                found[name] = (type(error).__name__, str(error), time.monotonic() - began)
        distributed.barrier()
        with cs.open(f"{folder}/{name}", rank_timeout=TIMEOUT_S) as store:
            # The same ranks go on, and save again.
            store.save(state(3, rank), step=3)
        distributed.barrier()
    return found
