"""Exports equal what was saved, bit for bit, for the readers that they are for; and are there whole, or not at all."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import warnings
import zipfile
import zlib
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

import ckptstore as cs
from ckptstore.engine.tensorreader import BlockCache
from ckptstore.format.tensorfile import BLOCK_BYTES
from ckptstore.integrations.dcp import CkptStoreSavePlanner, CkptStoreWriter
from ckptstore.state.dtypes import TORCH_STORED
from ckptstore.tools import export as exporting
from ckptstore.tools.exporting import copying, torchfile
from ckptstore.tools.exporting import dcp as dcp_folder
from ckptstore.tools.exporting.copying import Sum
from ckptstore.tools.exporting.dcp import chunks_of
from ckptstore.tools.exporting.zipsums import combined
from tests.faults import ext4
from tests.golden.make import HERE, tuned
from tests.integrity.stores import FolderRaw, Forge
from tests.ranks import golden
from tests.state.memory import same

KINDS = ("safetensors", "torch", "dcp")
SOURCE = Path(cs.__file__).parents[1]


def network() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(30, 400), torch.nn.BatchNorm1d(400), torch.nn.Linear(400, 1100))


def trained(steps: int) -> tuple[torch.nn.Sequential, torch.optim.Optimizer]:
    model = network()
    optimizer = torch.optim.AdamW([{"params": model[0].parameters(), "lr": 0.5}, {"params": model[1:].parameters()}])
    go_on(model, optimizer, steps)
    return model, optimizer


def go_on(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    generator = torch.Generator().manual_seed(5)
    for _ in range(steps):
        model(torch.randn(8, 30, generator=generator)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def plain() -> dict[str, Any]:
    """What plain torch can hold."""
    shared = torch.randn(7)
    return {
        "numbers": [1, 2.5, True, None, float("inf"), float("nan"), 1 << 80, 1 + 2j],
        "texts": ["a", "ä", "\udc80"],
        "nested": ({"a": (1, (2, torch.ones(3)))}, [[torch.zeros(2, 2)]]),
        "keys": {1: "a", (1, "b"): torch.ones(1), None: 3},
        "kinds": [{1, 2}, OrderedDict(a=1), Counter("aab"), torch.Size([1, 2]), torch.bfloat16, torch.device("cpu")],
        "bytes": [b"short", b"long" * 1000, bytearray(b"x" * 2000)],
        "twice": [shared, shared],
        "empty": torch.empty(0, 3),
    }


def simpler() -> dict[str, Any]:
    """What becomes something simpler."""
    return {
        "array": np.arange(5.0),
        "swapped": np.arange(5, dtype=">i4"),
        "scalar": np.float32(2.5),
        "text": np.str_("a"),
        "deque": deque([1, 2], 5),
        "frozen": frozenset([1]),
        "factory": defaultdict(list, a=[1]),
        "space": SimpleNamespace(a=1),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }


def refused() -> dict[str, Any]:
    """What is left out."""
    return {"times": np.array(["2020-01-01"], "M8[D]"), "range": range(3), "date": np.datetime64("2020-01-01")}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[cs.Store]:
    """A compressed checkpoint of all kinds of things."""
    model, optimizer = trained(2)
    with cs.open(tmp_path_factory.mktemp("export") / "store", compression="zstd") as store:
        state = {"model": model, "optimizer": optimizer, "plain": plain(), "simpler": simpler(), "refused": refused()}
        store.save(state | {"rng": cs.RNG()}, step=7, epoch=2)
        yield store


def load_torch(path: Path) -> Any:
    return torch.load(path, weights_only=True)


# -- torch -----------------------------------------------------------------------------------------------


def test_torch_loads_what_was_saved(store: cs.Store, tmp_path: Path) -> None:
    done: list[tuple[int, int]] = []
    report = cs.export(store, "latest", tmp_path / "x.pt", to="torch", progress=lambda *at: done.append(at))
    loaded, expected = load_torch(tmp_path / "x.pt"), store.load("latest")
    assert same(loaded["model"], expected["model"])
    assert same(loaded["plain"], expected["plain"])
    assert loaded["plain"]["twice"][0].data_ptr() == loaded["plain"]["twice"][1].data_ptr()
    assert same(loaded["simpler"]["array"], torch.arange(5.0, dtype=torch.float64))
    assert same(loaded["simpler"]["swapped"], torch.arange(5, dtype=torch.int32))
    assert same(loaded["simpler"]["parameter"], torch.ones(2, requires_grad=True))
    others = {"scalar": 2.5, "text": "a", "deque": [1, 2], "frozen": {1}, "factory": {"a": [1]}, "space": {"a": 1}}
    assert {name: loaded["simpler"][name] for name in others} == others
    assert {f"simpler/{name}" for name in simpler()} <= report.converted.keys()
    assert report.left_out.keys() == {f"refused/{name}" for name in refused()}
    assert loaded["refused"] == {}
    assert torch.equal(loaded["rng"]["torch"], expected["rng"]["torch"])
    assert done[-1][0] == done[-1][1] > 0
    assert (report.checkpoint.step, report.to, report.files) == (7, "torch", {"x.pt": report.written_bytes})
    assert report.written_bytes == (tmp_path / "x.pt").stat().st_size


def test_its_archive_is_sound(store: cs.Store, tmp_path: Path) -> None:
    """Other readers of zip files check the sums, and torch maps it into memory."""
    cs.export(store, "latest", tmp_path / "x.pt", to="torch")
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        assert archive.testzip() is None
        assert {name.partition("/")[0] for name in archive.namelist()} == {"x"}
    if shutil.which("unzip"):
        subprocess.run(["unzip", "-tq", tmp_path / "x.pt"], check=True, stdout=subprocess.DEVNULL)
    mapped = torch.load(tmp_path / "x.pt", weights_only=True, mmap=True)
    assert same(mapped["model"], store.load("latest")["model"])


def test_another_order_is_noticed(store: cs.Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a later torch may make it: before any bytes go to a wrong place."""
    records = torchfile._records
    swapped: list[Any] = []

    def swap(file: Path) -> list[torchfile.Record]:
        found = records(file)
        # Weight and bias of the normalisation.
        assert found[2].size == found[3].size == 1600
        found[2], found[3] = found[3], found[2]
        swapped.append(file)
        return found

    monkeypatch.setattr(torchfile, "_records", swap)
    with pytest.raises(cs.StorageError, match="another archive"):
        cs.export(store, "latest", tmp_path / "x.pt", to="torch", only=["model/*"])
    assert swapped
    assert not list(tmp_path.iterdir())


