"""``torch.distributed.checkpoint`` saves into a store and loads from it; here in one process, without a group."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import pickle
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from click.testing import CliRunner
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

import ckptstore as cs
from ckptstore.cli.main import cli
from ckptstore.integrations.dcp import (
    CkptStoreLoadPlanner,
    CkptStoreReader,
    CkptStoreSavePlanner,
    CkptStoreWriter,
)
from tests.integrations.test_dcp_import import same
from tests.integrity.stores import FolderRaw, Forge

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is:UserWarning")


@pytest.fixture
def store(store_path: Path) -> Iterator[cs.Store]:
    with cs.open(store_path) as store:
        yield store


def save(store: cs.Store, state: dict[str, Any], step: int = 1, planner: Any = None, **facts: Any) -> cs.Checkpoint:
    writer = CkptStoreWriter(store, step=step, **facts)
    dcp.save(state, storage_writer=writer, planner=planner)
    assert writer.checkpoint is not None
    assert writer.id == writer.checkpoint.id
    return writer.checkpoint


def load(store: cs.Store, target: dict[str, Any], selector: str = "latest", planner: Any = None) -> dict[str, Any]:
    dcp.load(target, storage_reader=CkptStoreReader(store, selector), planner=planner)
    return target


def cause_of(action: Callable[[], object]) -> BaseException:
    """What an action failed with, as DCP tells it."""
    with pytest.raises(CheckpointException) as caught:
        action()
    assert list(caught.value.failures) == [0]
    return caught.value.failures[0][0]


def state(factor: float = 1.0) -> dict[str, Any]:
    torch.manual_seed(0)
    dtypes = (torch.float64, torch.bfloat16, torch.int16, torch.bool, torch.complex64, torch.complex128)
    return {
        "model": OrderedDict((f"layers.{n}.weight", torch.randn(3, 4) * factor) for n in range(3)),
        "types": {str(dtype): (torch.ones(5) * factor).to(dtype) for dtype in dtypes},
        "views": {"turned": (torch.randn(4, 6) * factor).T, "part": torch.arange(12.0)[2:9] * factor},
        "optim": {"groups": [{"lr": 0.1 * factor, "betas": (0.9 * factor, 0.99), "params": [0, 1]}]},
        "mixed": [torch.ones(0, 3), {"deep": [{"x": torch.arange(6) * int(factor)}]}],
        "list": [1, [2, [factor]]],
        "scalar": torch.tensor(3.0 * factor),
        "text": "naïve" if factor else "",
    }


# -- round trips ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save_planner", [None, CkptStoreSavePlanner], ids=["default", "ours"])
@pytest.mark.parametrize("load_planner", [None, CkptStoreLoadPlanner], ids=["default", "ours"])
def test_a_nested_state(save_planner: Any, load_planner: Any, store: cs.Store) -> None:
    """All of it comes back, in place where it is a tensor, bit for bit."""
    saved = save(
        store, state(), step=7, planner=save_planner and save_planner(), epoch=2, metrics={"loss": 0.5}, reasons=["x"]
    )
    assert (saved.step, saved.epoch, saved.metrics, list(saved.reasons)) == (7, 2, {"loss": 0.5}, ["x"])
    target = state(0.0)
    live = target["model"]["layers.1.weight"]
    load(store, target, planner=load_planner and load_planner())
    assert same(target, state())
    assert target["model"]["layers.1.weight"] is live


def test_it_is_a_checkpoint_like_any_other(store: cs.Store, store_path: Path) -> None:
    """The store loads it nested, plain or in place, and in part; verify, copy, show and ls take it."""
    timing = save(store, state(), step=7).timing
    # What training waited, DCP alone knows.
    assert timing is not None
    assert timing.save_s
    assert timing.stall_s is None
    assert same(store.load("step:7"), {**state(), "model": dict(state()["model"])})
    target = {**state(0.0), "model": dict(state(0.0)["model"])}
    store.load(into=target)
    assert same(target, {**state(), "model": dict(state()["model"])})
    assert same(store.load(only=["model/*"]), {"model": dict(state()["model"])})
    assert store.verify().ok
    for command in ("ls", "show", "verify"):
        found = CliRunner().invoke(cli, [command, str(store_path)])
        assert found.exit_code == 0, found.output
    other = store_path.with_name("other")
    assert CliRunner().invoke(cli, ["copy", str(store_path), str(other)]).exit_code == 0
    with cs.open(other, read_only=True) as copied:
        assert same(load(copied, state(0.0)), state())


def test_each_component_is_a_file_that_others_open(store: cs.Store, store_path: Path) -> None:
    """Tensors lie in safetensors files, by component, under their names in the state."""
    from safetensors import safe_open

    saved = save(store, state())
    with safe_open(store_path / "checkpoints" / saved.id / "model.safetensors", "pt") as file:
        assert sorted(file.keys()) == [f"layers.{n}.weight" for n in range(3)]
        assert torch.equal(file.get_tensor("layers.2.weight"), state()["model"]["layers.2.weight"])


@pytest.mark.parametrize("load_planner", [dcp.DefaultLoadPlanner, CkptStoreLoadPlanner], ids=["default", "ours"])
def test_states_that_are_not_flattened(load_planner: Any, store: cs.Store) -> None:
    """Each top-level entry is saved as it is, and can be loaded as that, also where it is nested."""
    flat = {"a.b": torch.ones(2), "opt": {"lr": 0.1, "m": torch.arange(3.0)}, "n": [1, {"x": 2}]}
    save(store, flat, planner=CkptStoreSavePlanner(flatten_state_dict=False))
    assert same(store.load(), flat)
    planner = load_planner(flatten_state_dict=False)
    found = load(store, {"a.b": torch.zeros(2), "opt": None, "n": None}, planner=planner)
    assert torch.equal(found["a.b"], torch.ones(2))
    # DCP's own planner puts objects into a copy.
    assert same(planner.state_dict, flat)
    assert load_planner is dcp.DefaultLoadPlanner or same(found, flat)


def test_flat_and_flattened_are_the_same_where_nothing_is_nested(store: cs.Store) -> None:
    """A plain ``model.state_dict()`` is loaded with or without flattening."""
    flat = {f"layers.{n}.weight": torch.randn(2, 2) for n in range(3)}
    for step, flatten in enumerate((True, False)):
        save(store, flat, step, planner=dcp.DefaultSavePlanner(flatten_state_dict=flatten))
        for back in (True, False):
            target = {key: torch.zeros(2, 2) for key in flat}
            load(store, target, planner=dcp.DefaultLoadPlanner(flatten_state_dict=back))
            assert same(target, flat)


@pytest.mark.parametrize("saver", ["dcp", "store"])
def test_training_goes_on(saver: str, store: cs.Store) -> None:
    """A model and its optimizer go on by DCP's helpers as if never interrupted, also what ``Store.save`` has saved."""

    def made(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
        return model, torch.optim.AdamW(model.parameters(), lr=0.01)

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> float:
        torch.manual_seed(step)
        loss = model(torch.randn(6, 4)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    model, optimizer = made(0)
    for step in range(3):
        train(model, optimizer, step)
    if saver == "dcp":
        save(store, dict(zip(("model", "optim"), get_state_dict(model, optimizer), strict=True)), 3)
    else:
        store.save({"model": model, "optim": optimizer}, step=3)
    wanted = [train(model, optimizer, step) for step in (3, 4)]
    model, optimizer = made(1)
    target = dict(zip(("model", "optim"), get_state_dict(model, optimizer), strict=True))
    load(store, target)
    set_state_dict(model, optimizer, model_state_dict=target["model"], optim_state_dict=target["optim"])
    assert [train(model, optimizer, step) for step in (3, 4)] == wanted


def test_an_optimizer_of_two_modules_keeps_all_of_its_state(store: cs.Store) -> None:
    """Whose parameters are called alike: each is named in full then."""
    modules = {name: nn.Linear(2, 2) for name in "ab"}
    optimizer = torch.optim.SGD([p for m in modules.values() for p in m.parameters()], lr=0.1, momentum=0.9)
    for module in modules.values():
        module(torch.ones(2)).sum().backward()
    optimizer.step()
    store.save({**modules, "optim": optimizer}, step=1)
    names = [f"{module}/{name}" for module in "ab" for name in ("weight", "bias")]
    target = {"optim": {"state": {name: {"momentum_buffer": torch.zeros(2)} for name in names}}}
    for name in names[::2]:
        target["optim"]["state"][name]["momentum_buffer"] = torch.zeros(2, 2)
    load(store, target)
    for name, parameter in zip(names, optimizer.param_groups[0]["params"], strict=True):
        loaded = target["optim"]["state"][name]["momentum_buffer"]
        assert torch.equal(loaded, optimizer.state[parameter]["momentum_buffer"])


class Counter:
    """What DCP calls ``Stateful``."""

    def __init__(self, count: int) -> None:
        self.count = count

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "seen": torch.full((2,), float(self.count))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert torch.equal(state["seen"], torch.full((2,), float(state["count"])))
        self.count = state["count"]


def test_objects_with_a_state(store: cs.Store) -> None:
    """They give and take their state, modules among them."""
    module = nn.Linear(3, 2)
    save(store, {"counter": Counter(5), "module": module})
    counter, other = Counter(0), nn.Linear(3, 2)
    load(store, {"counter": counter, "module": other})
    assert counter.count == 5
    assert same(dict(other.state_dict()), dict(module.state_dict()))


@pytest.mark.skipif(importlib.util.find_spec("torchdata") is None, reason="torchdata is not installed")
# What torchdata asks torch for.
@pytest.mark.filterwarnings("ignore:.*set_vital")
def test_a_stateful_loader(store: cs.Store) -> None:
    """``StatefulDataLoader`` goes on at the next batch."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    def loader() -> Any:
        return StatefulDataLoader(list(range(10)), batch_size=2)

    first = loader()
    batches = iter(first)
    for _ in range(2):
        next(batches)
    save(store, {"data": first})
    second = loader()
    load(store, {"data": second})
    assert [batch.tolist() for batch in second] == [[4, 5], [6, 7], [8, 9]]


def test_a_loader_of_the_same_manner(store: cs.Store) -> None:
    """A state of counters, bytes, None and nested dicts, as such a loader has it, goes through whole."""
    loader_state = {
        "_snapshot": {"_snapshot_step": 2, "_last_yielded_worker_id": 0, "_worker_snapshots": {"worker_0": None}},
        "_steps_since_snapshot": 0,
        "_iterator_finished": False,
        "_sampler_iter_state": {"samples_yielded": 4, "rng": torch.arange(16, dtype=torch.uint8)},
        "_dataset_state": b"\x00\x01" * 2000,
    }

    class Loader:
        def __init__(self, state: dict[str, Any]) -> None:
            self.state = state

        def state_dict(self) -> dict[str, Any]:
            return self.state

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.state = state

    save(store, {"data": Loader(loader_state)})
    again = Loader(
        {**loader_state, "_dataset_state": b"", "_steps_since_snapshot": 9, "_snapshot": {"_snapshot_step": None,
         "_last_yielded_worker_id": None, "_worker_snapshots": {"worker_0": 1}}}
    )  # fmt: skip
    load(store, {"data": again})
    assert same(again.state, loader_state)


def test_keys_that_are_numbers(store: cs.Store) -> None:
    """Where a dict has numbers for keys, of which DCP makes text, our planner finds the entries all the same."""
    saved = {"state": {0: {"step": 3, "m": torch.ones(2)}, 1: {"step": 4, "m": torch.ones(3)}}}
    save(store, saved)
    target = {"state": {0: {"step": 0, "m": torch.zeros(2)}, 1: {"step": 0, "m": torch.zeros(3)}}}
    assert same(load(store, target, planner=CkptStoreLoadPlanner()), saved)


def test_names_that_look_alike(store: cs.Store) -> None:
    """Keys with slashes, tildes, dots, dollars and other signs never get into each other's way."""
    odd = {
        "a/b": torch.tensor(1.0),
        "a": {"b": {"": torch.tensor(2.0)}, "~1": torch.tensor(3.0), "/": torch.tensor(4.0)},
        "a~1b": torch.tensor(5.0),
        "$": {"$": torch.tensor(6.0), "x": 1},
        "__metadata__": torch.tensor(7.0),
        "m": {"__metadata__": torch.tensor(8.0), "__metadata__~2": torch.tensor(9.0)},
        "ключ": {"名": torch.tensor(10.0)},
        "lone\ud800": torch.tensor(11.0),
    }
    save(store, odd)
    assert same(store.load(), odd)

    def zeroed(value: Any) -> Any:
        return {key: zeroed(item) for key, item in value.items()} if isinstance(value, dict) else torch.zeros_like(
            value) if isinstance(value, torch.Tensor) else None  # fmt: skip

    assert same(load(store, zeroed(odd)), odd)
    long = "x" * 5000
    assert "5000 characters" in str(cause_of(lambda: save(store, {long: torch.ones(1)})))


def test_empty_states(store: cs.Store) -> None:
    """Nothing at all, and no tensors, are states, too."""
    save(store, {}, 1)
    assert store.load() == {}
    assert load(store, {}) == {}
    save(store, {"n": 1}, 2)
    assert load(store, {"n": 0}) == {"n": 1}


def test_empty_dicts_in_lists(store: cs.Store) -> None:
    """DCP saves nothing of an empty dict; where one stands in a list its place is kept."""
    save(store, {"a": [{}, torch.ones(2), [{}, {"x": 1}]], "b": {}})
    assert same(store.load(), {"a": [{}, torch.ones(2), [{}, {"x": 1}]]})
    target = {"a": [{}, torch.zeros(2), [{}, {"x": 0}]], "b": {}}
    # Looking for ShardedTensors, DCP makes None of these dicts, and asks for that.
    planner = dcp.DefaultLoadPlanner(flatten_sharded_tensors=False)
    assert same(load(store, target, planner=planner), {"a": [{}, torch.ones(2), [{}, {"x": 1}]], "b": {}})


def test_async(store: cs.Store) -> None:
    """What is saved behind is what the state was at the call."""
    live = {"w": torch.ones(1000), "n": 1}
    writer = CkptStoreWriter(store, step=1)
    future = dcp.async_save(live, storage_writer=writer, no_dist=True)
    live["w"].zero_()
    getattr(future, "upload_completion", future).result()
    assert torch.equal(load(store, {"w": torch.zeros(1000)})["w"], torch.ones(1000))
    with pytest.raises(cs.StateError, match="THREAD"):
        pickle.dumps(writer)


def test_many_saves_retention_and_backup(store_path: Path, tmp_path: Path) -> None:
    """Retention and backups go on as after ``Store.save``, and compression is the store's."""
    backup = tmp_path / "backup"
    with cs.open(store_path, keep=cs.last(2), backup=backup, durable="backup", compression="zstd") as store:
        for step in range(4):
            save(store, {"w": torch.full((1000,), float(step))}, step)
    with cs.open(store_path, read_only=True) as own, cs.open(backup, read_only=True) as copied:
        assert [saved.step for saved in own.checkpoints()] == [2, 3]
        assert [saved.step for saved in copied.checkpoints()] == [0, 1, 2, 3]
        assert own.resolve().stored_bytes < own.resolve().raw_bytes
        target = {"w": torch.zeros(1000)}
        assert torch.equal(load(copied, target, "step:1")["w"], torch.ones(1000))


# -- what is asked for, and what fits -------------------------------------------------------------------------


def test_selectors(store: cs.Store) -> None:
    """The reader's selector, or ``checkpoint_id`` of the call, is the store's."""
    for step, loss in ((1, 0.5), (2, 0.1), (3, 0.9)):
        save(store, {"n": step}, step, metrics={"loss": loss})
    assert load(store, {"n": 0})["n"] == 3
    assert load(store, {"n": 0}, "best:loss")["n"] == 2
    reader, target = CkptStoreReader(store), {"n": 0}
    dcp.load(target, storage_reader=reader, checkpoint_id="step:1")
    assert target["n"] == 1
    assert reader.checkpoint is not None
    assert reader.checkpoint.step == 1
    with pytest.raises(cs.StateError, match="checkpoint_id"):
        dcp.save({"n": 1}, storage_writer=CkptStoreWriter(store, step=4), checkpoint_id="mine")


def test_parts_of_a_state(store: cs.Store) -> None:
    """What the target lacks is not loaded; what the checkpoint lacks is an error, or is left as it was."""
    save(store, {"model": {"a": torch.ones(2), "b": torch.ones(3)}, "n": 1})
    assert same(load(store, {"model": {"a": torch.zeros(2)}}), {"model": {"a": torch.ones(2)}})
    more = {"model": {"a": torch.zeros(2), "c": torch.zeros(4)}, "n": 0}
    error = cause_of(lambda: load(store, more))
    assert "model.c" in str(error)
    for planner in (dcp.DefaultLoadPlanner, CkptStoreLoadPlanner):
        found = load(
            store, {"model": {"a": torch.zeros(2), "c": torch.zeros(4)}}, planner=planner(allow_partial_load=True)
        )
        assert same(found, {"model": {"a": torch.ones(2), "c": torch.zeros(4)}})


def test_another_shape(store: cs.Store) -> None:
    """A tensor of another size is refused by name."""
    save(store, {"w": torch.ones(2, 3)})
    assert "w" in str(cause_of(lambda: load(store, {"w": torch.zeros(3, 2)})))


def test_another_type_and_order_in_memory(store: cs.Store) -> None:
    """As with DCP, a tensor is converted to the target's type, and may be a view."""
    save(store, {"w": torch.arange(12.0).reshape(3, 4)})
    half, turned = torch.zeros(3, 4, dtype=torch.float16), torch.zeros(4, 3).T
    assert torch.equal(load(store, {"w": half})["w"], torch.arange(12.0).reshape(3, 4).half())
    assert torch.equal(load(store, {"w": turned})["w"], torch.arange(12.0).reshape(3, 4))


def test_a_state_that_nobody_has(store: cs.Store) -> None:
    """The whole state is made from nothing, as DCP's converters do it."""
    save(store, {"model": {"a": torch.ones(2), "l": [{"x": torch.ones(1)}, 5]}, "n": 1})
    made: dict[str, Any] = {}
    _load_state_dict(made, storage_reader=CkptStoreReader(store), planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    assert same(made, {"model": {"a": torch.ones(2), "l": [{"x": torch.ones(1)}, 5]}, "n": 1})


def test_what_the_store_has_saved(store: cs.Store) -> None:
    """DCP loads what ``Store.save`` has saved: nested state dicts, and modules, by the keys that DCP gives them."""
    module = nn.Linear(3, 2)
    nested = state()
    store.save({**nested, "module": module, "rng": cs.RNG()}, step=1)
    target = {**state(0.0), "module": nn.Linear(3, 2).state_dict()}
    load(store, target)
    assert same(dict(target.pop("module")), dict(module.state_dict()))
    assert same(target, state())
    store.save([1, 2], step=2)
    error = cause_of(lambda: load(store, {"n": 0}))
    assert isinstance(error, cs.StateError)
    assert "no dict" in str(error)
    store.save({"a.b": 1, "a": {"b": 2}}, step=3)
    assert "two entries" in str(cause_of(lambda: load(store, {"a.b": 0})))


def test_nothing_there(store: cs.Store) -> None:
    """The store's own errors are the causes of DCP's."""
    assert isinstance(cause_of(lambda: load(store, {"n": 0})), cs.NotFoundError)
    save(store, {"n": 1})
    assert isinstance(cause_of(lambda: load(store, {"n": 0}, "step:9")), cs.NotFoundError)
    reader = CkptStoreReader(store, "step:9")
    with pytest.raises(cs.NotFoundError):
        _ = reader.read_metadata().state_dict_metadata


def test_damage_is_found(store: cs.Store, store_path: Path) -> None:
    """No flipped byte reaches a tensor; a backup's bytes do."""
    saved = save(store, {"w": torch.ones(1000)})
    file = store_path / "checkpoints" / saved.id / "state.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    target = {"w": torch.zeros(1000)}
    error = cause_of(lambda: load(store, target))
    assert isinstance(error, cs.IntegrityError)
    assert error.block == 0
    assert torch.equal(target["w"], torch.zeros(1000))


# -- no pickle ------------------------------------------------------------------------------------------------


class Foreign:
    """What only its own code can bring back."""


class Bytes(SavePlanner):
    """A planner that is no relation of DCP's default one, and makes bytes of objects itself."""

    def __init__(self, make: Callable[[Any], Any]) -> None:
        self.make = make

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        self.inner = dcp.DefaultSavePlanner()
        self.inner.set_up_planner(state_dict, storage_meta, is_coordinator)

    def create_local_plan(self) -> SavePlan:
        return self.inner.create_local_plan()

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return self.inner.create_global_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return self.inner.finish_plan(new_plan)

    def resolve_data(self, write_item: WriteItem) -> Any:
        value = self.inner.lookup_object(write_item.index)
        return self.make(value) if write_item.type is WriteItemType.BYTE_IO else value


def pickled(value: Any) -> io.BytesIO:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream


def test_bytes_of_other_planners(store: cs.Store) -> None:
    """Bytes that nobody could load without running them are refused by name, and nothing is saved."""
    for make in (pickled, lambda value: io.BytesIO(b""), lambda value: value):
        error = cause_of(lambda: save(store, {"w": torch.ones(2), "n": 1}, planner=Bytes(make)))  # noqa: B023
        assert isinstance(error, cs.StateError)
        assert "'n'" in str(error)
        assert "Bytes" in str(error)
    assert store.checkpoints() == []
    # Those of our planner are JSON.
    ours = CkptStoreSavePlanner()

    def made(value: Any) -> Any:
        ours.set_up_planner({"n": value})
        return ours.resolve_data(ours.create_local_plan().items[0])

    save(store, {"w": torch.ones(2), "n": [1, (torch.ones(3), "x")]}, planner=Bytes(made))
    assert same(store.load()["n"][1][0], torch.ones(3))


def test_objects_of_a_class(store: cs.Store) -> None:
    """What needs pickle is refused by its path, and nothing is saved."""
    error = cause_of(lambda: save(store, {"w": torch.ones(2), "run": {"args": Foreign()}}))
    assert isinstance(error, cs.StateError)
    assert "run/args" in str(error)
    assert store.checkpoints() == []
    assert len(store.catalogue().condemned) == 1


class Extra(dcp.DefaultSavePlanner):
    """Has data of its own for the metadata."""

    def __init__(self, data: object) -> None:
        super().__init__()
        self.data = data

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, metadata = super().create_global_plan(all_plans)
        return plans, replace(metadata, planner_data=self.data)


def test_tuples_with_names(store: cs.Store) -> None:
    """A named tuple of a class that isn't registered is one only for our planner, as DCP's asks for the class."""
    Pair = namedtuple("Pair", "one other")
    save(store, {"pair": Pair(1, 2)})
    assert load(store, {"pair": None}, planner=CkptStoreLoadPlanner())["pair"].other == 2
    error = cause_of(lambda: load(store, {"pair": None}))
    assert isinstance(error, cs.StateError)
    assert "CkptStoreLoadPlanner" in str(error)


def test_data_of_planners(store: cs.Store) -> None:
    """What a planner wants to know again is kept, if JSON has words for it, and refused otherwise."""
    for step, data in enumerate(({"version": 3, "names": ["a", ("b", 1)]}, [1, 2], "text")):
        save(store, {"m": {"w": torch.ones(2)}, "n": 1}, step, planner=Extra(data))
        assert CkptStoreReader(store).read_metadata().planner_data == data
        assert same(load(store, {"m": {"w": torch.zeros(2)}, "n": 0}), {"m": {"w": torch.ones(2)}, "n": 1})
        assert same(store.load(), {"m.w": torch.ones(2), "n": 1})
    for bad in (Foreign(), {"x": Foreign()}, [torch.ones(2)]):
        error = cause_of(lambda: save(store, {"n": 1}, 9, planner=Extra(bad)))  # noqa: B023
        assert isinstance(error, cs.StateError)
    assert store.resolve().step == 2


def test_nothing_is_pickled_or_unpickled(store: cs.Store, store_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With our planners no pickle is made or read at all; nothing on storage is one."""
    used: list[str] = []

    def never(name: str) -> Any:
        return lambda *args, **kwargs: used.append(name)

    monkeypatch.setattr(torch, "save", never("save"))
    monkeypatch.setattr(torch, "load", never("load"))
    save(store, state(), planner=CkptStoreSavePlanner())
    load(store, state(0.0), planner=CkptStoreLoadPlanner())
    assert used == []
    torch.save(1)
    assert used == ["save"]
    for file in store_path.rglob("*.json"):
        json.loads(file.read_bytes())


def test_our_planners_with_dcps_files(tmp_path: Path) -> None:
    """With DCP's own writer and reader they make JSON of objects, and take nothing else."""
    writer = FileSystemWriter(tmp_path / "dcp")
    saved = {"w": torch.ones(2), "n": {"x": [1, (torch.arange(3), {2})], "b": b"\0" * 3000}}
    dcp.save(saved, storage_writer=writer, planner=CkptStoreSavePlanner())
    target: dict[str, Any] = {"w": torch.zeros(2), "n": {"x": None, "b": None}}
    dcp.load(target, storage_reader=FileSystemReader(tmp_path / "dcp"), planner=CkptStoreLoadPlanner())
    assert target["n"]["b"] == saved["n"]["b"]
    assert torch.equal(target["n"]["x"][1][0], torch.arange(3))
    dcp.save({"n": 1}, storage_writer=FileSystemWriter(tmp_path / "other"))
    reader = FileSystemReader(tmp_path / "other")
    error = cause_of(lambda: dcp.load({"n": 0}, storage_reader=reader, planner=CkptStoreLoadPlanner()))
    assert isinstance(error, cs.FormatError)
    assert "import_dcp" in str(error)


def test_streams_that_are_hostile() -> None:
    """A stream that is malformed in any way is refused with our error."""
    planner = CkptStoreSavePlanner()
    planner.set_up_planner({"n": [1, (torch.ones(3), "x")]})
    (item,) = [item for item in planner.create_local_plan().items if item.type is WriteItemType.BYTE_IO][:1]
    good = planner.resolve_data(item).getvalue()
    fields = json.loads(good)
    edits: list[Callable[[dict[str, Any]], object]] = [
        lambda f: f.pop("tree"),
        lambda f: f.pop("tensors"),
        lambda f: f.__setitem__("tensors", 5),
        lambda f: f["tensors"][0].pop(),
        lambda f: f["tensors"][0].__setitem__(4, "AAAA"),
        lambda f: f["tensors"][0].__setitem__(4, "*"),
        lambda f: f["tensors"][0].__setitem__(1, "X9"),
        lambda f: f["tensors"][0].__setitem__(2, [-1]),
        lambda f: f["tensors"][0].__setitem__(2, ["x"]),
        lambda f: f["tensors"][0].__setitem__(0, "other"),
        lambda f: f.__setitem__("tree", {"$": "object", "type": "os.system"}),
        lambda f: f.__setitem__("tree", {"$": "nonsense"}),
    ]
    loader = CkptStoreLoadPlanner()
    for edit in edits:
        bad = json.loads(good)
        edit(bad)
        with pytest.raises((cs.FormatError, cs.StateError)):
            loader.load_bytes(_read_item(), io.BytesIO(json.dumps(bad, separators=(",", ":")).encode()))
    for data in (b"", good[:-2], pickle.dumps(fields), b'{"ckptstore":1,"tree":NaN}'):
        with pytest.raises(cs.FormatError):
            loader.load_bytes(_read_item(), io.BytesIO(data))


def _read_item() -> Any:
    from torch.distributed.checkpoint.metadata import MetadataIndex
    from torch.distributed.checkpoint.planner import LoadItemType, ReadItem

    nothing = torch.Size()
    return ReadItem(LoadItemType.BYTE_IO, MetadataIndex("n"), nothing, MetadataIndex("n"), nothing, nothing)


class Half(dcp.DefaultSavePlanner):
    """Saves in half precision, and doesn't say so in the plan."""

    def resolve_data(self, write_item: WriteItem) -> Any:
        value = super().resolve_data(write_item)
        return value.half() if isinstance(value, torch.Tensor) else value


def test_planners_that_change_what_they_save(store: cs.Store) -> None:
    """What is stored is what the planner gave; of another shape than was planned it is refused."""
    saved = save(store, {"w": torch.arange(4.0), "n": 1}, planner=Half())
    assert store.load()["w"].dtype == torch.float16
    assert sum(row.nbytes for row in store.contents(saved).tensors.values()) == 8
    assert torch.equal(load(store, {"w": torch.zeros(4), "n": 0})["w"], torch.arange(4.0))

    class Shorter(dcp.DefaultSavePlanner):
        def resolve_data(self, write_item: WriteItem) -> Any:
            value = super().resolve_data(write_item)
            return value[1:] if isinstance(value, torch.Tensor) else value

    error = cause_of(lambda: save(store, {"w": torch.arange(4.0)}, planner=Shorter()))
    assert isinstance(error, cs.StateError)
    assert "[3] for 'w'" in str(error)


# -- failing --------------------------------------------------------------------------------------------------


def test_options_that_cannot_be(store: cs.Store) -> None:
    """They are told when the writer is made, or before anything is written."""
    with pytest.raises(cs.StateError, match="step"):
        CkptStoreWriter(store, step=-1)
    with pytest.raises(cs.FormatError, match="backup"):
        CkptStoreWriter(store, step=1, durable="backup")
    with pytest.raises(cs.StateError, match="use_collectives"):
        CkptStoreWriter(store, step=1).set_up_storage_writer(True, rank=0, use_collectives=False)
    assert store.checkpoints() == []


def test_a_save_that_was_broken_off(store: cs.Store) -> None:
    """Its id is condemned when it fails, or when the next save begins with the same writer."""
    writer = CkptStoreWriter(store, step=1)
    writer.set_up_storage_writer(True)
    plans = [SavePlan([]), SavePlan([])]
    broken = writer.prepare_global_plan(plans)[0].storage_data.id
    assert store.catalogue().condemned == frozenset()
    dcp.save({"n": 1}, storage_writer=writer)
    assert store.catalogue().condemned == frozenset([broken])
    assert [saved.step for saved in store.checkpoints()] == [1]


def test_a_writer_that_was_replaced(store_path: Path) -> None:
    """A run that was replaced by a newer one can't save any more."""
    with cs.open(store_path) as old, cs.open(store_path) as new:
        save(old, {"n": 1}, 1)
        save(new, {"n": 2}, 2)
        assert isinstance(cause_of(lambda: save(old, {"n": 3}, 3)), cs.StaleWriterError)
        assert new.resolve().step == 2


def test_a_full_disk_saves_nothing(store: cs.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A storage that fails in the midst of it: certainly not saved, and the one before is the latest."""
    save(store, {"w": torch.ones(10)}, 1)
    fired = []

    def fail(*args: Any, **kwargs: Any) -> Any:
        fired.append(1)
        raise cs.StorageFullError("no space left")

    monkeypatch.setattr(store.planned._tools.storage, "open_writer", fail)
    error = cause_of(lambda: save(store, {"w": torch.ones(10)}, 2))
    assert fired
    assert isinstance(error, cs.SaveFailedError)
    assert "no space" in str(error)
    assert store.resolve().step == 1


def test_what_fails_leaves_nothing_behind(store: cs.Store, store_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save that fails at its end removes what it has written."""
    first = save(store, {"w": torch.ones(10)}, 1)
    create, fired = store.planned._tools.storage.create, []

    def fail(key: str, data: bytes) -> None:
        if key.endswith("manifest.json"):
            fired.append(key)
            raise cs.StorageError("no more")
        create(key, data)

    monkeypatch.setattr(store.planned._tools.storage, "create", fail)
    error = cause_of(lambda: save(store, {"w": torch.ones(10)}, 2))
    assert isinstance(error, cs.SaveFailedError)
    assert len(fired) == 1
    assert [path.name for path in (store_path / "checkpoints").iterdir()] == [first.id]


def test_a_planner_that_drops_the_id(store: cs.Store) -> None:
    """Without the id that stands in the plan nothing can be written."""

    class Dropping(dcp.DefaultSavePlanner):
        def finish_plan(self, new_plan: SavePlan) -> SavePlan:
            return replace(super().finish_plan(new_plan), storage_data=None)

    error = cause_of(lambda: save(store, {"n": 1}, planner=Dropping()))
    assert isinstance(error, cs.StateError)
    assert "Dropping" in str(error)


def test_a_closed_store(store_path: Path) -> None:
    """It says so."""
    store = cs.open(store_path)
    store.close()
    assert isinstance(cause_of(lambda: save(store, {"n": 1})), cs.CheckpointError)
    assert not os.path.exists(store_path / "commits")


@pytest.mark.parametrize(
    "tree",
    [
        5,
        None,
        [1],
        {"$": "nonsense"},
        {"$": "stateful", "type": "torch.distributed.checkpoint"},
        {"$": "stateful", "type": "torch.distributed.checkpoint", "state": 5},
        {"$": "dict", "items": 5},
        {"$": "dict", "items": [[1]]},
        {"$": "module"},
        {"w": {"$": "tensor"}},
        {"w": {"$": "tensor", "name": "other"}},
        {"w": {"$": "tensor", "name": ["w"]}},
        {"a.b": 1, "a": {"b": 2}},
        {"n": {"$": "object", "type": "os.system"}},
        {"n": {"$": "optimizer"}},
        {"n": {"$": "optimizer", "groups": [], "state": [["w", 1]]}},
        {"n": {"$": "optimizer", "groups": [{"params": ["w"], "shapes": [[2]], "options": 5}], "state": [["w", 5]]}},
        {"n": {"$": "bytes", "tensor": "w"}, "w": {"$": "tensor", "name": "w"}},
    ],
    ids=str,
)
def test_trees_that_are_hostile(tree: Any, store: cs.Store, store_path: Path) -> None:
    """Whatever a tree says, nothing but our errors comes of it."""
    saved = save(store, {"w": torch.ones(2), "n": 1})
    forge = Forge(FolderRaw(store_path), saved.id)
    forge.part["tree"] = tree
    forge.write()
    with cs.open(store_path, read_only=True) as fresh:
        error = cause_of(lambda: load(fresh, {"n": 0, "w": torch.zeros(2)}, planner=CkptStoreLoadPlanner()))
    assert isinstance(error, cs.FormatError | cs.StateError | RuntimeError)
    # Of what DCP lacks it tells by itself.
    assert isinstance(error, cs.CheckpointError) or "Missing key" in str(error)
