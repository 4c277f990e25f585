"""What four ranks do with stores by way of ``torch.distributed.checkpoint``: one check after the other.

Each check is a function of a ``Rank``; all ranks call all of them, in the same order.
"""

from __future__ import annotations

import json
import os
import signal
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch._dynamo  # each rank would import it, which takes seconds
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from click.testing import CliRunner
from torch import nn
from torch.distributed._shard.sharded_tensor import Shard as ShardOf
from torch.distributed._shard.sharded_tensor import init_from_local_shards
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import ckptstore as cs
from ckptstore.cli.main import cli
from ckptstore.integrations.dcp import (
    CkptStoreLoadPlanner,
    CkptStoreReader,
    CkptStoreSavePlanner,
    CkptStoreWriter,
    import_dcp,
)

SIZE = 4
LIMIT_S = 200
"""After which a rank that hangs is ended by a signal."""


@dataclass
class Rank:
    """One of the ranks, and a folder that all share and no other check uses."""

    rank: int
    folder: Path
    mesh: DeviceMesh
    grid: DeviceMesh
    half: DeviceMesh | None
    halves: dist.ProcessGroup
    """Of ranks 0 and 1."""

    def store(self, name: str = "store", **options: Any) -> cs.Store:
        return cs.open(self.folder / name, **options)


def full(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value


def numbers(*shape: int, start: float = 0.0) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape) + start


def one_failure(action: Callable[[], object]) -> dict[int, BaseException]:
    """What the ranks failed with, as DCP tells it everywhere."""
    try:
        action()
    except CheckpointException as error:
        return {rank: cause for rank, (cause, _) in error.failures.items()}
    raise AssertionError("it hasn't failed")


def tensors_of(mesh: DeviceMesh, grid: DeviceMesh, *, zero: bool = False) -> dict[str, Any]:
    """Each kind of placement, evenly and unevenly."""
    factor = 0.0 if zero else 1.0
    return {
        "plain": numbers(6, 5) * factor,
        "rows": distribute_tensor(numbers(8, 3) * factor, mesh, [Shard(0)]),
        "uneven": distribute_tensor(numbers(5, 3) * factor, mesh, [Shard(0)]),
        "few": distribute_tensor(numbers(2, 3) * factor, mesh, [Shard(0)]),
        "columns": distribute_tensor(numbers(3, 9) * factor, mesh, [Shard(1)]),
        "grid": distribute_tensor(numbers(7, 6) * factor, grid, [Shard(0), Shard(1)]),
        "replicas": distribute_tensor(numbers(4, 4) * factor, mesh, [Replicate()]),
        "half": distribute_tensor(numbers(6, 2) * factor, grid, [Replicate(), Shard(0)]),
        "complex": distribute_tensor((numbers(4, 2) * factor).to(torch.complex128), mesh, [Shard(0)]),
        "none": torch.zeros(0, 3),
        "scalar": torch.tensor(7.0) * factor,
    }


def check_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert torch.equal(full(found[key]), full(value)), key


# -- saving and loading ---------------------------------------------------------------------------------------


def check_placements(it: Rank) -> None:
    """Every kind of shard comes back, spread alike, by DCP and by the store; each byte is written once."""
    store = it.store()
    wanted = tensors_of(it.mesh, it.grid)
    writer = CkptStoreWriter(store, step=3, epoch=1, metrics={"loss": 0.5}, reasons=["test"])
    dcp.save({"model": wanted, "lr": 0.1}, storage_writer=writer)
    assert (writer.checkpoint is not None) == (it.rank == 0)
    saved = store.resolve(str(writer.id))
    assert (saved.step, saved.epoch, saved.metrics, saved.world_size) == (3, 1, {"loss": 0.5}, SIZE)
    assert saved.tensors == len(wanted)
    contents = store.contents(saved)
    stored = sum(row.nbytes for file in contents.files for row in file.stream.rows)
    assert stored == sum(full(value).nbytes for value in wanted.values())
    assert len({part.rank for part in contents.parts if part.files}) > 1
    target = tensors_of(it.mesh, it.grid, zero=True)
    state: dict[str, Any] = {"model": target, "lr": 0.0}
    dcp.load(state, storage_reader=CkptStoreReader(store))
    check_same(state["model"], wanted)
    assert state["lr"] == 0.1
    assert state["model"]["rows"] is target["rows"]
    if it.rank == 0:
        assert store.verify().ok
        for command in ("show", "verify"):
            found = CliRunner().invoke(cli, [command, store.url])
            assert found.exit_code == 0, found.output
    dist.barrier()


