"""Tensors and arrays of every kind come back bit by bit."""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ckptstore.errors import StateError
from ckptstore.state import capture, register_type, restore_into, restore_plain
from ckptstore.state.dtypes import CODE_BYTES, TORCH_STORED
from ckptstore.state.registry import forget_type
from tests.state.memory import bits, load, load_into, same, save


def raw(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """A tensor of the type with arbitrary bits (0 and 1 for bools)."""
    count = int(np.prod(shape)) * dtype.itemsize
    data = torch.from_numpy(
        np.random.default_rng(count).integers(0, 2 if dtype == torch.bool else 256, count, np.uint8)
    )
    return torch.empty(shape, dtype=dtype) if not count else data.view(dtype).reshape(shape)


pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support", "ignore:torch.quantize_per_tensor")
ALL = sorted(TORCH_STORED, key=str)


@pytest.mark.parametrize("dtype", ALL, ids=str)
def test_every_dtype_in_every_shape(dtype: torch.dtype) -> None:
    """0-dim, empty, transposed, sliced, expanded: plain and in place."""
    base = raw(dtype, 4, 6)
    state = {
        "scalar": raw(dtype, 1).reshape(()),
        "empty": torch.empty((0, 3), dtype=dtype),
        "plain": base,
        "transposed": base.t(),
        "sliced": base[1:, ::2],
        "expanded": base[:1].expand(5, 6),
    }
    saved = save(state)
    assert same(load(saved), state)
    target = {name: torch.empty(value.shape, dtype=dtype) for name, value in state.items()}
    pointers = {name: value.data_ptr() for name, value in target.items()}
    load_into(saved, target)
    assert same(target, state)
    assert pointers == {name: value.data_ptr() for name, value in target.items()}


def test_every_dtype_of_this_torch_is_known_or_quantised() -> None:
    """A type that a new torch brings shows up here."""
    known = {value for value in vars(torch).values() if type(value) is torch.dtype}
    assert {str(value) for value in known - TORCH_STORED.keys()} <= {
        "torch.qint8", "torch.qint32", "torch.quint8", "torch.quint4x2", "torch.quint2x4",
    }  # fmt: skip


@pytest.mark.parametrize("dtype", ALL, ids=str)
def test_not_contiguous_targets_are_filled(dtype: torch.dtype) -> None:
    """In place, through a copy, also of types that torch itself can't copy."""
    state = {"a": raw(dtype, 3, 4)}
    base = torch.empty((4, 3), dtype=dtype)
    target = {"a": base.t()}
    load_into(save(state), target)
    assert bits(base.t()) == bits(state["a"])


def test_stored_form_of_types_without_a_code() -> None:
    """Pairs for complex numbers, bytes for the others, and the name of what they are."""
    state = {"z": torch.zeros(3, 2, dtype=torch.complex128), "e": raw(torch.float8_e8m0fnu, 4), "n": np.array(["ab"])}
    specs = {spec.name: spec for spec in save(state).specs}
    assert (specs["z"].dtype, specs["z"].shape, specs["z"].logical) == ("F64", (3, 2, 2), "complex128")
    assert (specs["e"].dtype, specs["e"].shape, specs["e"].logical) == ("U8", (4,), "float8_e8m0fnu")
    assert (specs["n"].dtype, specs["n"].shape, specs["n"].logical) == ("U32", (1, 2), "numpy:<U2")
    for source in capture(state).sources:
        assert source.nbytes == int(np.prod(source.spec.shape)) * CODE_BYTES[source.spec.dtype]


def test_conjugate_and_negative_views_are_resolved() -> None:
    """They share memory with their base and have other values."""
    base = torch.tensor([1 + 2j, 3 - 4j])
    state = {"base": base, "conj": base.conj(), "neg": base.conj().imag}
    back = load(save(state))
    assert torch.equal(back["conj"], base.conj())
    assert torch.equal(back["neg"], torch.tensor([-2.0, 4.0]))
    target = {"base": torch.zeros(2, dtype=torch.cfloat), "conj": torch.zeros(2, dtype=torch.cfloat).conj(),
              "neg": torch.zeros(2)}  # fmt: skip
    load_into(save(state), target)
    assert torch.equal(target["conj"], base.conj())
    assert torch.equal(target["base"], base)


def test_leaves_keep_gradient_and_parameterness() -> None:
    """A result of a computation comes back as a plain tensor."""
    weight = torch.randn(3, requires_grad=True)
    state = {
        "w": weight,
        "p": nn.Parameter(torch.ones(2)),
        "frozen": nn.Parameter(torch.ones(2), False),
        "r": weight * 2,
    }
    back = load(save(state))
    assert back["w"].requires_grad
    assert back["w"].is_leaf
    assert type(back["w"]) is torch.Tensor
    assert type(back["p"]) is nn.Parameter
    assert back["p"].requires_grad
    assert type(back["frozen"]) is nn.Parameter
    assert not back["frozen"].requires_grad
    assert not back["r"].requires_grad
    assert torch.equal(back["r"], state["r"])


def test_shared_tensors_are_stored_once_and_shared_again() -> None:
    """Other overlaps are stored for themselves."""
    base = torch.arange(10.0)
    state = {"a": base, "b": [base, base[:]], "half": base[:5], "int": base.view(torch.int32), "empty": base[:0]}
    saved = save(state)
    assert sorted(saved.data) == ["a", "empty", "half", "int"]
    back = load(saved)
    assert back["a"] is back["b"][0] is back["b"][1]
    assert same(back, state)
    back["a"].fill_(7)
    assert not torch.equal(back["half"], back["a"][:5])


def test_shared_into_separate_targets_and_separate_into_shared() -> None:
    """Every target gets its value, whatever it shares."""
    base = torch.arange(4.0)
    target = {"a": torch.zeros(4), "b": torch.zeros(4)}
    load_into(save({"a": base, "b": base}), target)
    assert torch.equal(target["a"], base)
    assert torch.equal(target["b"], base)
    one = torch.zeros(4)
    load_into(save({"a": base, "b": base.clone()}), {"a": one, "b": one})
    assert torch.equal(one, base)


def test_names_stay_unique() -> None:
    """Where two paths read the same, and where a file's header has its own use for a name."""
    state = {"a": {"b": torch.ones(1)}, "a/b": torch.zeros(2), 1: torch.ones(3), "1": torch.ones(4),
             "__metadata__": torch.ones(5), "": torch.ones(6), "é": torch.ones(7), "\ud800": torch.ones(8)}  # fmt: skip
    saved = save(state)
    assert "__metadata__" not in saved.data
    assert "" not in saved.data
    assert len(saved.data) == len(state)
    assert all(name.encode() for name in saved.data)
    assert same(load(saved), state)
    assert save(torch.ones(2)).specs[0].name == "state"


NUMPY = [
    *(np.arange(6).reshape(2, 3).astype(code) for code in "f2 f4 f8 i1 i2 i4 i8 u1 u2 u4 u8 c16".split()),
    np.array([True, False]), np.arange(4, dtype=">f8"), np.arange(4, dtype=">i2"), np.array(2.5), np.zeros((0, 4)),
    np.arange(12).reshape(3, 4).T, np.arange(12)[::-2], np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    np.array([1 + 2j], "c8"), np.array([1 + 2j], ">c16"), np.array(["2024-01-01", "NaT"], "M8[D]"),
    np.array([5], ">M8[ns]"), np.array([1, 2], "m8[s]"), np.array([3], "m8"), np.array([3], "m8[25us]"),
    np.array(["ab", "é\ud800"]), np.array(["ab"], ">U3"), np.array([b"a\0b", b""]), np.array([], "U3"),
    np.array([0.1], "g"), np.array([0.1], ">g"), np.array([0.1j], "G"), np.array("text"),
]  # fmt: skip


@pytest.mark.parametrize("array", NUMPY, ids=lambda a: f"{a.dtype.str}-{a.shape}")
def test_arrays_of_every_type(array: np.ndarray) -> None:
    """Byte order included; plain, in place, and into a target that isn't contiguous."""
    saved = save({"a": array})
    assert same(load(saved), {"a": array})
    assert load(saved)["a"].flags.writeable
    target = {"a": np.zeros(array.shape, array.dtype)}
    held = target["a"]
    load_into(saved, target)
    assert target["a"] is held
    assert same(target, {"a": array})
    wide = np.zeros((*array.shape, 2), array.dtype)
    load_into(saved, {"a": wide[..., 0]})
    assert wide[..., 0].tobytes() == array.tobytes()


def test_contiguous_cpu_memory_is_read_and_written_without_a_copy() -> None:
    """What is written into the host bytes is in the target at once, bf16 included."""
    live = torch.zeros(8, dtype=torch.bfloat16, requires_grad=True)
    snapshot = capture({"w": live})
    with torch.no_grad():
        live.fill_(3)
    out = bytearray(4)
    snapshot.sources[0].read_into(2, memoryview(out))
    assert bytes(out) == bits(live)[2:6]
    restoration = restore_into(snapshot.tree, [snapshot.sources[0].spec], {"w": live})
    restoration.wanted["w"].host()[:] = bytes(16)
    assert not live.any()


def test_reading_past_the_end_is_refused() -> None:
    """Rather than filled up by repeating."""
    source = capture({"w": torch.zeros(2)}).sources[0]
    with pytest.raises(ValueError, match="outside of 8"):
        source.read_into(7, memoryview(bytearray(4)))


def test_other_dtype_in_the_target_is_cast_and_reported() -> None:
    """With one warning for all."""
    target = {
        "a": torch.zeros(2, dtype=torch.bfloat16),
        "b": torch.zeros(2, dtype=torch.int64),
        "n": np.zeros(2, "f4"),
        "c": torch.zeros(1),
    }
    saved = save(
        {"a": torch.tensor([1.5, 2]), "b": torch.tensor([1, 2], dtype=torch.int16), "n": np.ones(2), "c": torch.ones(1)}
    )
    with pytest.warns(UserWarning, match="saved with another element type") as caught:
        restoration = load_into(saved, target)
    assert len(caught) == 1
    assert restoration.report.cast == ["a", "b", "n"]
    assert target["a"].tolist() == [1.5, 2.0]
    assert target["a"].dtype == torch.bfloat16
    assert target["b"].tolist() == [1, 2]
    assert target["n"].tolist() == [1, 1]
    assert target["n"].dtype == np.float32


@pytest.mark.parametrize(
    ("saved", "target"),
    [
        (torch.tensor([300, -1]), torch.zeros(2, dtype=torch.uint8)),
        (torch.tensor([1, 2]), torch.zeros(2, dtype=torch.int32)),
        (torch.tensor([1.5, 2.0]), torch.zeros(2, dtype=torch.int64)),
        (torch.tensor([1, 2]), torch.zeros(2)),
        (torch.tensor([1, 2]), torch.zeros(2, dtype=torch.bool)),
        (torch.tensor([1 + 1j, 2]), torch.zeros(2)),
        (np.array([300, -1]), np.zeros(2, "u1")),
        (np.array([1.5, 2.5]), np.zeros(2, "i8")),
    ],
)
def test_a_conversion_that_could_change_values_is_a_mismatch(saved: Any, target: Any) -> None:
    """Only precision may be lost, and only where the target is a float too."""
    state = save({"x": saved})
    with pytest.raises(StateError, match="mismatched: x: saved"):
        load_into(state, {"x": target})
    assert not target.any()


def test_narrow_integers_go_into_wide_ones() -> None:
    """Where every value fits, integers are converted, and reported."""
    target = {"i": torch.zeros(2, dtype=torch.int64), "b": torch.zeros(2, dtype=torch.uint8)}
    saved = save({"i": torch.tensor([7, -9], dtype=torch.int8), "b": torch.tensor([True, False])})
    with pytest.warns(UserWarning, match="converted into the target's: b, i"):
        load_into(saved, target)
    assert target["i"].tolist() == [7, -9]
    assert target["b"].tolist() == [1, 0]


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: torch.zeros(4, 4), r"x: saved F32 \[3, 4\], target F32 \[4, 4\]"),
        (lambda: torch.zeros(3, 4, device="meta"), "to_empty"),
        (lambda: torch.zeros(1, 4).expand(3, 4), "share memory"),
        (lambda: torch.zeros(3, 4).to_sparse(), "isn't plain"),
        (lambda: torch.empty(3, 4, dtype=torch.bits8), "converted without loss"),
        (lambda: np.zeros((3, 4), "f4"), "saved tensor, target numpy.ndarray"),
        (lambda: nn.Linear(1, 1), "saved tensor, target torch.nn"),
    ],
)
def test_unfit_targets_are_mismatched(make: Any, why: str) -> None:
    """Strictly an error; otherwise reported and left alone."""
    saved = save({"x": torch.ones(3, 4), "ok": torch.ones(1)})
    with pytest.raises(StateError, match=why) as caught:
        load_into(saved, {"x": make(), "ok": torch.zeros(1)})
    assert caught.value.path == "x"
    target = {"x": make(), "ok": torch.zeros(1)}
    restoration = load_into(saved, target, strict=False)
    assert len(restoration.report.mismatched) == 1
    assert target["ok"] == 1


