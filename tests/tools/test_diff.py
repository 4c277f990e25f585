"""Two checkpoints beside each other: what is said of a difference is what torch says, and what is equal isn't read."""

from __future__ import annotations

import copy
import itertools
import math
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader

import ckptstore as cs
from ckptstore.engine.tensorreader import BlockCache
from ckptstore.format.tensorfile import BLOCK_BYTES
from ckptstore.tools.diff import Diff, ordered
from ckptstore.tools.difftensors import TensorChange
from tests.ranks import golden

_count = itertools.count()


def memory() -> str:
    """A place of its own."""
    return f"memory://diffs-{next(_count)}"


def compared(before: Any, after: Any, *, compression: str = "none", **options: Any) -> Diff:
    """The second one in a store of its own, encoded otherwise."""
    with cs.open(memory()) as one, cs.open(memory(), compression=compression) as two:
        one.save(before, step=1)
        two.save(after, step=2)
        return cs.diff(one, "latest", "latest", other=two, **options)


def tensors(before: dict[str, Any], after: dict[str, Any], **options: Any) -> dict[str, TensorChange]:
    found = compared({"m": before}, {"m": after}, **options)
    assert found.compared == len({*before, *after})
    return {change.name.removeprefix("m/"): change for change in found.tensors}


DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int64,
    torch.int16, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool, torch.complex64, torch.complex128,
]  # fmt: skip


@given(st.data())
def test_numbers_are_those_of_torch(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(DTYPES))
    values = st.lists(st.integers(0, 100), min_size=12, max_size=12)
    drawn = [torch.tensor(data.draw(values)) for _ in "ab"]
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=12, max_size=12)))
    before = (drawn[0] / 7 if dtype.is_floating_point or dtype.is_complex else drawn[0]).to(dtype)
    after = torch.where(mask, drawn[1].to(before.dtype) if dtype != torch.bool else drawn[1] > 50, before)
    found = tensors({"w": before.reshape(3, 4)}, {"w": after.reshape(3, 4)})
    wide = torch.complex128 if dtype.is_complex else torch.float64
    old, change = before.to(wide), after.to(wide) - before.to(wide)
    if not bool((change != 0).any()):
        assert not found
        return
    it = found["w"]
    assert (it.kind, it.elements, it.changed) == ("changed", 12, int(torch.count_nonzero(change)))
    assert it.norm == pytest.approx(float(torch.linalg.vector_norm(old)), rel=1e-12)
    assert it.norm_change == pytest.approx(float(torch.linalg.vector_norm(change)), rel=1e-12)
    assert it.largest == pytest.approx(float(change.abs().max()), rel=1e-12)
    assert it.nonfinite == (0, 0)
    assert it.share == it.changed / 12  # type: ignore[operator]


def test_structure_comes_first_then_what_changed_most() -> None:
    before = {"gone": torch.ones(2), "shape": torch.ones(2), "type": torch.ones(3), "text": np.array(["a"])}
    after = {"new": torch.ones(2), "shape": torch.ones(3), "type": torch.ones(3).half(), "text": np.array(["ab"])}
    weights = {name: torch.full((10,), 1.0) for name in ("little", "much", "same", "zero")}
    weights["zero"] = torch.zeros(10)
    moved = {"little": weights["little"] + 0.1, "much": weights["much"] * 3, "same": weights["same"]}
    moved["zero"] = weights["zero"] + 1
    found = compared(before | weights, after | moved).tensors
    assert [(it.name, it.kind) for it in found] == [
        ("gone", "removed"),
        ("new", "added"),
        ("shape", "reshaped"),
        ("text", "cast"),
        ("type", "cast"),
        ("zero", "changed"),
        ("much", "changed"),
        ("little", "changed"),
    ]
    by_name = {it.name: it for it in found}
    assert str(by_name["shape"].before) + str(by_name["shape"].after) == "F32[2]F32[3]"
    assert (by_name["gone"].after, by_name["new"].before, by_name["gone"].relative) == (None, None, None)
    # Rounded to the same numbers.
    assert (by_name["type"].relative, by_name["type"].changed) == (0.0, 0)
    assert by_name["zero"].relative == math.inf
    assert by_name["much"].relative == pytest.approx(2)
    assert [it.name for it in ordered(found, "name")] == sorted(by_name)
    assert [it.name for it in ordered(found, "largest")][-3:] == ["much", "zero", "little"]


