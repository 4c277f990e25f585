"""Modules: canonical names, their own memory, and the ways around them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ckptstore.errors import StateError
from tests.state.memory import load, load_into, same, save


def compiled(module: nn.Module) -> Any:
    """Wrapped, and never run."""
    return torch.compile(module, backend="eager")


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(5, 3)
        self.norm = nn.BatchNorm1d(3)
        self.module = nn.Linear(3, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.wte.weight
        self.register_buffer("scratch", torch.zeros(2), persistent=False)


class Extra(nn.Linear):
    note: Any = None

    def get_extra_state(self) -> Any:
        return {"note": self.note}

    def set_extra_state(self, state: Any) -> None:
        self.note = state["note"]


def pointers(module: nn.Module) -> dict[str, int]:
    return {name: value.data_ptr() for name, value in module.state_dict().items()}


def test_module_in_place_and_plain() -> None:
    """Into the same memory; plain, tied tensors are shared again."""
    source, target = Tied(), Tied()
    saved = save({"model": source})
    assert saved.parameters == sum(p.numel() for p in source.parameters())
    assert "model/head.weight" not in saved.data
    assert "model/scratch" not in saved.data
    before = pointers(target)
    load_into(saved, {"model": target})
    assert same(dict(target.state_dict()), dict(source.state_dict()))
    assert pointers(target) == before
    plain = load(saved)["model"]
    assert same(plain, {name: value.detach() for name, value in source.state_dict().items()})
    assert plain["head.weight"] is plain["wte.weight"]


def test_wrappers_leave_no_trace_in_names() -> None:
    """torch.compile and DataParallel, outside and inside; a submodule of the user's called "module" stays."""
    source = Tied()
    expected = {spec.name for spec in save({"model": source}).specs}
    wrapped = Tied()
    wrapped.norm = compiled(wrapped.norm)
    wrapped.module = nn.DataParallel(compiled(wrapped.module))
    outer = compiled(nn.DataParallel(wrapped))
    assert any("_orig_mod" in name for name in outer.state_dict())
    saved = save({"model": outer})
    assert {spec.name for spec in saved.specs} == expected
    assert "model/module.weight" in expected
    load_into(saved, {"model": source})
    assert torch.equal(source.norm.weight, wrapped.norm.weight)
    load_into(save({"model": source}), {"model": outer})
    assert torch.equal(source.module.weight, wrapped.module.module.weight)


def test_extra_state_goes_through_the_module() -> None:
    """Of a submodule, also when it is compiled."""
    source, target = nn.Sequential(Extra(2, 2)), nn.Sequential(compiled(Extra(2, 2)))
    source[0].note = [1, torch.ones(2)]
    saved = save({"m": source})
    load_into(saved, {"m": target})
    assert same(target[0].note, source[0].note)
    assert load(saved)["m"]["0._extra_state"]["note"][0] == 1


def test_differences_are_listed_together_and_nothing_is_touched() -> None:
    """Missing, unexpected and mismatched, all names."""
    saved = save({"m": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3)), "epoch": 1, "old": [torch.ones(1)]})
    target: dict[str, Any] = {"m": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 4, bias=False)), "epoch": 5, "new": 2}
    target["m"][1].register_buffer("extra", torch.zeros(1))
    before = {name: value.clone() for name, value in target["m"].state_dict().items()}
    with pytest.raises(StateError) as caught:
        load_into(saved, target)
    for part in ("missing: m/1.extra, new;", "unexpected: m/1.bias, old;", "m/1.weight: saved F32 [3, 2], target F32"):
        assert part in str(caught.value)
    assert target["epoch"] == 5
    assert same(before, dict(target["m"].state_dict()))
    restoration = load_into(saved, target, strict=False)
    assert restoration.report.missing == ["m/1.extra", "new"]
    assert sorted(restoration.wanted) == ["m/0.bias", "m/0.weight"]
    assert target["epoch"] == 1
    assert torch.equal(target["m"][1].weight, before["1.weight"])


def test_module_keeps_dtype_and_says_so() -> None:
    """A bf16 model takes fp32 weights with a warning."""
    target = nn.Linear(2, 2).bfloat16()
    source = nn.Linear(2, 2)
    with pytest.warns(UserWarning, match="m/bias, m/weight"):
        load_into(save({"m": source}), {"m": target})
    assert target.weight.dtype == torch.bfloat16
    assert torch.equal(target.weight, source.weight.bfloat16())