def test_an_optimizer_goes_on_as_if_nothing_had_been(store: cs.Store, tmp_path: Path) -> None:
    cs.export(store, "latest", tmp_path / "x.pt", to="torch", only=["model/*", "optimizer/*"])
    loaded = load_torch(tmp_path / "x.pt")
    model, optimizer = trained(0)
    model.load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])
    expected, reference = trained(2)
    assert same(optimizer.state_dict(), reference.state_dict())
    go_on(model, optimizer, 1)
    go_on(expected, reference, 1)
    assert same(dict(model.state_dict()), dict(expected.state_dict()))


def test_all_types_of_elements(tmp_path: Path) -> None:
    """As far as the files know them; the others are named."""
    with warnings.catch_warnings(action="ignore"):
        tensors = {
            str(dtype).removeprefix("torch."): torch.arange(48, dtype=torch.uint8).view(dtype) % 2
            if dtype == torch.bool
            else torch.arange(48, dtype=torch.uint8).view(dtype)
            for dtype in TORCH_STORED
        }
    tensors["bool"] = torch.tensor([True, False])
    with cs.open("memory://export-types") as store:
        store.save({"t": tensors}, step=1)
        torch_left = set(cs.export(store, "latest", tmp_path / "x.pt", to="torch").left_out)
        dcp_left = set(cs.export(store, "latest", tmp_path / "dcp", to="dcp").left_out)
        safe_left = set(cs.export(store, "latest", tmp_path / "x.safetensors", to="safetensors").left_out)
    whole = load_torch(tmp_path / "x.pt")["t"]
    safe = load_file(tmp_path / "x.safetensors")
    found = load_dcp(tmp_path / "dcp", tmp_path)["t"]
    for name, tensor in tensors.items():
        path = f"t/{name}"
        assert path in torch_left or same(whole[name], tensor)
        assert path in dcp_left or same(found[name], tensor)
        assert path in safe_left or same(safe[name], tensor)
    usual = {"t/float32", "t/bfloat16", "t/int64", "t/bool", "t/float8_e4m3fn", "t/complex64", "t/uint16"}
    assert not usual & (torch_left | dcp_left | safe_left)
    assert "t/complex128" in safe_left - torch_left - dcp_left


