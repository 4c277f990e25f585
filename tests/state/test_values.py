"""Plain values and containers come back with their exact types and bits."""

from __future__ import annotations

import dataclasses
import enum
import math
import struct
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from types import SimpleNamespace
from typing import Any, NamedTuple

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from ckptstore.errors import StateError
from ckptstore.state import register_type
from ckptstore.state.registry import forget_type
from tests.state.memory import load, load_into, same, save


class Point(NamedTuple):
    x: float
    y: Any


@dataclasses.dataclass
class Config:
    rate: float
    layers: list[int] = dataclasses.field(default_factory=list)
    weight: Any = None


@dataclasses.dataclass(frozen=True, slots=True)
class Fixed:
    size: int


class Color(enum.IntEnum):
    RED = 1


class Loose(dict):
    pass


@pytest.fixture
def registered():
    """Registers classes, for the length of a test."""
    classes = []

    def register(cls: type, **options: Any) -> None:
        register_type(cls, **options)
        classes.append(cls)

    yield register
    for cls in classes:
        forget_type(cls)


NAN = struct.unpack(">d", bytes.fromhex("fff8dead0000beef"))[0]
VALUES = [
    None, True, False, 0, -1, 2**53 - 1, 2**53, -(2**53), 10**5000, -(1 << 70), 0.0, -0.0, 0.1, 5e-324, 1e308, 1e22,
    math.inf, -math.inf, NAN, "", "text", "Ü😀", "\ud83d\ude00", "\ud800", "a\0b", "$", b"", b"\0\xff", b"x" * 1024,
    b"x" * 1025, bytearray(b"ab"), bytearray(b"y" * 5000), 1 + 2j, complex(-0.0, NAN), slice(None), slice(1, 2**60, -1),
    range(0), range(3, 2**70, 7), torch.Size([]), torch.Size([2, 3]), torch.float32, torch.quint8, torch.bfloat16,
    torch.device("cpu"), torch.device("cuda:1"), torch.device("meta"),
    np.float32(0.1), np.float64(NAN), np.float16(2), np.int8(-3), np.uint64(2**64 - 1), np.bool_(True),
    np.complex64(1j), np.complex128(2), np.longdouble("0.1"), np.str_("é\ud800"), np.str_(""), np.bytes_(b"ab"),
    np.datetime64("2024-02-29T12", "h"), np.datetime64("NaT"), np.timedelta64(5, "us"), np.timedelta64(5),
    [], [1, "a", None], [1.5, math.inf], [2**60, 1], (), (1, (2,)), {}, {"a": {"b": [1]}}, {"$": 1, "a": 2},
    {"b": 1, "a": 2}, {1: "int", "1": "str", (1, "x"): 2, None: 3, 2.5: 4, b"k": 5, frozenset([1]): 6},
    {b"k" * 2000: 1}, {math.inf: 1, 2**80: 2, "\ud800": 3}, {torch.float32: 1, np.int64(4): 2},
    OrderedDict([("b", 1), ("a", [2])]), defaultdict(list, {"a": [1]}), defaultdict(None, {1: 2}), defaultdict(int),
    Counter({"x": 3, 7: -1}), deque([1, 2, 3], maxlen=3), deque(), set(), {1, "a", (2, 3)}, frozenset({"z", "y"}),
    SimpleNamespace(a=1, b=[2]),
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=lambda v: type(v).__name__)
def test_value_comes_back_exactly(value: Any) -> None:
    """Alone, in a list, in a dict and in a tuple."""
    for state in (value, [value, value], {"k": value}, (value,)):
        assert same(load(save(state)), state)
    if isinstance(value, deque):
        assert load(save(value)).maxlen == value.maxlen
    if isinstance(value, defaultdict):
        assert load(save(value)).default_factory is value.default_factory


@pytest.mark.parametrize("value", VALUES, ids=lambda v: type(v).__name__)
def test_value_is_replaced_in_a_mutable_container(value: Any) -> None:
    """Whatever stands there before, the entry has the saved value afterwards."""
    target: dict[str, Any] = {"k": None, "l": [None]}
    load_into(save({"k": value, "l": [value, value]}), target)
    assert same(target, {"k": value, "l": [value, value]})


@pytest.mark.parametrize(
    "value",
    [Color.RED, Loose(a=1), np.ma.masked_array([1]), lambda: 1, object(), type, np.dtype("f4"), iter([])],
    ids=lambda v: type(v).__name__,
)
def test_other_classes_are_refused_with_path_and_way_out(value: Any) -> None:
    """Also subclasses of what can be stored: they would come back as something else."""
    with pytest.raises(StateError, match=r"register_type|as arrays|without pickle") as caught:
        save({"a": [1, value]})
    assert caught.value.path == "a/1"


@pytest.mark.parametrize(
    ("value", "way_out"),
    [
        (np.array([object()]), "as arrays of"),
        (np.zeros(2, [("a", "f4")]), "as arrays of"),
        (defaultdict(lambda: 1), "dict\\(\\)"),
        ({SimpleNamespace: 1}, "register_type"),
        (slice("a"), "integers"),
    ],
)
def test_unsuitable_content_is_refused(value: Any, way_out: str) -> None:
    """Objects in arrays, code in factories, odd keys."""
    with pytest.raises(StateError, match=way_out) as caught:
        save({"x": value})
    assert caught.value.path == "x"


def test_key_that_would_not_be_hashable_is_refused() -> None:
    """A frozen dataclass comes back as a namespace, which can't be a key."""
    with pytest.raises(StateError, match="key of type Fixed") as caught:
        save({"x": {Fixed(1): 2}})
    assert caught.value.path == "x"