def test_read_only_and_wrong_arrays_are_mismatched() -> None:
    """NumPy would refuse later, or write anyway."""
    locked = np.zeros(2)
    locked.flags.writeable = False
    with pytest.raises(StateError, match="read-only"):
        load_into(save({"x": np.ones(2)}), {"x": locked})
    with pytest.raises(StateError, match="mismatched: x: saved complex128"):
        load_into(save({"x": np.ones(2) * 1j}), {"x": np.zeros(2)})


def nested_tensor() -> torch.Tensor:
    """A nested tensor, without its prototype warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])


class Wrapper(torch.Tensor):
    pass


@pytest.mark.parametrize(
    ("make", "way_out"),
    [
        (lambda: torch.zeros(2, device="meta"), "to_empty"),
        (lambda: torch.eye(2).to_sparse(), "to_dense"),
        (lambda: torch.empty(2, dtype=torch.quint8), "int_repr"),
        (nested_tensor, "unbind"),
        (lambda: torch.zeros(2).as_subclass(Wrapper), "plain tensors that it wraps"),
        (lambda: nn.parameter.UninitializedParameter(), "forward pass"),
        (lambda: _freed(), "gather"),
    ],
)
def test_tensors_without_plain_memory_are_refused(make: Any, way_out: str) -> None:
    """With the path and what to do."""
    with pytest.raises(StateError, match=way_out) as caught:
        save({"a": [make()]})
    assert caught.value.path == "a/0"


def _freed() -> torch.Tensor:
    value = torch.zeros(4)
    value.untyped_storage().resize_(0)
    return value


def test_many_threads_read_one_tensor_that_must_be_copied_first() -> None:
    """Each gets its part, and all write into the same memory."""
    value = torch.arange(80_000).reshape(200, 400).t()
    snapshot = capture({"x": value})
    source = snapshot.sources[0]
    destination = restore_plain(snapshot.tree, [source.spec]).wanted["x"]
    size = source.nbytes // 16

    def move(index: int) -> None:
        source.read_into(index * size, destination.host()[index * size : (index + 1) * size])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(move, range(16)))
    source.release()
    assert torch.equal(destination.tensor(), value)


def test_default_device_of_the_caller_is_no_matter() -> None:
    """Loaded tensors are on the CPU."""
    state = {"x": torch.ones(2), "n": np.array(["a"]), "g": torch.Generator()}
    saved = save(state)
    with torch.device("meta"):
        back = load(saved)
        load_into(saved, state)
    assert back["x"].device.type == "cpu"
    assert same(back["n"], state["n"])


def test_registered_tensor_subclass_is_an_object(request: pytest.FixtureRequest) -> None:
    """What is refused by itself can be made storable."""
    register_type(Wrapper, to_state=lambda v: v.as_subclass(torch.Tensor), from_state=lambda v: v.as_subclass(Wrapper))
    request.addfinalizer(lambda: forget_type(Wrapper))
    saved = save({"w": torch.ones(2).as_subclass(Wrapper)})
    target = {"w": torch.zeros(2).as_subclass(Wrapper)}
    load_into(saved, target)
    assert type(target["w"]) is type(load(saved)["w"]) is Wrapper
    assert target["w"].tolist() == [1, 1]


def test_many_small_tensors() -> None:
    """A hundred thousand, both ways."""
    base = torch.arange(100_000, dtype=torch.float32).reshape(-1, 1)
    state = {f"t{index}": row.clone() for index, row in enumerate(base)}
    snapshot = capture(state)
    assert len(snapshot.sources) == 100_000
    restoration = restore_into(snapshot.tree, [source.spec for source in snapshot.sources], state)
    assert len(restoration.wanted) == 100_000
    assert restoration.finish() is state
