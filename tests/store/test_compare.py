"""``compare``: the names of all that is not bit for bit what a checkpoint holds."""

from __future__ import annotations

import copy
import random
import uuid
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import ckptstore as cs
from ckptstore.format.tensorfile import BLOCK_BYTES
from ckptstore.state import tensors
from ckptstore.state.dtypes import CARRIERS, TORCH_STORED
from tests.state.test_optimizers import OPTIMIZERS, model, train
from tests.state.test_tensors import raw
from tests.state.test_values import VALUES

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support")
CODECS = ["none", "zstd", "float-zstd"]
DTYPES = sorted(TORCH_STORED, key=str)


@pytest.fixture
def store() -> Iterator[cs.Store]:
    with cs.open(f"memory://{uuid.uuid4().hex}") as opened:
        yield opened


def flip(tensor: torch.Tensor, bit: int) -> None:
    """Change one bit of one element, in place."""
    size = tensor.element_size()
    data = tensor.detach().view(CARRIERS[size])
    index = np.unravel_index(bit // (8 * size) % tensor.numel(), tensor.shape)
    place = data[tuple(map(int, index))] if tensor.dim() else data
    image = place.reshape(1).clone().view(torch.uint8)
    image[bit // 8 % size] ^= 1 << bit % 8
    place.copy_(image.view(data.dtype).reshape(()))


# -- everything of a run -------------------------------------------------------------------------------


def run(name: str, seed: int, steps: int = 3) -> dict[str, Any]:
    net = model(seed)
    optimizer = OPTIMIZERS[name](net.parameters())
    state = {
        "model": net,
        "optimizer": optimizer,
        "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2),
        "generators": [torch.Generator(), np.random.default_rng(seed), random.Random(seed)],
        "rng": cs.RNG(),
        "trainer": {"progress": {"step": steps, "loss": -0.0}, "seen": [1, 2, 3], "words": np.array(["a", "b"])},
    }
    train(net, optimizer, range(steps))
    return state


@pytest.mark.parametrize(
    ("name", "codec"), [(name, "none") for name in OPTIMIZERS] + [("adam", codec) for codec in CODECS[1:]]
)
def test_a_restored_run_is_as_saved(store_path: Path, name: str, codec: str) -> None:
    """The saved state and the one that was loaded, for every optimizer; after one more step they are not."""
    with cs.open(store_path, compression=codec) as store:
        state = run(name, 1)
        store.save(state, step=3)
        assert store.compare("latest", state) == []
        target = run(name, 2, steps=1)
        assert "model/0.weight" in store.compare("latest", target)
        store.load(into=target)
        assert store.compare("step:3", target) == []
        train(target["model"], target["optimizer"], range(1))
        found = store.compare("latest", target)
        assert {"model/0.weight", "model/2.weight"} <= set(found)
        assert all(name.startswith(("model/", "optimizer/")) for name in found)


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "model/2.weight": lambda s: flip(s["model"][2].weight, 7),
    "optimizer/state/model/0.weight/exp_avg": lambda s: flip(s["optimizer"].state[s["model"][0].weight]["exp_avg"], 70),
    "optimizer/state/model/0.bias/step": lambda s: s["optimizer"].state[s["model"][0].bias]["step"].add_(1),
    "optimizer/groups/0/lr": lambda s: s["optimizer"].param_groups[0].update(lr=0.5),
    "scheduler/last_epoch": lambda s: setattr(s["scheduler"], "last_epoch", 9),
    "generators/0": lambda s: torch.rand(1, generator=s["generators"][0]),
    "generators/1": lambda s: s["generators"][1].random(),
    "generators/2": lambda s: s["generators"][2].random(),
    "rng": lambda s: (random.random(), np.random.rand(), torch.rand(1)),
    "trainer/progress/step": lambda s: s["trainer"]["progress"].update(step=4),
    "trainer/progress/loss": lambda s: s["trainer"]["progress"].update(loss=0.0),
    "trainer/seen/1": lambda s: s["trainer"]["seen"].__setitem__(slice(1, 3), [5, 6]),
    "trainer/seen/3": lambda s: s["trainer"]["seen"].extend([4, 5]),
    "trainer/words": lambda s: s["trainer"]["words"].__setitem__(1, "c"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_one_change_is_one_name(store: cs.Store, name: str) -> None:
    """Of any part of a run, and just that."""
    state = run("adam", 1)
    store.save(state, step=3)
    CHANGES[name](state)
    assert store.compare("latest", state) == [name]


@given(names=st.sets(st.sampled_from(list(CHANGES))))
def test_several_changes_are_named_in_the_checkpoints_order(names: set[str]) -> None:
    """Whatever they are; two in one list of numbers are one."""
    with cs.open("memory://compare-changes") as store:
        state = run("adam", 1)
        id = store.save(state, step=3).id
        for name in names:
            CHANGES[name](state)
        expected = [name for name in CHANGES if name in names]
        if "trainer/seen/1" in names and "trainer/seen/3" in names:
            expected.remove("trainer/seen/3")
        order = ["model", "optimizer", "scheduler", "generators", "rng", "trainer"]
        found = store.compare(id, state)
        assert sorted(found) == sorted(expected)
        parts = [order.index(name.partition("/")[0]) for name in found]
        assert parts == sorted(parts)


def test_comparing_leaves_state_and_random_numbers_alone(store: cs.Store) -> None:
    """What is asked for twice is answered twice alike, and the next random numbers are the same."""
    state = run("adam", 1)
    store.save(state, step=3)
    before = random.getstate(), torch.get_rng_state()
    for _ in range(2):
        assert store.compare("latest", state) == []
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


# -- tensors -------------------------------------------------------------------------------------------


def matrix(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {
        "scalar": raw(dtype, 1).reshape(()),
        "plain": raw(dtype, 4, 6),
        "transposed": raw(dtype, 4, 6).t(),
        "sliced": raw(dtype, 4, 6)[1:, ::2],
        "empty": torch.empty((0, 3), dtype=dtype),
    }


@cache
def saved_matrix(codec: str) -> tuple[cs.Store, dict[str, dict[str, torch.Tensor]]]:
    store = cs.open(f"memory://{uuid.uuid4().hex}", compression=codec)
    state = {str(dtype).removeprefix("torch."): matrix(dtype) for dtype in DTYPES}
    store.save(state, step=1)
    return store, state


@pytest.mark.parametrize("codec", CODECS)
@given(data=st.data())
def test_any_flipped_bit_is_found(codec: str, data: st.DataObject) -> None:
    """Of every type, contiguous or not: exactly that tensor is named, and none when it is flipped back."""
    store, state = saved_matrix(codec)
    dtype = data.draw(st.sampled_from(sorted(state)))
    name = data.draw(st.sampled_from(["scalar", "plain", "transposed", "sliced"]))
    tensor = state[dtype][name]
    bit = data.draw(st.integers(0, tensor.numel() * tensor.element_size() * 8 - 1))
    flip(tensor, bit)
    try:
        assert store.compare("latest", state) == [f"{dtype}/{name}"]
    finally:
        flip(tensor, bit)
    assert store.compare("latest", state, only=[f"{dtype}/*"]) == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_another_type_or_shape_differs(store: cs.Store, dtype: torch.dtype) -> None:
    """Also of the same bytes, and where nothing is in it."""
    store.save(matrix(dtype), step=1)
    other = torch.int8 if dtype != torch.int8 else torch.uint8
    state = matrix(dtype)
    assert store.compare("latest", state) == []
    for name, tensor in matrix(dtype).items():
        changed = {**state, name: torch.zeros(tensor.shape, dtype=other)}
        assert store.compare("latest", changed) == [name]
    assert store.compare("latest", {**state, "plain": state["plain"].reshape(6, 4)}) == ["plain"]
    assert store.compare("latest", {**state, "empty": state["empty"].reshape(3, 0)}) == ["empty"]


def test_bits_decide_and_not_values(store: cs.Store) -> None:
    """Zeros of either sign differ, NaNs of the same bits don't, and of others do; nothing is converted."""
    nan = torch.tensor([0x7FC00001], dtype=torch.int32).view(torch.float32)
    store.save({"zero": torch.zeros(2), "nan": nan, "half": torch.ones(2, dtype=torch.bfloat16), "x": 1.0}, step=1)
    state = {"zero": torch.zeros(2), "nan": nan.clone(), "half": torch.ones(2, dtype=torch.bfloat16), "x": 1.0}
    assert store.compare("latest", state) == []
    state = {"zero": -torch.zeros(2), "nan": torch.full((1,), torch.nan), "half": torch.ones(2), "x": 1}
    assert store.compare("latest", state) == ["zero", "nan", "half", "x"]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("codec", CODECS)
def test_tensors_of_several_blocks(store_path: Path, codec: str, threads: int) -> None:
    """The first and the last byte of each block count, whether the tensor is contiguous or not."""
    with cs.open(store_path, compression=codec, threads=threads) as store:
        wide = torch.zeros(BLOCK_BYTES + 5000, 2, dtype=torch.uint8)
        state = {"m": {"long": torch.zeros(2 * BLOCK_BYTES + 9, dtype=torch.uint8), "strided": wide[:, 1], "z": 1}}
        store.save(state, step=1)
        assert store.compare("latest", state) == []
        for name in ("long", "strided"):
            tensor = state["m"][name]
            assert isinstance(tensor, torch.Tensor)
            for index in (0, BLOCK_BYTES - 4096, BLOCK_BYTES - 4097, len(tensor) - 1):
                tensor[index] ^= 4
                assert store.compare("latest", state) == [f"m/{name}"]
                tensor[index] ^= 4


def test_host_copies_do_not_pile_up(store: cs.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors that aren't contiguous are copied one after the other, and each copy is dropped when it was compared."""
    made: list[Any] = []
    kept: list[int] = []
    image = tensors.tensor_image

    def counted(tensor: torch.Tensor) -> Any:
        kept.append(sum(one() is not None for one in made))
        copied = image(tensor)
        made.append(weakref.ref(copied))
        return copied

    state = {f"t{number}": torch.zeros(1 << 21, 2, dtype=torch.float32).t() for number in range(8)}
    store.save(state, step=1)
    monkeypatch.setattr(tensors, "tensor_image", counted)
    with cs.open(store.url, read_only=True, threads=1) as reader:
        assert reader.compare("latest", state) == []
    assert len(made) == len(state)
    assert max(kept) <= 1


def test_tied_tensors_have_each_of_their_names(store: cs.Store) -> None:
    """Tied or not, what differs is each name whose bytes do."""
    one = torch.ones(3)
    store.save({"a": one, "b": [one], "c": one.clone()}, step=1)
    assert store.compare("latest", {"a": one, "b": [one], "c": one}) == []
    assert store.compare("latest", {"a": one, "b": [one.clone()], "c": one}) == []
    assert store.compare("latest", {"a": one, "b": [torch.zeros(3)], "c": one}) == ["b/0"]
    other = torch.zeros(3)
    assert store.compare("latest", {"a": other, "b": [other], "c": one}) == ["a", "b/0"]
    assert store.compare("latest", {"a": one, "b": [one], "c": other}, only=["a", "b*"]) == []


def test_borrowed_files_are_compared(store: cs.Store) -> None:
    """The bytes come from whoever owns them."""
    frozen = nn.Linear(300, 300).requires_grad_(False)
    store.save({"base": frozen, "head": nn.Linear(2, 2)}, step=1)
    state = {"base": frozen, "head": nn.Linear(2, 2)}
    assert store.save(state, step=2).borrowed_bytes > 0
    assert store.compare("step:2", state) == []
    assert store.compare("step:1", state) == ["head/weight", "head/bias"]
    flip(frozen.weight, 12345)
    assert store.compare("step:2", state) == ["base/weight"]


def test_a_tensor_without_values_is_refused(store: cs.Store) -> None:
    """By its name, as in a save."""
    store.save({"w": torch.ones(3)}, step=1)
    with pytest.raises(cs.StateError, match="meta device") as caught:
        store.compare("latest", {"w": torch.ones(3, device="meta")})
    assert caught.value.path == "w"


# -- values --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_values_are_as_saved_until_they_change(store: cs.Store, value: Any) -> None:
    """Of every type."""
    store.save({"v": value, "w": value}, step=1)
    assert store.compare("latest", {"w": copy.deepcopy(value), "v": value}) == []
    assert store.compare("latest", {"v": "another", "w": value}) == ["v"]
    assert store.compare("latest", store.load()) == []
    target = {"v": copy.deepcopy(value), "w": None}
    store.load(into=target)
    assert store.compare("latest", target) == []


@given(saved=st.sampled_from(range(len(VALUES))), live=st.sampled_from(range(len(VALUES))))
def test_any_two_values_differ(saved: int, live: int) -> None:
    """No two of them are taken for each other."""
    with cs.open("memory://compare-values") as store:
        id = store.save({"v": [VALUES[saved], {}]}, step=1).id
        assert (store.compare(id, {"v": [VALUES[live], {}]}) == []) == (saved == live)


@pytest.mark.parametrize(
    ("saved", "live", "names"),
    [
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}, []),
        ({"a": 1, "b": 2}, {"a": 1, "c": 2}, ["b", "c"]),
        ({"a": {"b": 1}}, {"a": {"b": 1, "c": {"d": 2}}}, ["a/c"]),
        ({"a": [torch.ones(1)]}, {"a": [torch.ones(1), torch.ones(2), 3]}, ["a/1", "a/2"]),
        ({"a": [1, 2, 3]}, {"a": [0, 0, 0]}, ["a/0"]),
        ({"a": (1, 2, 3)}, {"a": (1, 0, 0)}, ["a/1"]),
        ({"a": deque([1, 2, 3], 3)}, {"a": deque([2, 3, 4], 3)}, ["a/0"]),
        ({"a": deque([1], 3)}, {"a": deque([1], 4)}, ["a"]),
        ({"a": [1, [2], {"x": 3}]}, {"a": [0, [0], {"x": 0}]}, ["a/0", "a/1/0", "a/2/x"]),
        ({"a": [1]}, {"a": (1,)}, ["a"]),
        ({"a": {1, 2}}, {"a": {2, 1}}, []),
        ({"a": {1, 2}}, {"a": {1}}, ["a"]),
        ({"a": {1: 2, "1": 3}}, {"a": {"1": 3, 1: 4}}, ["a/1"]),
        ({"a": SimpleNamespace(x=1, y=2)}, {"a": SimpleNamespace(y=3, x=1)}, ["a/y"]),
        ({"a": {"": 1}}, {"a": {"": 2}}, ["a/"]),
        ({"a": torch.ones(2)}, {"a": [1.0, 1.0]}, ["a"]),
        ({"a": np.ones(2)}, {"a": torch.ones(2, dtype=torch.float64)}, ["a"]),
        ({"a": np.ones(2)}, {"a": np.ones(2, ">f8")}, ["a"]),
        ({"a": b"x" * 2000}, {"a": b"x" * 1999 + b"y"}, ["a"]),
        ([1, 2], [1, 3], ["1"]),
        (1, 2, ["state"]),
        (torch.ones(2), torch.zeros(2), ["state"]),
    ],
)
def test_names_of_what_differs(store: cs.Store, saved: Any, live: Any, names: list[str]) -> None:
    """The first of simple values in a row, every entry of a dict, and what only one has as a whole."""
    store.save(saved, step=1)
    assert store.compare("latest", saved) == []
    assert store.compare("latest", live) == names


# -- optimizers ----------------------------------------------------------------------------------------


def test_an_optimizer_is_compared_as_it_is_loaded(store: cs.Store) -> None:
    """By the parameters' names in any order, and by their places where the names are others."""
    net = model(1)
    adam = torch.optim.Adam(net.parameters())
    train(net, adam, range(2))
    store.save({"model": net, "optimizer": adam}, step=2)
    other = model(2)
    turned = torch.optim.Adam(list(other.parameters())[::-1])
    store.load(into={"model": other, "optimizer": turned})
    assert store.compare("latest", {"model": other, "optimizer": turned}) == []
    assert store.compare("latest", {"optimizer": adam}, only=["optimizer/*"]) == []
    flip(turned.state[other[0].weight]["exp_avg_sq"], 3)
    expected = ["optimizer/state/model/0.weight/exp_avg_sq"]
    assert store.compare("latest", {"model": other, "optimizer": turned}) == expected


def test_other_optimizers_differ(store: cs.Store) -> None:
    """Another class as a whole; another number of parameters where they stand; one without state by each of it."""
    net = model(1)
    adam = torch.optim.Adam(net.parameters())
    train(net, adam, range(2))
    store.save({"model": net, "optimizer": adam}, step=2)
    assert store.compare("latest", {"model": net, "optimizer": torch.optim.SGD(net.parameters(), 1)}) == ["optimizer"]
    few = torch.optim.Adam(list(net.parameters())[:3])
    few.state.update({key: value for key, value in adam.state.items() if key is not net[2].bias})
    found = store.compare("latest", {"model": net, "optimizer": few})
    assert found == ["optimizer/groups/0/params", "optimizer/state/model/2.bias"]
    fresh = torch.optim.Adam(net.parameters())
    names = [f"optimizer/state/model/{name}" for name, _ in net.named_parameters()]
    assert store.compare("latest", {"model": net, "optimizer": fresh}) == names


# -- only, errors, damage ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("only", "names"),
    [
        (["model/*"], ["model/0.weight"]),
        (["model"], ["model/0.weight"]),
        (["*.weight"], ["model/0.weight"]),
        (["*bias"], []),
        (["trainer/seen/0"], []),
        (["trainer/seen/1"], ["trainer/seen/1"]),
        (["trainer/*"], ["trainer/seen/1", "trainer/extra"]),
        (["trainer/extra/deep"], ["trainer/extra"]),
        (["rng/torch"], ["rng"]),
        (["rng/python/*"], []),
        (["optimizer/*", "model/0*"], ["model/0.weight"]),
        (["*"], ["model/0.weight", "rng", "trainer/seen/1", "trainer/extra"]),
    ],
)
def test_only_what_is_asked_for_is_compared(store: cs.Store, only: list[str], names: list[str]) -> None:
    """Whichever side has it."""
    state = run("adam", 1)
    store.save(state, step=3)
    flip(state["model"][0].weight, 1)
    torch.rand(1)
    state["trainer"]["seen"][1] = 9
    state["trainer"]["extra"] = {"deep": 1}
    assert store.compare("latest", state, only=only) == names


@pytest.mark.parametrize("only", [["modle/*"], ["a", "b"], [], "a"])
def test_a_pattern_must_match_something(store: cs.Store, only: Any) -> None:
    """Or nothing would have been proven."""
    store.save({"a": 1}, step=1)
    with pytest.raises(cs.StateError, match="only="):
        store.compare("latest", {"a": 1, "c": 2}, only=only)


def test_what_is_not_there_is_no_difference(store: cs.Store) -> None:
    """An empty store, and a selector of nothing, are errors."""
    with pytest.raises(cs.NotFoundError):
        store.compare("latest", {})
    store.save({"a": 1}, step=1)
    with pytest.raises(cs.NotFoundError):
        store.compare("step:2", {"a": 1})
    with pytest.raises(cs.StateError, match="without pickle"):
        store.compare("latest", {"a": object()})


def damage(folder: Path, id: str, name: str) -> None:
    path = folder / "checkpoints" / id / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("codec", CODECS)
def test_damage_is_an_error_and_no_difference(store_path: Path, codec: str) -> None:
    """Where it has to be read, and also of the newest: no other checkpoint is taken instead."""
    with cs.open(store_path, compression=codec) as store:
        state = {"a": {"w": torch.zeros(5000)}, "b": {"w": torch.zeros(5000)}}
        store.save(state, step=1)
        saved = store.save(state, step=2)
        [name] = [path.name for path in (store_path / "checkpoints" / saved.id).glob("a.*")]
        damage(store_path, saved.id, name)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(cs.IntegrityError) as caught:
                store.compare("latest", state)
        assert (caught.value.id, caught.value.block) == (saved.id, 0)
        assert store.compare("latest", state, only=["b"]) == []
        # What differs in type needs no reading.
        assert store.compare("latest", {**state, "a": {"w": torch.zeros(1)}}) == ["a/w"]


def test_a_backup_helps_with_damage(store_path: Path, tmp_path: Path) -> None:
    """As in a load: the good bytes are compared, and what was damaged is repaired."""
    with cs.open(store_path, backup=tmp_path / "backup") as store:
        state = {"a": torch.zeros(5000)}
        saved = store.save(state, step=1)
    [name] = [path.name for path in (store_path / "checkpoints" / saved.id).glob("*.safetensors")]
    damage(store_path, saved.id, name)
    with cs.open(store_path, backup=tmp_path / "backup") as store:
        with pytest.warns(cs.DamageWarning, match="repaired"):
            assert store.compare("latest", state) == []
        assert store.verify().ok