class Renaming(nn.Linear):
    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {"kernel": super().state_dict()["weight"], "shift": self.bias.detach(), "note": "mine"}

    def load_state_dict(self, state: Any, strict: bool = True, assign: bool = False) -> Any:
        assert state["note"] == "mine"
        return super().load_state_dict({"weight": state["kernel"], "bias": state["shift"]})


class Counting(nn.Linear):
    loads = 0

    def _load_from_state_dict(self, *args: Any) -> None:
        type(self).loads += 1
        super()._load_from_state_dict(*args)


def hooked() -> nn.Module:
    """A module whose keys a hook renames, both ways."""
    module = nn.Sequential(nn.Linear(2, 2))

    def rename(own: nn.Module, state: Any, prefix: str, metadata: Any) -> None:
        state["renamed"] = state.pop("0.weight")

    def restore(own: nn.Module, state: Any, *args: Any) -> None:
        state["0.weight"] = state.pop("renamed")

    module.register_state_dict_post_hook(rename)
    module.register_load_state_dict_pre_hook(restore)
    return module


@pytest.mark.parametrize("make", [lambda: Renaming(2, 2), hooked, lambda: nn.Sequential(Counting(2, 2))])
def test_modules_with_a_mind_of_their_own_use_their_methods(make: Any) -> None:
    """Overridden methods and hooks decide what is stored."""
    source, target = make(), make()
    saved = save({"m": source})
    assert '"stateful"' in saved.text
    load_into(saved, {"m": target})
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))
    assert isinstance(load(saved)["m"], dict)


def test_overridden_loading_is_called() -> None:
    """Not passed by."""
    Counting.loads = 0
    load_into(save({"m": Counting(2, 2)}), {"m": Counting(2, 2)})
    assert Counting.loads == 1


def test_direct_and_own_ways_understand_each_other() -> None:
    """A hook that came or went between saving and loading."""
    plain, counting = nn.Linear(2, 2), Counting(2, 2)
    load_into(save({"m": plain}), {"m": counting})
    assert torch.equal(plain.weight, counting.weight)
    other = nn.Linear(2, 2)
    load_into(save({"m": counting}), {"m": other})
    assert torch.equal(plain.weight, other.weight)


def test_refusal_of_the_module_is_a_state_error() -> None:
    """With the path and the module's own words."""
    with pytest.raises(StateError, match=r"(?s)refused what was saved.*Missing key") as caught:
        load_into(save({"m": Counting(2, 2, bias=False)}), {"m": Counting(2, 2)})
    assert caught.value.path == "m"


def test_lazy_module_asks_for_a_forward_pass() -> None:
    """Its parameters have no shape yet."""
    with pytest.raises(StateError, match="forward pass") as caught:
        save({"m": nn.Sequential(nn.LazyLinear(2))})
    assert caught.value.path == "m/0.weight"
    module = nn.LazyLinear(2)
    module(torch.ones(1, 3))
    target = nn.Linear(3, 2)
    load_into(save({"m": module}), {"m": target})
    assert torch.equal(target.weight, module.weight)


def test_parts_of_a_module() -> None:
    """Only what the patterns match is read, changed and judged."""
    source, target = Tied(), Tied()
    saved = save({"model": source, "step": 3, "other": {"step": 4}})
    part = load(saved, only=["model/norm.*", "*step"])
    assert list(part["model"]) == [
        "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked",
    ]  # fmt: skip
    assert part["step"] == 3
    assert part["other"] == {"step": 4}
    before = target.wte.weight.clone()
    restoration = load_into(saved, {"model": target, "unknown": 1}, only=["model/module.weight"])
    assert list(restoration.wanted) == ["model/module.weight"]
    assert torch.equal(target.module.weight, source.module.weight)
    assert torch.equal(target.wte.weight, before)


def test_pattern_without_a_match_is_named() -> None:
    """Rather than loading nothing."""
    saved = save({"model": nn.Linear(1, 1), "l": [1, (2, 3)]})
    with pytest.raises(StateError, match="only='modle/\\*' matches nothing"):
        load(saved, only=["model/*", "modle/*"])
    assert load(saved, only=["l/1/0", "l"]) == {"l": [1, (2, 3)]}
    assert load(saved, only=["l/1/0"]) == {"l": [(2,)]}
    with pytest.raises(StateError, match="whole"):
        load_into(save({"m": Counting(1, 1)}), {"m": Counting(1, 1)}, only=["m/weight"])
