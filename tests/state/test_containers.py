"""Restoring into nested containers: the same objects, new contents."""

from __future__ import annotations

import dataclasses
from collections import Counter, OrderedDict, defaultdict, deque
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from ckptstore.errors import StateError
from ckptstore.state import restore_into
from tests.state.memory import load_into, same, save


@dataclasses.dataclass
class Progress:
    step: int
    best: dict[str, float]
    ema: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Frozen:
    name: str
    ema: Any = None


class Pair(NamedTuple):
    net: Any
    step: int


def test_contents_change_and_objects_stay() -> None:
    """Every kind of mutable container, with tensors inside."""
    source: dict[str, Any] = {
        "progress": Progress(7, {"loss": 0.5}, torch.ones(2)),
        "list": [1, [torch.ones(1)], 3],
        "deque": deque([1, 2, 3], maxlen=5),
        "set": {1, 2},
        "ordered": OrderedDict([("z", 1), ("a", 2)]),
        "default": defaultdict(list, {"k": [1]}),
        "counter": Counter("aab"),
        "space": SimpleNamespace(x=1),
        "array": np.arange(3),
    }
    target: dict[str, Any] = {
        "progress": Progress(0, {"loss": 9.0}, torch.zeros(2)),
        "list": [9, [torch.zeros(1)]],
        "deque": deque([9], maxlen=5),
        "set": {9},
        "ordered": OrderedDict([("a", 0), ("z", 0)]),
        "default": defaultdict(list, {"old": [1]}),
        "counter": Counter("zz"),
        "space": SimpleNamespace(x=0),
        "array": np.zeros(3, "i8"),
    }
    held = dict(target)
    inner = (target["progress"].ema, target["list"][1], target["list"][1][0])
    load_into(save(source), target)
    assert all(target[key] is value for key, value in held.items())
    assert target["list"] == [1, [torch.ones(1)], 3]
    assert all(
        a is b for a, b in zip(inner, (target["progress"].ema, held["list"][1], held["list"][1][0]), strict=True)
    )
    assert same(vars(target["progress"]), vars(source["progress"]))
    for key in ("deque", "set", "default", "counter", "space", "array"):
        assert same(target[key], source[key]), key
    assert dict(target["ordered"]) == {"z": 1, "a": 2}


def test_lists_follow_the_checkpoint_and_records_must_agree() -> None:
    """Lists shrink; dicts with other keys than text and empty ones are data; other dicts are records."""
    target: dict[str, Any] = {"list": [1, 2, 3], "history": {}, "by step": {1: 0.5, 2: 0.4}}
    load_into(save({"list": [5], "history": {"a": 1}, "by step": {7: 1.0}}), target)
    assert target == {"list": [5], "history": {"a": 1}, "by step": {7: 1.0}}
    with pytest.raises(StateError, match="missing: config/rate; unexpected: config/speed"):
        load_into(save({"config": {"speed": 1}}), {"config": {"rate": 1}})


def test_objects_without_a_counterpart_are_not_turned_into_plain_values() -> None:
    """A module that the target's list or dict doesn't have, and the other way round."""
    net = nn.Linear(1, 1)
    with pytest.raises(StateError, match="unexpected: nets/1"):
        load_into(save({"nets": [net, net]}), {"nets": [net]})
    with pytest.raises(StateError, match="missing: nets/1"):
        load_into(save({"nets": [net]}), {"nets": [net, net]})
    with pytest.raises(StateError, match="unexpected: nets/a"):
        load_into(save({"nets": {"a": net}}), {"nets": {}})
    with pytest.raises(StateError, match=r"saved module, target builtins.NoneType"):
        load_into(save({"net": net}), {"net": None})
    with pytest.raises(StateError, match=r"saved plain value, target torch.nn"):
        load_into(save({"net": None}), {"net": net})


def test_immutable_containers_are_replaced_or_filled() -> None:
    """A tuple of plain values is a value; one with live parts is restored part by part."""
    source, net = nn.Linear(1, 1), nn.Linear(1, 1)
    target: dict[str, Any] = {"betas": (0, 0), "both": (net, "same"), "f": Frozen("a"), "p": Pair(net, 3)}
    both = target["both"]
    load_into(save({"betas": (1, 2, 3), "both": (source, "same"), "f": Frozen("b"), "p": Pair(source, 3)}), target)
    assert target["betas"] == (1, 2, 3)
    assert target["both"] is both
    assert torch.equal(net.weight, source.weight)
    assert target["f"] == Frozen("b")
    assert type(target["f"]) is Frozen


@pytest.mark.parametrize(
    ("saved", "target", "name"),
    [
        ((nn.Linear(1, 1), 2), (nn.Linear(1, 1), 3), "x/1"),
        ((torch.ones(1), 2), (torch.ones(1), 2, 3), "x"),
        (Frozen("a", torch.ones(1)), Frozen("b", torch.ones(1)), "x/name"),
        (Pair(torch.ones(1), 2), Pair(torch.ones(1), 3), "x/1"),
        ([1], {"a": 1}, "x"),
        ({"a": 1}, [1], "x"),
        ((1,), [1], "x"),
        ({1}, [1], "x"),
    ],
)
def test_what_can_not_be_changed_in_place_is_mismatched(saved: Any, target: Any, name: str) -> None:
    """Unless it is equal already."""
    with pytest.raises(StateError) as caught:
        load_into(save({"x": saved}), {"x": target})
    assert caught.value.path == name
    assert "mismatched" in str(caught.value)


def test_immutable_top_level() -> None:
    """It can only be equal."""
    load_into(save(3), 3)
    load_into(save((torch.ones(1), 2)), (torch.zeros(1), 2))
    with pytest.raises(StateError, match="put it into a dict"):
        load_into(save(3), 4)


def test_cyclic_target_ends() -> None:
    """With an error, and not with the stack."""
    loop: list[Any] = []
    loop.append(loop)
    deep: Any = 1
    for _ in range(90):
        deep = [deep]
    saved = save(deep)
    with pytest.raises(StateError):
        restore_into(saved.tree, saved.specs, loop)


def test_only_leaves_the_rest_of_a_container() -> None:
    """Also in lists, whose places stay."""
    target: dict[str, Any] = {"list": [1, 2, 3], "by step": {1: 1}, "a": 1}
    load_into(save({"list": [7, 8, 9], "by step": {2: 2}, "a": 5, "b": 6}), target, only=["list/1", "by step/2"])
    assert target == {"list": [1, 8, 3], "by step": {1: 1, 2: 2}, "a": 1}


class Own:
    def __init__(self) -> None:
        self.state: Any = None

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        if state == "bad":
            raise KeyError("bad")
        self.state = state


def test_objects_with_state_dict() -> None:
    """They get tensors of their own, also where these share memory with a live target's."""
    weight = torch.ones(2)
    own, target = Own(), Own()
    own.state = {"seen": [weight, weight], "n": 1}
    live = torch.zeros(2)
    load_into(save({"w": weight, "own": own}), {"w": live, "own": target})
    assert same(target.state, own.state)
    assert target.state["seen"][0] is target.state["seen"][1]
    live.fill_(5)
    assert target.state["seen"][0].tolist() == [1, 1]
    own.state = "bad"
    with pytest.raises(StateError, match="Own at 'own' refused") as caught:
        load_into(save({"own": own}), {"own": target})
    assert caught.value.path == "own"