def test_bits_differ_where_numbers_do_not_and_nan_is_counted() -> None:
    nan, inf = math.nan, math.inf
    before = {"sign": torch.zeros(5), "nan": torch.tensor([nan, nan, inf, 3.0, 4.0]), "kept": torch.tensor([nan])}
    after = {"sign": -torch.zeros(5), "nan": torch.tensor([nan, 1.0, inf, 3.0, 5.0]), "kept": torch.tensor([nan])}
    before["pairs"] = torch.tensor([complex(nan, 1), complex(3, 4)])
    after["pairs"] = torch.tensor([complex(nan, 1), complex(0, 0)])
    found = tensors(before, after)
    assert set(found) == {"sign", "nan", "pairs"}
    assert (found["sign"].changed, found["sign"].relative, found["sign"].largest) == (5, 0.0, 0.0)
    it = found["nan"]
    assert (it.changed, it.norm, it.norm_change, it.largest, it.nonfinite) == (2, 5.0, 1.0, 1.0, (3, 2))
    pairs = found["pairs"]
    assert (pairs.changed, pairs.norm, pairs.relative, pairs.largest, pairs.nonfinite) == (1, 5.0, 1.0, 5.0, (1, 1))


def test_types_without_arithmetic_are_compared_bit_by_bit() -> None:
    dates = np.array(["2020-01-01", "2021-01-01"], "M8[D]")
    later = dates + np.array([0, 1], "m8[D]")
    found = tensors({"d": dates, "t": np.array(["abc", "d"])}, {"d": later, "t": np.array(["abc", "e"])})
    assert {name: (it.changed, it.elements, it.norm) for name, it in found.items()} == {
        "d": (1, 2, None),
        "t": (1, 2, None),
    }


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_more_elements_than_in_a_block(compression: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums over all blocks, of pairs across the borders of blocks, and of another type; with one block in memory."""
    made: list[BlockCache] = []
    monkeypatch.setattr(
        sys.modules["ckptstore.tools.diff"], "BlockCache", lambda: made.append(BlockCache(BLOCK_BYTES)) or made[-1]
    )
    generator = torch.Generator().manual_seed(1)
    pairs = torch.randn(1_100_001, generator=generator, dtype=torch.complex128)
    before = {"a": torch.randn(3, dtype=torch.float64), "p": pairs, "w": torch.randn(4_500_001, generator=generator)}
    after = {**before, "p": pairs.clone(), "w": before["w"].double()}
    after["p"][::1000] += 1
    after["w"][-1] += 1
    found = tensors(before, after, compression=compression)
    assert len(made) == 1
    assert set(found) == {"p", "w"}
    assert (found["p"].changed, found["p"].norm_change) == (1101, pytest.approx(1101**0.5))
    assert found["p"].norm == pytest.approx(float(torch.linalg.vector_norm(pairs)), rel=1e-9)
    assert (found["w"].kind, found["w"].changed, found["w"].largest) == ("cast", 1, pytest.approx(1))


def test_equal_blocks_are_not_read() -> None:
    """But those of the first one in a tensor of which another block differs: they count for its norm."""
    large, same = torch.ones(3 * BLOCK_BYTES // 4), torch.ones(BLOCK_BYTES)
    with cs.open(memory()) as store:
        store.save({"model": {"w": large}, "other": {"s": same}}, step=1)
        large[-1] = 3
        store.save({"model": {"w": large}, "other": {"s": same}}, step=2)
        found = cs.diff(store, "step:1", "step:2")
        [change] = found.tensors
        assert (change.name, change.changed, change.norm_change) == ("model/w", 1, 2.0)
        assert change.norm == pytest.approx(len(large) ** 0.5)
        # Four blocks of the first, of which the last is short, and that one of the second.
        whole = store.contents(store.resolve("step:1")).files[0].entry.stored_bytes
        assert found.read_bytes == whole + (whole - 3 * BLOCK_BYTES)
        assert cs.diff(store, "step:2", "step:2").equal
        assert cs.diff(store, "latest", "latest").read_bytes == 0


def test_other_layouts_of_the_same_state_are_equal() -> None:
    """Of four ranks and of one, and encoded."""
    with (
        cs.open(golden.PLACE, read_only=True, ranks="one") as many,
        cs.open(memory(), compression="zstd") as one,
    ):
        model = many.load("latest")["model"]
        one.save({"model": model}, step=1)
        names = sorted(f"model/{name}" for name in model)
        equal = cs.diff(many, "latest", "latest", other=one, only=["model/*"])
        assert not equal.tensors
        assert equal.compared == len(names)
        assert equal.read_bytes > 0
        first = next(name for name, tensor in model.items() if tensor.is_floating_point())
        model[first].detach().reshape(-1)[-1] += 1
        one.save({"model": model}, step=2)
        [change] = cs.diff(many, "latest", "latest", other=one, only=["model/*"]).tensors
        assert (change.name, change.changed) == (f"model/{first}", 1)
        # The same checkpoint beside itself: its shards lie in the same blocks.
        assert cs.diff(many, "latest", "latest").read_bytes == 0


def test_values_and_hyper_parameters() -> None:
    model = nn.Linear(3, 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    before = {"model": model, "optimizer": optimizer, "v": {"a": 1, "b": [1, 2], "gone": "x", "nan": math.nan}}
    with cs.open(memory()) as store:
        store.save(before, step=1)
        optimizer.param_groups[0]["lr"] = 0.01
        store.save({**before, "v": {"a": 1.0, "b": [1, 3], "new": None, "nan": math.nan}}, step=2)
        found = cs.diff(store, "step:1", "step:2")
        part = cs.diff(store, "step:1", "step:2", only=["v"])
    assert [(it.path, it.kind, it.before, it.after) for it in found.values] == [
        ("v/gone", "removed", "x", None),
        ("v/new", "added", None, None),
        ("optimizer/groups/0/lr", "changed", 0.1, 0.01),
        ("v/a", "changed", 1, 1.0),
        ("v/b", "changed", [1, 2], [1, 3]),
    ]
    assert (part.values, part.compared) == ([it for it in found.values if it.path.startswith("v/")], 0)
    assert not found.equal


def test_optimizers_steps_are_said_once() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = torch.optim.Adam(net.parameters())

    def step(part: nn.Module) -> None:
        optimizer.zero_grad()
        part(torch.randn(4, 2)).sum().backward()
        optimizer.step()

    step(net)
    with cs.open(memory()) as store:
        store.save({"net": net, "opt": optimizer}, step=1)
        step(net)
        step(net[0])
        store.save({"net": net, "opt": optimizer}, step=2)
        found = cs.diff(store, "step:1", "step:2")
        older = copy.deepcopy(net)
        store.save({"net": older, "opt": torch.optim.Adam(older.parameters())}, step=3)
        fresh = cs.diff(store, "step:2", "step:3")
    assert sorted((it.path, it.before, it.after, it.parameters) for it in found.steps) == [
        ("opt", 1.0, 2.0, 2),
        ("opt", 1.0, 3.0, 2),
    ]
    assert not [it for it in found.tensors if it.name.endswith("/step")]
    # What is gone is no step.
    assert (fresh.steps, {it.kind for it in fresh.tensors}) == ([], {"removed"})
    assert len(fresh.tensors) == 12


def test_random_states_are_named() -> None:
    state = {"rng": cs.RNG(), "python": random.Random(1), "torch": torch.Generator(), "numpy": np.random.default_rng(1)}
    with cs.open(memory()) as store:
        store.save(state, step=1)
        torch.rand(1)
        store.save(state, step=2)
        random.random()
        np.random.rand()
        for name in ("python", "numpy"):
            state[name].random()  # type: ignore[attr-defined]
        torch.rand(1, generator=state["torch"])  # type: ignore[call-overload]
        store.save(state, step=3)
        first, second = cs.diff(store, "step:1", "step:2"), cs.diff(store, "step:2", "step:3")
    assert first.generators == ["rng/torch"]
    assert second.generators == ["rng/python", "rng/numpy", "python", "torch", "numpy"]
    for found in (first, second):
        assert (found.tensors, found.values) == ([], [])


def test_the_place_in_the_data_is_told_in_words() -> None:
    place, loader = memory(), DataLoader(list(range(10)), batch_size=2, shuffle=True)  # type: ignore[arg-type]
    net = nn.Linear(1, 1)
    with cs.Checkpointer(place, {"net": net}) as ckpt:
        ckpt.resume()
        for epoch in ckpt.epochs(2):
            for number, _ in enumerate(ckpt.batches(loader)):
                ckpt.step(loss=1.0)
                if (epoch, number) in ((0, 2), (1, 0)):
                    ckpt.save(wait=True)
    with cs.open(place, read_only=True) as store:
        found = cs.diff(store, "step:3", "step:6")
        again = cs.diff(store, "step:3", "step:3")
    assert found.position[0].startswith("step 3, epoch 0, batch 3 → step 6, epoch 1, batch 1")
    words = "data: 0 passes done, then 3 batches (6 samples) → 0 passes done, then 1 batch (2 samples)"
    assert found.position[1] == words
    assert {name.partition("/")[2] for name in found.generators} == {"rng/torch"}
    assert not [it for it in found.values if "data" in it.path or "progress" in it.path]
    assert again.equal


def test_damage_is_told(tmp_path: Path) -> None:
    with cs.open(tmp_path) as store:
        for step in range(2):
            saved = store.save({"model": {"w": torch.randn(1000)}}, step=step)
        path = tmp_path / "checkpoints" / saved.id / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        with pytest.raises(cs.IntegrityError, match=saved.id):
            cs.diff(store, "step:0", "step:1")


def test_wrong_use_is_told() -> None:
    with cs.open(memory()) as store:
        store.save({"model": {"w": torch.zeros(1)}}, step=1)
        with pytest.raises(cs.StateError, match="'optimizer' matches nothing"):
            cs.diff(store, "latest", "latest", only=["model", "optimizer"])
        with pytest.raises(cs.StateError, match="must be a list"):
            cs.diff(store, "latest", "latest", only="model")
        with pytest.raises(cs.NotFoundError, match="step:7"):
            cs.diff(store, "latest", "step:7")