def check_other_placements(it: Rank) -> None:
    """What was spread one way is loaded spread another way, on four ranks, two and one, and back from one."""
    store = it.store()
    tables = {"a": (9, 7), "b": (4, 4), "c": (3, 2)}
    ways: list[list[Any]] = [[Shard(0)], [Shard(1)], [Replicate()]]
    for step, way in enumerate(ways):
        state = {key: distribute_tensor(numbers(*shape), it.mesh, way) for key, shape in tables.items()}
        dcp.save(state, storage_writer=CkptStoreWriter(store, step=step))
    alone = it.store("alone", ranks="one")
    if it.rank == 0:
        dcp.save(
            {key: numbers(*shape) for key, shape in tables.items()},
            storage_writer=CkptStoreWriter(alone, step=0),
            no_dist=True,
        )
    dist.barrier()
    for step in range(len(ways)):
        for way in ways:
            target = {key: distribute_tensor(torch.zeros(shape), it.mesh, way) for key, shape in tables.items()}
            dcp.load(target, storage_reader=CkptStoreReader(store, f"step:{step}"))
            check_same(target, {key: numbers(*shape) for key, shape in tables.items()})
            dcp.load(target, storage_reader=CkptStoreReader(alone))
            check_same(target, {key: numbers(*shape) for key, shape in tables.items()})
        if it.half is not None:
            target = {key: distribute_tensor(torch.zeros(shape), it.half, [Shard(0)]) for key, shape in tables.items()}
            dcp.load(target, storage_reader=CkptStoreReader(store, f"step:{step}"), process_group=it.halves)
            check_same(target, {key: numbers(*shape) for key, shape in tables.items()})
        plain = {key: torch.zeros(shape) for key, shape in tables.items()}
        dcp.load(plain, storage_reader=CkptStoreReader(store, f"step:{step}"), no_dist=True)
        check_same(plain, {key: numbers(*shape) for key, shape in tables.items()})


def check_only_overlapping_blocks(it: Rank) -> None:
    """A rank that needs a quarter of a tensor reads no more than the blocks in which that lies."""
    store = it.store()
    big = {"w": distribute_tensor(torch.ones(4, 4 << 20), it.mesh, [Replicate()])}
    dcp.save(big, storage_writer=CkptStoreWriter(store, step=1))
    seen: list[int] = []
    target = {"w": distribute_tensor(torch.zeros(4, 4 << 20), it.mesh, [Shard(0)])}
    dcp.load(target, storage_reader=CkptStoreReader(store, progress=lambda done, total: seen.append(total)))
    # A row is a block; the header moves it, so that it lies in two.
    assert max(seen) <= 32 << 20
    assert torch.equal(target["w"].to_local(), torch.ones(1, 4 << 20))


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(7, 7) for _ in range(3))
        self.head = nn.Linear(7, 5, bias=False)
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        out: torch.Tensor = self.head(x)
        return out