def test_sums_of_pieces() -> None:
    """In any order, as zlib sums up the whole."""
    data = np.random.default_rng(0).bytes(100_000)
    cuts = [0, 1, 7, 7, 4096, 70_001, 100_000]
    pieces = [Sum(a, b - a, zlib.crc32(data[a:b])) for a, b in pairwise(cuts)]
    assert combined(reversed(pieces)) == zlib.crc32(data)
    assert combined([]) == 0


# -- safetensors -----------------------------------------------------------------------------------------


def test_safetensors_hold_all_tensors(store: cs.Store, tmp_path: Path) -> None:
    """By their paths, as show names them."""
    report = cs.export(store, "step:7", tmp_path / "x.safetensors", to="safetensors")
    found, expected = load_file(tmp_path / "x.safetensors"), store.load("latest")
    for name, tensor in expected["model"].items():
        assert same(found[f"model/{name}"], tensor)
    for name, state in expected["optimizer"]["state"].items():
        assert same(found[f"optimizer/state/{name}/exp_avg"], state["exp_avg"])
    assert same(found["simpler/array"], torch.arange(5.0, dtype=torch.float64))
    assert len(found) == report.tensors
    assert report.component is None
    assert {"plain", "optimizer", "refused/times"} <= report.left_out.keys()
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        id = report.checkpoint.id
        assert file.metadata() == {"format": "pt", "checkpoint": id, "step": "7", "epoch": "2"}


def test_one_model_has_its_own_names(store: cs.Store, tmp_path: Path) -> None:
    report = cs.export(store, "latest", tmp_path / "x.safetensors", to="safetensors", only=["model/*"])
    assert report.component == "model"
    assert equal(load_file(tmp_path / "x.safetensors"), store.load("latest")["model"])
    assert report.read_bytes < store.resolve().stored_bytes / 2
    cs.export(store, "latest", tmp_path / "y.safetensors", to="safetensors", only=["model/2.*"])
    assert load_file(tmp_path / "y.safetensors").keys() == {"2.weight", "2.bias"}


# -- DCP -------------------------------------------------------------------------------------------------


def load_dcp(folder: Path, scratch: Path) -> Any:
    dcp_to_torch_save(folder, scratch / "dcp.pt")
    return load_torch(scratch / "dcp.pt")