def test_cycles_and_depth_are_refused_where_they_are() -> None:
    """The error names both ends of the cycle."""
    loop: list[Any] = [1]
    loop.append({"back": loop})
    with pytest.raises(StateError, match="cycle") as caught:
        save({"a": loop})
    assert caught.value.path == "a/1/back"
    deep: Any = 1
    for _ in range(99):
        deep = [deep]
    assert same(load(save({"d": deep})), {"d": deep})
    with pytest.raises(StateError, match="100 containers deep"):
        save({"d": [deep]})


def test_same_list_twice_is_no_cycle() -> None:
    """It is stored twice."""
    part = [1, object]
    part.pop()
    back = load(save({"a": part, "b": part}))
    assert back == {"a": [1], "b": [1]}
    assert back["a"] is not back["b"]


def test_unregistered_record_classes_come_back_light() -> None:
    """Attribute access and order stay; nothing is imported for it."""
    back = load(save({"p": Point(1.5, [2]), "c": Config(0.1, [3])}))
    assert back["p"] == (1.5, [2])
    assert back["p"]._fields == ("x", "y")
    assert back["p"].y == [2]
    assert back["c"] == SimpleNamespace(rate=0.1, layers=[3], weight=None)
    assert type(load(save(back["p"]))) is type(back["p"]), "one class for one name and fields"
    legal = namedtuple("legal", "count index")(1, 2)
    assert load(save(legal)).count == 1


def test_registered_record_classes_come_back_as_themselves(registered: Any) -> None:
    """Without running __init__."""
    for cls in (Point, Config, Fixed):
        registered(cls)
    state = {"p": Point(1.5, [2]), "c": Config(0.1, [3], torch.ones(2)), "f": Fixed(4)}
    back = load(save(state))
    assert type(back["p"]) is Point
    assert back["p"] == state["p"]
    assert type(back["c"]) is Config
    assert same(vars(back["c"]), vars(state["c"]))
    assert type(back["f"]) is Fixed
    assert back["f"] == Fixed(4)


def test_registered_class_uses_its_functions(registered: Any) -> None:
    """Also as a dict's key, and nested."""
    registered(Color, to_state=int, from_state=Color)
    registered(Loose, to_state=dict, from_state=Loose, name="loose")
    back = load(save({Color.RED: Loose(a=Color.RED)}))
    assert type(next(iter(back))) is Color
    assert type(back[Color.RED]) is Loose
    assert back[Color.RED]["a"] is Color.RED


def test_class_not_registered_when_loading_is_named(registered: Any) -> None:
    """Nothing is imported by a stored name."""
    register_type(Loose, to_state=dict, from_state=Loose)
    saved = save({"a": Loose(b=1)})
    forget_type(Loose)
    with pytest.raises(StateError, match="register_type for it before loading") as caught:
        load(saved)
    assert caught.value.path == "a"


def test_changed_fields_are_named(registered: Any) -> None:
    """A field that the class lacks now, and a named tuple with others."""
    saved = save({"c": Config(0.1), "p": Point(1, 2)})
    old = saved.text
    registered(Config)
    saved.text = old.replace('"rate"', '"speed"')
    with pytest.raises(StateError, match="speed, which Config hasn't"):
        load(saved)
    registered(Point)
    saved.text = old.replace('"y"', '"z"')
    with pytest.raises(StateError, match="hasn't any more"):
        load(saved)


def test_registration_is_checked() -> None:
    """Half a pair of functions, no fields, a taken name."""
    with pytest.raises(TypeError, match="both"):
        register_type(Loose, to_state=dict)
    with pytest.raises(TypeError, match="no dataclass"):
        register_type(Loose)
    register_type(Config, name="taken")
    with pytest.raises(ValueError, match="another class"):
        register_type(Fixed, name="taken")
    forget_type(Config)


def test_failing_functions_are_named(registered: Any) -> None:
    """The cause is chained."""
    registered(Loose, to_state=lambda v: v["no"], from_state=lambda v: v["no"])
    with pytest.raises(StateError, match="to_state") as caught:
        save({"a": Loose()})
    assert caught.value.path == "a"
    assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(StateError, match="from_state"):
        load(save({"a": Loose(no={})}))


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(st.characters(exclude_categories=())),
    st.binary(max_size=40), st.complex_numbers(), st.integers(-(2**200), 2**200),
)  # fmt: skip
KEYS = st.one_of(st.text(max_size=5), st.integers(), st.booleans(), st.binary(max_size=3), st.tuples(st.integers()))
ARRAYS = st.sampled_from(
    [np.arange(6.0).reshape(2, 3), np.array(3, "i2"), np.zeros((0, 2)), torch.arange(4), torch.tensor(True)]
)
NESTED = st.recursive(
    SCALARS | ARRAYS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(KEYS, inner, max_size=4),
        st.dictionaries(st.text(max_size=3), inner, max_size=4).map(OrderedDict),
        st.lists(inner, max_size=3).map(tuple),
        st.lists(inner, max_size=3).map(deque),
    ),
    max_leaves=20,
)


@settings(max_examples=300, deadline=None)
@given(NESTED)
def test_any_nested_value_comes_back(state: Any) -> None:
    """Types, bits and order."""
    assert same(load(save({"s": state}))["s"], state)


@settings(max_examples=100, deadline=None)
@given(NESTED)
def test_any_nested_value_is_put_into_an_empty_place(state: Any) -> None:
    """The other way of loading gives the same."""
    target = {"s": None}
    load_into(save({"s": state}), target)
    assert same(target["s"], state)