def trained(mesh: DeviceMesh | None, steps: int, seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Small()
    if mesh is not None:
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step in range(steps):
        train(model, optimizer, step)
    return model, optimizer


def train(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> float:
    torch.manual_seed(100 + step)
    loss = model(torch.randn(8, 7)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(full(loss.detach()))


def check_fsdp(it: Rank) -> None:
    """A sharded model and its optimizer go on as if never interrupted: on as many ranks, on two, and on one.

    Also from what ``Store.save`` has saved of the live ones.
    """
    store = it.store()
    model, optimizer = trained(it.mesh, 3)
    state = dict(zip(("model", "optim"), get_state_dict(model, optimizer), strict=True))
    dcp.save(state, storage_writer=CkptStoreWriter(store, step=3))
    live = it.store("live")
    live.save({"model": model, "optim": optimizer}, step=3)
    losses = [train(model, optimizer, step) for step in (3, 4)]
    for mesh, group in ((it.mesh, None), (it.half, it.halves)):
        if mesh is not None:
            assert resumed(store, mesh, process_group=group) == losses
            assert resumed(live, mesh, process_group=group) == losses
    # All of a tensor at once adds up in another order.
    found = resumed(store, None, no_dist=True)
    assert torch.allclose(torch.tensor(found), torch.tensor(losses), rtol=1e-5)
    assert full_state(store) == {"model", "optim"}


def resumed(store: cs.Store, mesh: DeviceMesh | None, **options: Any) -> list[float]:
    model, optimizer = trained(mesh, 0, seed=1)
    parts = get_state_dict(model, optimizer)
    state = dict(zip(("model", "optim"), parts, strict=True))
    dcp.load(state, storage_reader=CkptStoreReader(store), **options)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])
    return [train(model, optimizer, step) for step in (3, 4)]


def full_state(store: cs.Store) -> set[str]:
    """The nested state, as the store itself gives it to each process."""
    state = store.load()
    assert state["model"]["layers.0.weight"].shape == (7, 7)
    assert state["optim"]["state"]["head.weight"]["exp_avg"].shape == (5, 7)
    assert state["optim"]["param_groups"][0]["lr"] == 0.01
    return set(state)


def check_two_dimensions(it: Rank) -> None:
    """Tensor parallel and sharded at once: the shards of a row lie apart, and come together."""
    store = it.store()
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    wanted = {key: value.clone() for key, value in plain.state_dict().items()}
    parallelize_module(plain, grid["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(plain, mesh=grid["data"])
    state = plain.state_dict()
    assert any("Strided" in str(value.placements) for value in state.values() if isinstance(value, DTensor))
    dcp.save({"model": state}, storage_writer=CkptStoreWriter(store, step=1))
    check_same(store.load()["model"], wanted)
    for value in state.values():
        value.to_local().zero_()
    dcp.load({"model": state}, storage_reader=CkptStoreReader(store))
    check_same(state, wanted)


def check_sharded_tensors(it: Rank) -> None:
    """The older kind of tensor that is spread over ranks, of several shards a rank, too."""

    def made(factor: float) -> Any:
        places = [2 * it.rank, 2 * it.rank + 1]
        shards = [
            ShardOf.from_tensor_and_offsets(numbers(1, 3, start=3 * at) * factor, [at, 0], it.rank) for at in places
        ]
        return init_from_local_shards(shards, 8, 3)

    store = it.store()
    dcp.save({"model": {"w": made(1.0)}}, storage_writer=CkptStoreWriter(store, step=1))
    assert torch.equal(store.load()["model"]["w"], numbers(8, 3))
    state = {"model": {"w": made(0.0)}}
    dcp.load(state, storage_reader=CkptStoreReader(store))
    for shard in state["model"]["w"].local_shards():
        at = shard.metadata.shard_offsets[0]
        assert torch.equal(shard.tensor, numbers(1, 3, start=3 * at))
    spread = {"model": {"w": distribute_tensor(torch.zeros(8, 3), it.mesh, [Shard(1)])}}
    dcp.load(spread, storage_reader=CkptStoreReader(store))
    assert torch.equal(full(spread["model"]["w"]), numbers(8, 3))


def check_groups(it: Rank) -> None:
    """Ranks 2 and 3 save by themselves: the first one of them leads."""
    group = dist.new_group([2, 3])
    store = it.store()
    if it.rank in (2, 3):
        mesh = DeviceMesh.from_group(group, "cpu")
        wanted = {"w": distribute_tensor(numbers(5, 3), mesh, [Shard(0)]), "n": 1}
        writer = CkptStoreWriter(store, step=1)
        dcp.save(wanted, storage_writer=writer, process_group=group)
        assert (writer.checkpoint is not None) == (it.rank == 2)
        target: dict[str, Any] = {"w": distribute_tensor(torch.zeros(5, 3), mesh, [Shard(0)]), "n": 0}
        dcp.load(target, storage_reader=CkptStoreReader(store), process_group=group)
        check_same({"w": target["w"]}, {"w": wanted["w"]})
    dist.barrier()
    assert store.resolve().world_size == 2


def check_whole_model_on_one(it: Rank) -> None:
    """A whole model that only rank 0 has, as ``full_state_dict`` gives it, comes out of what all have saved."""
    store = it.store()
    model, optimizer = trained(it.mesh, 1)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    whole, _ = get_state_dict(model, optimizer, options=options)
    shards, _ = get_state_dict(model, optimizer)
    dcp.save({"model": shards}, storage_writer=CkptStoreWriter(store, step=1))
    if it.rank == 0:
        target = {"model": {key: torch.zeros_like(value) for key, value in whole.items()}}
        dcp.load(target, storage_reader=CkptStoreReader(store), no_dist=True)
        check_same(target["model"], dict(whole))


def check_store_loads(it: Rank) -> None:
    """The store itself restores what DCP has saved into the live state of all ranks, and gives all of it to one."""
    store = it.store()
    wanted = tensors_of(it.mesh, it.grid)
    dcp.save({"model": wanted, "text": "x", "own": f"of {it.rank}"}, storage_writer=CkptStoreWriter(store, step=3))
    target: dict[str, Any] = {"model": tensors_of(it.mesh, it.grid, zero=True), "text": "", "own": ""}
    store.load(into=target)
    check_same(target["model"], wanted)
    assert target["text"] == "x"
    # One rank's value stands for all.
    owners: list[Any] = [None] * SIZE
    dist.all_gather_object(owners, target["own"])
    assert len(set(owners)) == 1
    check_same(store.load()["model"], {key: full(value) for key, value in wanted.items()})


def check_store_saves(it: Rank) -> None:
    """DCP loads what ``Store.save`` has saved by all ranks: nested state dicts, by the keys that DCP gives them."""
    store = it.store()
    wanted = tensors_of(it.mesh, it.grid)
    store.save({"model": wanted, "optim": {"groups": [{"lr": 0.1, "betas": (0.9, 0.99)}]}}, step=1)
    for planner in (None, CkptStoreLoadPlanner()):
        state: dict[str, Any] = {
            "model": tensors_of(it.mesh, it.grid, zero=True),
            "optim": {"groups": [{"lr": 0.0, "betas": ()}]},
        }
        dcp.load(state, storage_reader=CkptStoreReader(store), planner=planner)
        check_same(state["model"], wanted)
        assert state["optim"] == {"groups": [{"lr": 0.1, "betas": (0.9, 0.99)}]}


def check_stages(it: Rank) -> None:
    """Ranks with other keys, as stages of a pipeline have them, save one state; each loads its own of it."""
    store = it.store()
    own = {
        "model": {f"stage{it.rank}.w": numbers(3, 2, start=it.rank), "shared": numbers(4)},
        "n": {f"{it.rank}": it.rank},
    }
    dcp.save(own, storage_writer=CkptStoreWriter(store, step=1))
    state: dict[str, Any] = {
        "model": {f"stage{it.rank}.w": torch.zeros(3, 2), "shared": torch.zeros(4)},
        "n": {f"{it.rank}": None},
    }
    dcp.load(state, storage_reader=CkptStoreReader(store))
    check_same(state["model"], own["model"])
    assert state["n"] == own["n"]
    whole = store.load()
    assert sorted(whole["model"]) == ["shared", *(f"stage{rank}.w" for rank in range(SIZE))]
    assert whole["n"] == {str(rank): rank for rank in range(SIZE)}


def check_objects(it: Rank) -> None:
    """Objects of all kinds that JSON has words for here, by DCP's planners and ours, also with tensors inside."""
    store = it.store()
    state: dict[str, Any] = {
        "plain": {"n": 1, "x": [1, 2.5, None], "tuple": (1, "a"), "set": {1, 2}, "big": 1 << 70, "text": "naïve"},
        "inside": {"pair": (numbers(3, 2), {"t": torch.ones(2, dtype=torch.bfloat16)})},
        "bytes": b"x" * 5000,
        "dtype": torch.float16,
    }
    for step, saver in enumerate((None, CkptStoreSavePlanner())):
        dcp.save(state, storage_writer=CkptStoreWriter(store, step=step), planner=saver)
        for loader in (None, CkptStoreLoadPlanner()):
            target: dict[str, Any] = {
                "plain": dict.fromkeys(state["plain"]),
                "inside": {"pair": None},
                "bytes": None,
                "dtype": None,
            }
            dcp.load(target, storage_reader=CkptStoreReader(store), planner=loader)
            assert target["plain"] == state["plain"]
            assert (target["bytes"], target["dtype"]) == (state["bytes"], torch.float16)
            pair = target["inside"]["pair"]
            assert torch.equal(pair[0], numbers(3, 2))
            assert pair[1]["t"].dtype == torch.bfloat16


def check_async(it: Rank) -> None:
    """What is saved behind is what the state was at the call."""
    store = it.store()
    wanted = tensors_of(it.mesh, it.grid)
    live = tensors_of(it.mesh, it.grid)
    group = dist.new_group(backend="gloo")
    writer = CkptStoreWriter(store, step=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        future = dcp.async_save({"model": live}, storage_writer=writer, process_group=group)
    for value in live.values():
        (value.to_local() if isinstance(value, DTensor) else value).zero_()
    getattr(future, "upload_completion", future).result()
    state = {"model": tensors_of(it.mesh, it.grid, zero=True)}
    dcp.load(state, storage_reader=CkptStoreReader(store))
    check_same(state["model"], wanted)


def check_cached_plans(it: Rank) -> None:
    """Plans that are kept from save to save go with our planner; with DCP's own they are refused."""
    store = it.store()
    options = {"enable_plan_caching": True}
    for step in range(3):
        state = {"w": distribute_tensor(numbers(8, 3, start=step), it.mesh, [Shard(0)]), "n": step}
        planner = CkptStoreSavePlanner(**options)  # type: ignore[arg-type]
        dcp.save(state, storage_writer=CkptStoreWriter(store, step=step), planner=planner)
        target: dict[str, Any] = {"w": distribute_tensor(torch.zeros(8, 3), it.mesh, [Shard(0)]), "n": None}
        dcp.load(target, storage_reader=CkptStoreReader(store))
        assert torch.equal(full(target["w"]), numbers(8, 3, start=step))
        assert target["n"] == step
    failed = one_failure(
        lambda: dcp.save(
            {"n": 1},
            storage_writer=CkptStoreWriter(store, step=9),
            planner=dcp.DefaultSavePlanner(**options),  # type: ignore[arg-type]
        )
    )
    assert all(isinstance(error, cs.StateError) and "plan_caching" in str(error) for error in failed.values())


def check_import(it: Rank) -> None:
    """What four ranks have written with DCP's own writer is put together."""
    wanted = tensors_of(it.mesh, it.grid)
    dcp.save({"model": wanted, "n": [1, 2]}, checkpoint_id=it.folder / "dcp")
    whole = {key: full(value) for key, value in wanted.items()}
    if it.rank == 0:
        with it.store(ranks="one") as store:
            import_dcp(it.folder / "dcp", store, step=5)
            state = store.load()
            check_same(state["model"], whole)
            assert state["n"] == [1, 2]
    dist.barrier()


# -- failing ------------------------------------------------------------------------------------------------


class Refusing(CkptStoreSavePlanner):
    """Fails on one rank, when data are asked for."""

    def __init__(self, fails: bool) -> None:
        super().__init__()
        self.fails = fails

    def resolve_data(self, write_item: Any) -> Any:
        if self.fails:
            raise OSError("no such data")
        return super().resolve_data(write_item)


def check_failing_rank(it: Rank) -> None:
    """A rank that fails, whichever it is: no rank has saved, nothing ever will, and the one before is the latest."""
    store = it.store()
    state = {"w": distribute_tensor(numbers(8, 3), it.mesh, [Shard(0)])}
    dcp.save(state, storage_writer=CkptStoreWriter(store, step=1))
    before = store.resolve().id
    for rank in range(SIZE):
        writer = CkptStoreWriter(store, step=2)
        planner = Refusing(rank == it.rank)
        failed = one_failure(lambda: dcp.save(state, storage_writer=writer, planner=planner))  # noqa: B023
        assert failed.keys() == {rank}
        assert "no such data" in str(failed[rank])
        dist.barrier()
        assert store.resolve().id == before
        assert str(writer.id) in {str(id) for id in store.catalogue().condemned}
        dist.barrier()
    dcp.save(state, storage_writer=CkptStoreWriter(store, step=3))
    assert store.resolve().step == 3


def check_object_of_a_class(it: Rank) -> None:
    """An object that would need pickle fails on all, named; nothing is saved."""
    store = it.store()
    failed = one_failure(lambda: dcp.save({"x": 1, "args": {"it": it}}, storage_writer=CkptStoreWriter(store, step=1)))
    assert all(isinstance(error, cs.StateError) and "args/it" in str(error) for error in failed.values())
    dist.barrier()
    assert store.checkpoints() == []


def check_storage_apart(it: Rank) -> None:
    """A rank whose folder is another one, as on a disk of its own machine, is named, and nothing is saved."""
    stores = [it.store("shared"), it.store("apart")]
    state = {"w": distribute_tensor(numbers(8, 3), it.mesh, [Shard(0)])}
    failed = one_failure(lambda: dcp.save(state, storage_writer=CkptStoreWriter(stores[it.rank == 2], step=1)))
    assert failed.keys() == {0}
    assert isinstance(failed[0], cs.SaveFailedError)
    assert "because of rank 2" in str(failed[0])
    dist.barrier()
    assert stores[0].checkpoints() == []


def check_part_lost(it: Rank) -> None:
    """A part or a file that is changed or lost before rank 0 has looked at it is found, and its rank named."""
    for what in ("gone", "changed", "file"):
        store = it.store(what)
        writer = CkptStoreWriter(store, step=1)
        write = writer.write_data

        def spoil(plan: Any, planner: Any) -> Any:
            results = write(plan, planner)  # noqa: B023
            if it.rank == 1:
                folder = it.folder / what / "checkpoints" / str(writer.id)  # noqa: B023
                victim = folder / ("w-r00001.safetensors" if what == "file" else "part-00001.json")  # noqa: B023
                victim = victim if victim.exists() else next(folder.glob("*-r00001.safetensors"))
                if what == "changed":  # noqa: B023
                    victim.write_bytes(victim.read_bytes().replace(b'"rank":1', b'"rank":3'))
                else:
                    victim.unlink()
            return results

        writer.write_data = spoil  # type: ignore[method-assign]
        state = {"w": distribute_tensor(numbers(8, 3), it.mesh, [Shard(0)])}
        failed = one_failure(lambda: dcp.save(state, storage_writer=writer))  # noqa: B023
        assert failed.keys() == {0}
        assert isinstance(failed[0], cs.SaveFailedError)
        assert ("because of rank 1" in str(failed[0])) == (what != "file")
        dist.barrier()
        assert store.checkpoints() == []
        assert str(writer.id) in {str(id) for id in store.catalogue().condemned}


def check_other_selection(it: Rank) -> None:
    """Ranks that have found different checkpoints load none."""
    store = it.store()
    for step in (1, 2):
        dcp.save({"w": numbers(4, start=step)}, storage_writer=CkptStoreWriter(store, step=step))
    target = {"w": torch.zeros(4)}
    selector = "step:1" if it.rank == 3 else "latest"
    failed = one_failure(lambda: dcp.load(target, storage_reader=CkptStoreReader(store, selector)))
    assert isinstance(failed[0], cs.UnavailableError)
    assert torch.equal(target["w"], torch.zeros(4))


def check_nothing_there(it: Rank) -> None:
    """An empty store is told as such, on all ranks."""
    store = it.store()
    failed = one_failure(lambda: dcp.load({"w": torch.zeros(4)}, storage_reader=CkptStoreReader(store)))
    assert failed.keys() == set(range(SIZE))
    assert all(isinstance(error, cs.NotFoundError) for error in failed.values())


def check_damage(it: Rank) -> None:
    """A flipped bit in what one rank needs fails the load on all, and names the block."""
    store = it.store()
    dcp.save(
        {"w": distribute_tensor(numbers(8, 3), it.mesh, [Shard(0)])}, storage_writer=CkptStoreWriter(store, step=1)
    )
    if it.rank == 0:
        file = next((it.folder / "store" / "checkpoints").glob("*/*-r00002.safetensors"))
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    dist.barrier()
    target = {"w": distribute_tensor(torch.zeros(8, 3), it.mesh, [Shard(0)])}
    failed = one_failure(lambda: dcp.load(target, storage_reader=CkptStoreReader(store)))
    assert failed.keys() == {2}
    assert isinstance(failed[2], cs.IntegrityError)
    assert failed[2].block == 0


def killed(rank: int, folder: str, victim: int, where: str) -> NoReturn:
    """Save twice; in the second save one rank is gone from one moment to the next."""
    store = cs.open(Path(folder, "store"))
    mesh = init_device_mesh("cpu", (SIZE,))
    dcp.save(state_of(mesh, 1), storage_writer=CkptStoreWriter(store, step=1))
    writer = CkptStoreWriter(store, step=2)
    if rank == victim:
        die_at(writer, where)
    try:
        dcp.save(state_of(mesh, 2), storage_writer=writer)
    except BaseException:
        os._exit(3)
    os._exit(4)


def state_of(mesh: DeviceMesh, step: int) -> dict[str, Any]:
    return {"w": distribute_tensor(numbers(8, 3, start=step), mesh, [Shard(0)]), "n": step}


def die_at(writer: CkptStoreWriter, where: str) -> None:
    """Have this process end before it has written, when it has, or right after the commit."""
    inner: Any = writer.finish if where == "committed" else writer.write_data

    def die(*args: Any, **kwargs: Any) -> Any:
        if where != "before":
            inner(*args, **kwargs)
        os._exit(9)

    setattr(writer, "finish" if where == "committed" else "write_data", die)


CHECKS = {name.removeprefix("check_"): value for name, value in globals().items() if name.startswith("check_")}
del CHECKS["same"]


def checks(rank: int, folder: str) -> NoReturn:
    """Do all checks as one of the ranks, and leave a note of how each of them ended."""
    mesh, grid = init_device_mesh("cpu", (SIZE,)), init_device_mesh("cpu", (2, 2))
    halves = dist.new_group([0, 1])
    half = DeviceMesh.from_group(halves, "cpu") if rank < 2 else None
    notes: dict[str, str | None] = {}
    for name, check in CHECKS.items():
        place = Path(folder, name)
        place.mkdir(exist_ok=True)
        try:
            check(Rank(rank, place, mesh, grid, half, halves))  # type: ignore[operator]
            notes[name] = None
        except BaseException:
            notes[name] = traceback.format_exc()
        Path(folder, f"notes-{rank}").write_text(json.dumps(notes))
        if notes[name] is not None:
            # The others may be anywhere now.
            os._exit(1)
        dist.barrier()
    os._exit(0)


def main(fields: dict[str, Any]) -> None:
    """Run ``checks`` or ``killed`` on all ranks, each in a fork of this process, and note how they ended."""
    folder = fields["folder"]
    ranks = []
    for rank in range(SIZE):
        if not (child := os.fork()):
            signal.alarm(LIMIT_S)
            try:
                meet(rank, folder)
                (killed if "victim" in fields else checks)(rank, **fields)
            finally:
                os._exit(2)
        ranks.append(child)
    ended = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in ranks]
    Path(folder, "ended").write_text(json.dumps(ended))


def meet(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=SIZE, timeout=timedelta(seconds=60)
    )