def test_dcp_loads_into_live_objects(store: cs.Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written in many chunks; the optimizer goes on as if nothing had been."""
    monkeypatch.setattr(dcp_folder, "CHUNK_BYTES", 10_000)
    report = cs.export(store, "latest", tmp_path / "dcp", to="dcp")
    assert report.files.keys() == {".metadata", "__0_0.distcp"}
    reader = dcp.FileSystemReader(tmp_path / "dcp")
    metadata = reader.read_metadata().state_dict_metadata
    assert len(metadata["model.2.weight"].chunks) == 1 + 1100 // 6
    model, optimizer = trained(1)
    target = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
    with warnings.catch_warnings(action="ignore"):
        dcp.load(target, storage_reader=reader, no_dist=True)
    model.load_state_dict(target["model"])
    set_optimizer_state_dict(model, optimizer, target["optimizer"])
    expected, reference = trained(2)
    go_on(model, optimizer, 1)
    go_on(expected, reference, 1)
    assert same(dict(model.state_dict()), dict(expected.state_dict()))


def test_dcp_holds_what_torch_does(store: cs.Store, tmp_path: Path) -> None:
    """But for the classes of dicts and their keys, which DCP makes text of, and for what is empty."""
    report = cs.export(store, "latest", tmp_path / "dcp", to="dcp")
    assert {f"refused/{name}" for name in refused()} <= report.left_out.keys()
    loaded, expected = load_dcp(tmp_path / "dcp", tmp_path), store.load("latest")
    assert same(loaded["model"], expected["model"])
    for name in ("numbers", "texts", "bytes", "twice"):
        assert same(loaded["plain"][name], expected["plain"][name])
    assert same(loaded["plain"]["nested"][0], expected["plain"]["nested"][0])
    assert loaded["plain"]["keys"].keys() == {"1", "(1, 'b')", "None"}
    group = loaded["optimizer"]["param_groups"][0]
    assert (group["lr"], group["params"]) == (0.5, ["0.weight", "0.bias"])


def test_modules_of_one_optimizer_keep_apart_for_dcp(tmp_path: Path) -> None:
    """Their parameters have the same names in them."""
    a, b = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    optimizer = torch.optim.AdamW([*a.parameters(), *b.parameters()])
    (a(torch.ones(2)) * b(torch.ones(2))).sum().backward()
    optimizer.step()
    with cs.open("memory://export-gan") as store:
        store.save({"a": a, "b": b, "optimizer": optimizer}, step=1)
        cs.export(store, "latest", tmp_path / "dcp", to="dcp")
    state = load_dcp(tmp_path / "dcp", tmp_path)["optimizer"]["state"]
    for name, parameter in (("a/weight", a.weight), ("b/weight", b.weight)):
        assert same(state[name]["exp_avg"], optimizer.state[parameter]["exp_avg"])


def test_dcp_takes_nothing_but_dicts(tmp_path: Path) -> None:
    with cs.open("memory://export-list") as store:
        store.save([torch.ones(3)], step=1)
        with pytest.raises(cs.StateError, match="no dict"):
            cs.export(store, "latest", tmp_path / "x", to="dcp")
        store.save({"a": {"b": torch.ones(3)}, "a.b": torch.ones(2)}, step=2)
        with pytest.raises(cs.StateError, match="one name for two"):
            cs.export(store, "latest", tmp_path / "x", to="dcp")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shape", [(), (0, 3), (7,), (10, 3), (2, 3, 50), (1, 1, 1000), (3, 1, 2, 9)])
def test_chunks_make_up_a_tensor(shape: tuple[int, ...]) -> None:
    """Each within the limit, its elements in a row."""
    tensor = torch.arange(int(np.prod(shape))).reshape(shape)
    parts = []
    for chunk in chunks_of(shape, 8, 64):
        box = tensor[tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))]
        assert box.shape == chunk.sizes
        assert box.numel() * 8 <= 64
        parts.append(box.reshape(-1))
    assert torch.equal(torch.cat(parts), tensor.reshape(-1))


# -- what all kinds have in common -----------------------------------------------------------------------


def read(path: Path, to: str, scratch: Path) -> Any:
    """The model in an export that holds nothing else."""
    if to == "safetensors":
        return load_file(path)
    return (load_torch(path) if to == "torch" else load_dcp(path, scratch))["model"]


def equal(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(same(found[k], v.detach()) for k, v in expected.items())


@pytest.mark.parametrize("to", KINDS)
def test_shards_of_several_ranks_come_out_whole(tmp_path: Path, to: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block is read once, though the cache has fewer than there are ranks."""
    monkeypatch.setattr(exporting, "_cache", lambda checkpoint: BlockCache(BLOCK_BYTES))
    for module in (copying, dcp_folder):
        # Several threads may be at two blocks at a time.
        monkeypatch.setattr(module, "default_threads", lambda: 1)
    with cs.open(golden.PLACE, read_only=True, ranks="one") as store:
        report = cs.export(store, "latest", tmp_path / "x", to=to, only=["model/*"])
        assert report.checkpoint.world_size == golden.SIZE
        files = [file.entry for file in store.contents(store.resolve()).files if file.entry.prefix == "model/"]
        assert len(files) == golden.SIZE
        assert report.read_bytes == sum(file.stored_bytes for file in files)
        assert equal(read(tmp_path / "x", to, tmp_path), store.load("latest")["model"])


@pytest.mark.parametrize("to", KINDS)
def test_old_stores_are_exported(tmp_path: Path, to: Any) -> None:
    """With borrowed and compressed blocks."""
    with cs.open(HERE / "v1", read_only=True) as store:
        cs.export(store, "step:5", tmp_path / "x", to=to, only=["model/*"])
    assert equal(read(tmp_path / "x", to, tmp_path), dict(tuned().state_dict()))


@pytest.mark.parametrize("to", KINDS)
def test_casts_are_those_of_torch(store: cs.Store, tmp_path: Path, to: Any) -> None:
    """Of floating-point weights; counters stay, and whatever belongs to optimizers."""
    report = cs.export(store, "latest", tmp_path / "x", to=to, only=["model/*"], dtype="bf16")
    expected = {
        name: tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor
        for name, tensor in store.load("latest")["model"].items()
    }
    assert equal(read(tmp_path / "x", to, tmp_path), expected)
    assert (len(report.cast), {*report.cast.values()}) == (8, {"float32"})
    whole = cs.export(store, "latest", tmp_path / "y", to=to, dtype="fp64")
    assert not [name for name in whole.cast if name.startswith(("optimizer", "rng"))]


def test_a_cast_that_overflows_is_told(tmp_path: Path) -> None:
    weights = {"a": torch.tensor([1.0, 1e6]), "b": torch.tensor([1.0, float("inf")]), "c": torch.tensor([1.0])}
    for to in ("torch", "dcp", "safetensors"):
        with cs.open(f"memory://export-overflow-{to}") as store:
            store.save(weights, step=1)
            report = cs.export(store, "latest", tmp_path / to, to=to, dtype="fp16")  # type: ignore[arg-type]
        assert report.overflowed == {"a": "float16"}


def test_a_plain_optimizer_is_one_too(tmp_path: Path) -> None:
    """One that was saved by its state_dict isn't converted, and is no model."""
    model, optimizer = trained(1)
    with cs.open("memory://export-plain") as store:
        # Nor is a module that has no weights.
        store.save({"net": model.state_dict(), "opt": optimizer.state_dict(), "loss": torch.nn.MSELoss()}, step=1)
        report = cs.export(store, "latest", tmp_path / "x.pt", to="torch", dtype="bf16")
        cs.export(store, "latest", tmp_path / "hf", to="hf")
    assert same(load_torch(tmp_path / "x.pt")["opt"], optimizer.state_dict())
    assert all(name.startswith("net/") for name in report.cast)
    assert load_file(tmp_path / "hf" / "model.safetensors").keys() == model.state_dict().keys()


class ColumnPlanner(CkptStoreSavePlanner):
    """Saves each matrix as two shards, of some columns each, as tensor parallelism spreads it."""

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        items = [half for item in plan.items for half in self._halves(item)]
        return dataclasses.replace(plan, items=items)

    @staticmethod
    def _halves(item: WriteItem) -> list[WriteItem]:
        data = item.tensor_data
        if data is None or len(data.size) != 2:
            return [item]
        rows, columns = data.size
        boxes = [((0, 0), (rows, columns // 3)), ((0, columns // 3), (rows, columns - columns // 3))]
        halves = []
        for offset, sizes in boxes:
            chunk = ChunkStorageMetadata(torch.Size(offset), torch.Size(sizes))
            index = MetadataIndex(item.index.fqn, torch.Size(offset))
            halves.append(WriteItem(index, WriteItemType.SHARD, tensor_data=dataclasses.replace(data, chunk=chunk)))
        return halves

    def resolve_data(self, write_item: WriteItem) -> Any:
        data = write_item.tensor_data
        if write_item.type is not WriteItemType.SHARD or data is None:
            return super().resolve_data(write_item)
        box = zip(data.chunk.offsets, data.chunk.sizes, strict=True)
        return self.state_dict[write_item.index.fqn][tuple(slice(at, at + n) for at, n in box)]


@pytest.mark.parametrize("to", KINDS)
def test_shards_of_columns_come_out_whole(tmp_path: Path, to: Any) -> None:
    state = dict(network().state_dict())
    with cs.open(tmp_path / "store") as store:
        with warnings.catch_warnings(action="ignore"):
            dcp.save({"model": state}, storage_writer=CkptStoreWriter(store, step=1), planner=ColumnPlanner())
        (part,) = store.contents(store.resolve()).parts
        assert sum(len(file.tensors.shards or {}) for file in part.files) == 4
        cs.export(store, "latest", tmp_path / "x", to=to, dtype="fp64")
    wide = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    assert equal(read(tmp_path / "x", to, tmp_path), wide)


def test_a_backup_has_what_is_damaged(tmp_path: Path) -> None:
    with cs.open(tmp_path / "a", backup=tmp_path / "b") as store:
        store.save({"model": network()}, step=1, durable="backup")
    damage(tmp_path / "a")
    with (
        cs.open(tmp_path / "a", backup=tmp_path / "b", read_only=True) as store,
        pytest.warns(cs.DamageWarning, match="model"),
    ):
        cs.export(store, "latest", tmp_path / "x.pt", to="torch")
    assert equal(load_torch(tmp_path / "x.pt")["model"], network().state_dict())


@pytest.mark.full
@pytest.mark.parametrize("name", ["hf", "safetensors.safetensors", "torch.pt", "dcp"])
def test_what_was_exported_can_be_imported(store: cs.Store, tmp_path: Path, name: str) -> None:
    to: Any = name.partition(".")[0]
    cs.export(store, "latest", tmp_path / name, to=to, only=["model/*"])
    with cs.open(f"memory://export-import-{to}") as other:
        cs.import_from(tmp_path / name, other, step=7)
        assert equal(other.load("latest")["model"], store.load("latest")["model"])


# -- refusals --------------------------------------------------------------------------------------------


def test_arguments_that_cannot_be(store: cs.Store, tmp_path: Path) -> None:
    def refused(error: type[Exception], match: str, path: object = tmp_path / "x", **options: Any) -> None:
        options = {"to": "torch"} | options
        with pytest.raises(error, match=match):
            cs.export(store, options.pop("selector", "latest"), path, **options)  # type: ignore[arg-type]

    refused(cs.FormatError, "to='onnx' must be one of hf, safetensors, torch, dcp", to="onnx")
    refused(cs.FormatError, "dtype='int8' must be one of bf16", dtype="int8")
    refused(cs.FormatError, "no size", to="hf", max_shard_bytes="much")
    refused(cs.FormatError, "are for to='hf'", config=tmp_path)
    refused(cs.FormatError, "is a URL", path="s3://bucket/x")
    refused(cs.FormatError, "is no path", path="")
    refused(cs.NotFoundError, "make it first", path=tmp_path / "a" / "b")
    refused(cs.NotFoundError, "has no config.json", to="hf", config=tmp_path)
    refused(cs.NotFoundError, "no checkpoint 'step:99'", selector="step:99")
    refused(cs.StateError, "matches nothing", only=["nothing/*"])
    refused(cs.StateError, "must be a list of patterns", only="model/*")
    refused(cs.StateError, "holds no tensors", to="safetensors", only=["plain/numbers"])
    refused(cs.StateError, "has no model to export.*'plain'", to="hf", only=["plain/numbers"])
    assert not list(tmp_path.iterdir())


def test_a_state_that_is_left_out_is_refused(tmp_path: Path) -> None:
    with cs.open("memory://export-range") as store:
        store.save(range(3), step=1)
        with pytest.raises(cs.StateError, match="nothing to export: a range, which plain torch"):
            cs.export(store, "latest", tmp_path / "x", to="torch")
    assert not list(tmp_path.iterdir())


def test_several_models_are_listed(tmp_path: Path) -> None:
    with cs.open("memory://export-two") as store:
        store.save({"a": network(), "b": {"ema": network()}}, step=1)
        with pytest.raises(cs.StateError, match=r"has 2 models: 'a', 'b/ema'; name one by only=, as --only 'a/\*'"):
            cs.export(store, "latest", tmp_path / "x", to="hf")
        report = cs.export(store, "latest", tmp_path / "x", to="hf", only=["b/*"])
    assert (report.component, report.lacks_config) == ("b/ema", True)
    assert equal(load_file(tmp_path / "x" / "model.safetensors"), dict(network().state_dict()))


def test_a_weight_that_safetensors_lacks_is_refused(tmp_path: Path) -> None:
    with cs.open("memory://export-complex") as store:
        store.save({"model": {"w": torch.ones(2, dtype=torch.complex128)}}, step=1)
        with pytest.raises(cs.StateError, match="'w' of 'model' can't be exported: safetensors has no type for compl"):
            cs.export(store, "latest", tmp_path / "x", to="hf")
    assert not list(tmp_path.iterdir())


def damage(root: Path) -> None:
    """Change the last bit of the model's file."""
    (file,) = root.glob("checkpoints/*/model.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("to", ["hf", *KINDS])
def test_damage_leaves_nothing(tmp_path: Path, to: Any) -> None:
    with cs.open(tmp_path / "store") as store:
        store.save({"model": network()}, step=1)
        damage(tmp_path / "store")
        with pytest.raises(cs.IntegrityError, match="model/"):
            cs.export(store, "latest", tmp_path / "x", to=to)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


@pytest.mark.parametrize("to", ["torch", "dcp"])
def test_what_is_there_is_replaced_only_on_request(store: cs.Store, tmp_path: Path, to: Any) -> None:
    place, options = tmp_path / "x", {"to": to, "only": ["simpler/parameter"]}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    (tmp_path / "link").symlink_to("mine")
    cs.export(store, "latest", place, **options)
    before = sorted(place.iterdir()) if place.is_dir() else place.read_bytes()
    with pytest.raises(cs.ExistsError, match="exists already"):
        cs.export(store, "latest", place, **options)
    for other in ("mine", "link"):
        with pytest.raises(cs.ExistsError, match=r"is no f|is a folder"):
            cs.export(store, "latest", tmp_path / other, overwrite=True, **options)
    options["only"] = ["simpler/array"]
    cs.export(store, "latest", place, overwrite=True, **options)
    found = load_torch(place) if to == "torch" else load_dcp(place, tmp_path)
    assert found["simpler"].keys() == {"array"}
    assert before is not None
    assert {path.name for path in tmp_path.iterdir()} - {"dcp.pt"} == {"mine", "link", "x"}
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"


def test_who_comes_in_between_is_not_replaced(store: cs.Store, tmp_path: Path) -> None:
    for to, make in (("torch", Path.touch), ("dcp", lambda path: (path.mkdir(), (path / "theirs").touch()))):
        place = tmp_path / to

        def appear(done: int, total: int, place: Path = place, make: Callable[[Path], Any] = make) -> None:
            if done == total and not place.exists():
                make(place)

        with pytest.raises(cs.ExistsError, match="meanwhile"):
            cs.export(store, "latest", place, to=to, only=["model/*"], progress=appear)  # type: ignore[arg-type]
        assert place.is_file() or [path.name for path in place.iterdir()] == ["theirs"]
    assert {path.name for path in tmp_path.iterdir()} == {"torch", "dcp"}


def test_space_is_asked_for_beforehand(store: cs.Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def usage(path: object) -> SimpleNamespace:
        asked.append(path)
        return SimpleNamespace(free=2_000_000)

    monkeypatch.setattr("ckptstore.tools.exporting.place.shutil.disk_usage", usage)
    with pytest.raises(cs.StorageFullError, match=r"needs 1\.82 MB \(\d+ bytes\).*has 2\.00 MB left"):
        cs.export(store, "latest", tmp_path / "x", to="hf", only=["model/*"])
    assert asked == [tmp_path]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", ["torch", "dcp"])
def test_a_disk_that_fills_up(store: cs.Store, tmp_path: Path, to: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Because others write, too: what is there of the export is removed."""
    if (reason := ext4.missing(tmp_path)) is not None:
        pytest.skip(reason)
    asked: list[object] = []
    monkeypatch.setattr(exporting, "require_space", lambda *args: asked.append(args))
    with ext4.Image(tmp_path, 4).mounted() as root:
        with suppress(OSError), (root / "ballast").open("wb", buffering=0) as ballast:
            while True:
                ballast.write(bytes(1 << 12))
        os.truncate(root / "ballast", (root / "ballast").stat().st_size - (200 << 10))
        with pytest.raises(cs.StorageError, match="x"):
            cs.export(store, "latest", root / "x", to=to, only=["model/*"])
        assert asked
        assert {path.name for path in root.iterdir()} == {"ballast", "lost+found"}


HOSTILE: list[dict[str, Any]] = [
    {"$": "tensor", "name": "nothing"},
    {"$": "tensor"},
    {"$": "module", "entries": [1]},
    {"$": "module", "entries": {"w": {"$": "tensor", "name": ["w"]}}},
    {"$": "optimizer", "groups": [[]], "state": [[1]]},
    {"$": "optimizer", "groups": [{}], "state": [[["x"], {}]]},
    {"$": "dict", "items": [[{"$": "dict", "items": []}, 1]]},
    {"$": "tuple", "items": 5},
    {"$": "set", "items": [[]]},
    {"$": "namespace", "fields": 3},
    {"$": "of the future"},
    {"$": "ndarray", "name": "model/w", "dtype": "<c16"},
]


@pytest.mark.parametrize("to", ["hf", *KINDS])
def test_hostile_trees(tmp_path: Path, to: Any) -> None:
    """Are refused, or nothing is made of what is wrong in them; nothing else comes out."""
    with cs.open(tmp_path / "store") as store:
        saved = store.save({"model": {"w": torch.ones(3)}}, step=1)
        forge = Forge(FolderRaw(tmp_path / "store"), saved.id)
        for number, forge.part["tree"]["bad"] in enumerate(HOSTILE):
            forge.write()
            place = tmp_path / str(number)
            try:
                cs.export(cs.open(tmp_path / "store", read_only=True), "latest", place, to=to)
            except cs.FormatError:
                assert not place.exists()
                continue
            assert to in ("hf", "safetensors"), HOSTILE[number]
            found = load_file(place / "model.safetensors" if to == "hf" else place)
            assert [tensor.tolist() for name, tensor in found.items() if name.endswith("w")] == [[1, 1, 1]]


PROGRAM = """
import os, signal, sys
import ckptstore as cs

def stop(done, total):
    if done > total // 2:
        os.kill(os.getpid(), signal.SIGKILL)

with cs.open(sys.argv[1], read_only=True) as store:
    cs.export(store, "latest", sys.argv[2], to="torch", progress=stop)
"""


def test_what_is_killed_leaves_its_temporary_folder(store: cs.Store, tmp_path: Path) -> None:
    """And no export; the next one comes through."""
    arguments = [store.url.removeprefix("file://"), str(tmp_path / "x.pt")]
    environment = os.environ | {"PYTHONPATH": str(SOURCE)}
    command = [sys.executable, "-c", PROGRAM, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (left,) = tmp_path.iterdir()
    assert left.name.startswith("x.pt.tmp-")
    cs.export(store, "latest", tmp_path / "x.pt", to="torch", only=["simpler/array"])
    assert load_torch(tmp_path / "x.pt")["simpler"]["array"].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("to", ["hf", *KINDS])
def test_what_is_interrupted_leaves_nothing(store: cs.Store, tmp_path: Path, to: Any) -> None:
    sent: list[int] = []

    def press(done: int, total: int) -> None:
        if done > total // 2 and not sent:
            sent.append(done)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        cs.export(store, "latest", tmp_path / "x", to=to, only=["model/*"], progress=press)
    assert sent
    assert not list(tmp_path.iterdir())
