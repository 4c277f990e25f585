"""A tree from a stranger: only FormatError and StateError come out, and nothing runs."""

from __future__ import annotations

import dataclasses
import json
import random
import subprocess
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from ckptstore.errors import FormatError, StateError
from ckptstore.state import RNG, TensorSpec, capture, restore_into, restore_plain
from ckptstore.state.compare import compare_trees
from tests.state.memory import Saved, load, save

MUTATIONS = 10_000


class Point(NamedTuple):
    x: int
    y: int


@dataclasses.dataclass
class Config:
    rate: float


def everything() -> dict[str, Any]:
    """A state with every kind of node."""
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    optimizer = torch.optim.Adam(net.parameters())
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return {
        "net": net, "optimizer": optimizer, "schedule": torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2]),
        "rng": RNG(), "generators": [torch.Generator(), random.Random(1), np.random.default_rng(1)],
        "values": [2**80, float("nan"), 1j, b"ab", b"x" * 2000, bytearray(b"c"), slice(1, 2), range(3), torch.Size([1]),
                   torch.float32, torch.device("cpu"), np.float32(1), np.str_("a"), np.bytes_(b"b"), "\ud800"],
        "containers": [(1, 2), {1, 2}, frozenset("a"), deque([1], 2), OrderedDict(a=1), defaultdict(int, a=1),
                       Counter("aa"), {1: 2, (1, 2): 3}, Point(1, 2), Config(0.1)],
        "arrays": [np.arange(3), np.array(["ab"]), np.array([1], "M8[s]"), np.zeros(2, ">c16"), np.array([1], "g")],
        "tensors": [torch.zeros(2, dtype=torch.complex128), nn.Parameter(torch.ones(2)), torch.ones(1)],
    }  # fmt: skip


JUNK: list[Any] = [
    None, True, 0, -1, 2**70, 1.5, "", "x", "tensor", "model", "<f8", "|O", "0x", [], [[]], [1, 2], {}, {"$": "dict"},
    {"$": "tensor", "name": "nowhere"}, {"$": []}, {"$": "list"}, {"$": "object", "type": "os.system", "state": "ls"},
    {"$": "namedtuple", "type": "a.b", "fields": ["__class__"], "items": [1]}, {"$": "set", "items": [[]]},
    {"$": "ndarray", "name": "net/0.bias", "dtype": "O"}, {"$": "bytes", "tensor": "net/0.weight"},
    {"$": "deque", "maxlen": -1, "items": []}, {"$": "default_dict", "factory": "eval", "items": []},
]  # fmt: skip


def mutate(node: Any, rng: random.Random) -> Any:
    """Change one place of a parsed tree."""
    places: list[tuple[Any, Any]] = []
    stack = [node]
    while stack:
        current = stack.pop()
        keys = current.keys() if isinstance(current, dict) else range(len(current))
        places += [(current, key) for key in keys]
        stack += [current[key] for key in keys if isinstance(current[key], dict | list)]
    holder, key = rng.choice(places)
    action = rng.randrange(5)
    if action == 0 and isinstance(holder, dict):
        del holder[key]
    elif action == 1 and isinstance(holder, dict):
        holder[rng.choice(["$", "name", "items", "state", "dtype", "x"])] = holder.pop(key)
    elif action == 2:
        other_holder, other_key = rng.choice(places)
        holder[key] = json.loads(json.dumps(other_holder[other_key]))
    else:
        holder[key] = json.loads(json.dumps(rng.choice(JUNK)))
    return node


def mutate_specs(specs: list[TensorSpec], rng: random.Random) -> list[TensorSpec]:
    """Change one spec's type; its size stays what the caller checked."""
    index = rng.randrange(len(specs))
    spec = specs[index]
    kind = rng.choice(["F32", "I32", "U32", "O", "", "complex128"])
    changed = spec._replace(dtype=kind, logical=rng.choice([None, "numpy:<U1", "bits8", "nonsense"]))
    return [*specs[:index], changed, *specs[index + 1 :]]


def attempt(saved: Saved, specs: list[TensorSpec], tree: Any, target: Any) -> None:
    """One load, filling what is wanted with as many of the saved bytes as fit."""
    restoration = restore_plain(tree, specs) if target is None else restore_into(tree, specs, target, strict=False)
    for name, destination in restoration.wanted.items():
        data = saved.data[name][: destination.nbytes].ljust(destination.nbytes, b"\1")
        if data:
            destination.host()[:] = data
    restoration.finish()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("into", [False, True], ids=["plain", "into"])
def test_mutated_trees_raise_only_our_errors(into: bool) -> None:
    """Thousands of changes; many must be noticed, and some must load for the test to mean anything."""
    rng = random.Random(7)
    target: Any = None
    saved = save(everything())
    state = RNG().state_dict()
    refused = loaded = 0
    for round_number in range(MUTATIONS // 2):
        if into and round_number % 100 == 0:
            target = everything()
        tree, specs = saved.tree, saved.specs
        for _ in range(rng.randrange(1, 4)):
            tree = mutate(tree, rng)
        if rng.random() < 0.2:
            specs = mutate_specs(specs, rng)
        try:
            attempt(saved, specs, tree, target)
            loaded += 1
        except (FormatError, StateError):
            refused += 1
    RNG().load_state_dict(state)
    assert refused > MUTATIONS // 10
    assert loaded > MUTATIONS // 50


@pytest.mark.parametrize("only", [None, ["net/*", "optimizer", "*state*", "containers/0/1"]], ids=["all", "only"])
def test_comparing_with_mutated_trees_raises_only_our_errors(only: list[str] | None) -> None:
    """Or names something; what says the same as before is compared as before."""
    rng = random.Random(9)
    state = everything()
    saved, live = save(state), capture(state)
    quiet = [finding.name for finding in compare_trees(saved.tree, saved.specs, live, only=only)]
    refused = named = 0
    for _ in range(MUTATIONS // 10):
        tree, specs = mutate(saved.tree, rng), saved.specs
        if rng.random() < 0.2:
            specs = mutate_specs(specs, rng)
        try:
            findings = compare_trees(tree, specs, live, only=only)
        except (FormatError, StateError):
            refused += 1
            continue
        named += any(finding.live is None for finding in findings)
        if json.dumps(tree) == saved.text and specs == saved.specs:
            assert [finding.name for finding in findings] == quiet
    assert refused > MUTATIONS // 1000
    assert named > MUTATIONS // 100


def test_trees_nested_without_an_end_are_not_followed() -> None:
    """No deeper than the live state goes, and no deeper than the stack."""
    deep: Any = 1
    for _ in range(100_000):
        deep = [deep]
    live = capture({"a": nested(90), "b": 1})
    [finding] = compare_trees({"a": deep, "b": 1}, [], live)
    assert finding.name == "a" + "/0" * 90
    with pytest.raises(FormatError, match="deeper"):
        compare_trees({"a": deep, "b": 1}, [], live, only=["a", "b"])
    with pytest.raises(FormatError, match="nested deeper"):
        compare_trees({"a": {"$": "set", "items": deep}, "b": 1}, [], live)


def nested(depth: int) -> Any:
    value: Any = torch.ones(1)
    for _ in range(depth):
        value = [value]
    return value


def bomb(levels: int) -> Any:
    """A very deep tree, as a JSON parser with no limit would give it."""
    node: Any = 1
    for _ in range(levels):
        node = [node]
    return node


@pytest.mark.parametrize("levels", [300, 5000, 200_000])
@pytest.mark.parametrize("only", [None, ["x"]])
def test_depth_is_bounded(levels: int, only: list[str] | None) -> None:
    """Long before the stack ends."""
    tree = bomb(levels)
    with pytest.raises(FormatError if only is None else (FormatError, StateError)):
        restore_plain(tree, [], only=only)
    with pytest.raises((FormatError, StateError)):
        restore_into({"a": tree}, [], {"a": None}, only=only)
    while isinstance(tree, list):
        tree = tree.pop()


@pytest.mark.parametrize(
    ("node", "cause"),
    [
        ({"$": "tensor", "name": "t2"}, "doesn't have"),
        ({"$": "future"}, "a newer one may"),
        ({"$": "ndarray", "name": "t", "dtype": "|O"}, "no NumPy element type"),
        ({"$": "ndarray", "name": "t", "dtype": "f4,f4"}, "no NumPy element type"),
        ({"$": "ndarray", "name": "t", "dtype": "<f8"}, "isn't stored as"),
        ({"$": "int", "hex": "1_0"}, "malformed"),
        ({"$": "dict", "items": [[[1], 2]]}, "key that is none"),
        ({"$": "dict", "items": [[{"$": "object", "type": "x", "state": 1}, 2]]}, "register_type"),
        ({"$": "namedtuple", "type": "x", "fields": ["a", "a"], "items": [1, 2]}, "named tuple"),
        ({"$": "namedtuple", "type": "x", "fields": ["def"], "items": [1]}, "named tuple"),
        ({"$": "default_dict", "factory": "eval", "items": []}, "factory"),
        ({"$": "device", "name": "cpu; rm"}, "malformed"),
        (
            {"$": "optimizer", "groups": [{"params": ["a"], "shapes": [], "options": {}}], "state": []},
            "differ in number",
        ),
    ],
)
def test_malformed_nodes_say_what_is_wrong(node: Any, cause: str) -> None:
    """One example of each check."""
    with pytest.raises((FormatError, StateError), match=cause):
        restore_plain({"x": node}, [TensorSpec("t", "F32", (2,))])


@pytest.mark.parametrize(
    "spec",
    [
        TensorSpec("t", "F31", (2,)),
        TensorSpec("t", "F32", (-1,)),
        TensorSpec("t", "F32", (1,) * 65),
        TensorSpec("t", "F32", (2,), "unheard"),
        TensorSpec("t", "F64", (3,), "complex128"),
        TensorSpec("t", "F32", (2**62, 2**62, 0)),
    ],
    ids=str,
)
def test_impossible_specs_are_refused(spec: TensorSpec) -> None:
    """Before or when memory is asked for."""
    with pytest.raises(FormatError):
        restore_plain({"$": "tensor", "name": "t"}, [spec]).finish()


def test_surrogates_can_not_join_on_the_way() -> None:
    """Two lone halves are not one character."""
    assert load(save({"\ud83d\ude00": "\ud83d\ude00"})) == {"\ud83d\ude00": "\ud83d\ude00"}


AUDIT = """
import sys
from tests.state.test_hostile import everything
from tests.state.memory import load, load_into, save
saved, target = save(everything()), everything()
load(saved); load_into(saved, target)
names = {"a": saved.text.replace("Point", "Other")}
saved.text = names["a"]
events = []
watched = ("exec", "compile", "import", "marshal.loads", "pickle.find_class", "code.__new__", "function.__new__")
sys.addaudithook(lambda event, args: events.append((event, args)) if event in watched else None)
load(saved); load_into(saved, target)
found = list(events)
eval("1"); assert events != found, "the hook sees"
print(found)
"""


def test_nothing_is_compiled_executed_or_imported() -> None:
    """As the interpreter's own audit events tell, in a process of its own."""
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", AUDIT], capture_output=True, text=True, cwd=root, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"
