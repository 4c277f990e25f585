"""``strict="parts"``: the entries that both have are restored strictly, the others are reported."""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import ckptstore as cs


@pytest.fixture
def store(store_path: Any) -> cs.Store:
    return cs.open(store_path)


def part(value: float) -> dict[str, Any]:
    return {"w": torch.full((3,), value), "n": value}


def test_common_parts_are_restored_and_the_others_named(store: cs.Store) -> None:
    """What only the target has keeps its value; neither side's extra entry is an error."""
    store.save({"model": part(1.0), "ema": part(2.0), "extra": 3}, step=1)
    target = {"model": part(0.0), "scheduler": part(9.0), "ema": part(0.0)}
    loaded = store.load(into=target, strict="parts")
    assert (list(loaded.missing), list(loaded.unexpected)) == (["scheduler"], ["extra"])
    assert not loaded.mismatched
    assert [target[name]["n"] for name in ("model", "ema", "scheduler")] == [1.0, 2.0, 9.0]
    assert target["model"]["w"].tolist() == [1.0] * 3
    assert target["scheduler"]["w"].tolist() == [9.0] * 3
    assert list(target) == ["model", "scheduler", "ema"]


def test_live_parts_that_are_left_out_stay_as_they_are(store: cs.Store) -> None:
    """An optimizer that wasn't saved keeps its state, and one that isn't wanted is left alone."""
    net = nn.Linear(2, 2)
    adam = torch.optim.Adam(net.parameters())
    net(torch.ones(2)).sum().backward()
    adam.step()
    store.save({"model": net, "rng": cs.RNG()}, step=1)
    store.save({"model": net, "optimizer": adam}, step=2)
    before = adam.state[net.weight]["exp_avg"].clone()
    other = nn.Linear(2, 2)
    loaded = store.load("step:1", into={"model": other, "optimizer": adam}, strict="parts")
    assert (list(loaded.missing), list(loaded.unexpected)) == (["optimizer"], ["rng"])
    assert torch.equal(other.weight, net.weight)
    assert torch.equal(adam.state[net.weight]["exp_avg"], before)
    loaded = store.load("step:2", into={"model": nn.Linear(2, 2)}, strict="parts")
    assert (list(loaded.missing), list(loaded.unexpected)) == ([], ["optimizer"])


def test_an_optimizer_is_matched_by_names_of_modules_that_were_not_saved(store: cs.Store) -> None:
    """The parameters' names come from the whole target, whatever of it is restored."""
    saved = {name: nn.Parameter(torch.zeros(3)) for name in ("a", "b")}
    model = nn.ParameterDict(saved)
    sgd = torch.optim.SGD([saved["a"], saved["b"]], 0.1, momentum=0.9)
    for number, name in enumerate(saved):
        saved[name].grad = torch.full((3,), float(number))
    sgd.step()
    store.save({"model": model, "optimizer": sgd, "x": 1}, step=1)
    live = nn.ParameterDict({name: nn.Parameter(torch.zeros(3)) for name in ("a", "b")})
    target = {"model": live, "optimizer": torch.optim.SGD([live["b"], live["a"]], 0.1, momentum=0.9)}
    store.load(into=target, strict="parts", only=["optimizer"])
    for number, name in enumerate(("a", "b")):
        assert target["optimizer"].state[live[name]]["momentum_buffer"].tolist() == [number] * 3


def test_misfits_inside_of_common_parts_are_all_listed(store: cs.Store) -> None:
    """Each of them is as strict as with True, nothing changes, and whole entries aren't among them."""
    store.save({"a": part(1.0), "b": {"w": torch.ones(3), "gone": 1}, "c": part(1.0)}, step=1)
    target = {"a": {"w": torch.zeros(5), "n": 0.0}, "b": {"w": torch.zeros(3), "new": 2}, "d": 4}
    with pytest.raises(cs.StateError) as caught:
        store.load(into=target, strict="parts")
    message = str(caught.value)
    assert all(name in message for name in ("a/w", "b/gone", "b/new"))
    assert "missing: b/new;" in message
    assert "unexpected: b/gone;" in message
    assert target["b"]["w"].tolist() == [0.0] * 3  # type: ignore[index]
    assert list(target["b"]) == ["w", "new"]  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("state", "target", "match"),
    [
        ({"a": 1}, {"b": 1}, "no entry in common: saved a, target b"),
        ({"a": 1}, {}, "no entry in common: saved a, target nothing"),
        ({}, {"b": 1}, "no entry in common: saved nothing, target b"),
        ([1], {"b": 1}, "two dicts"),
        ({"a": 1}, [1], "two dicts"),
        (nn.Linear(1, 1), {"weight": torch.zeros(1, 1)}, "two dicts"),
        ({"weight": torch.zeros(1, 1)}, nn.Linear(1, 1), "two dicts"),
    ],
)
def test_nothing_in_common_is_an_error(store: cs.Store, state: Any, target: Any, match: str) -> None:
    """A checkpoint of something else is no checkpoint of which parts are missing."""
    store.save(state, step=1)
    with pytest.raises(cs.StateError, match=match):
        store.load(into=target, strict="parts")


@pytest.mark.parametrize("cls", [dict, OrderedDict, Counter, lambda content: defaultdict(int, content)])
def test_any_dict_is_taken_by_its_entries(store: cs.Store, cls: Any) -> None:
    """Also those whose entries would follow the checkpoint elsewhere, and keys that are no text."""
    store.save({"a": 1, 2: 3}, step=1)
    target = cls({"b": 9, 2: 0})
    loaded = store.load(into=target, strict="parts")
    assert dict(target) == {"b": 9, 2: 3}
    assert (list(loaded.missing), list(loaded.unexpected)) == (["b"], ["a"])


@pytest.mark.parametrize(
    ("only", "missing", "unexpected", "restored"),
    [
        (["model/*"], [], [], True),
        (["model"], [], [], True),
        (["mod*"], [], [], True),
        (["ema/*"], [], ["ema"], False),
        (["ema"], [], ["ema"], False),
        (["scheduler"], ["scheduler"], [], False),
        (["scheduler/*"], ["scheduler"], [], False),
        (["scheduler/groups/*"], ["scheduler"], [], False),
        (["sched*", "model/w"], ["scheduler"], [], True),
        (["model/*", "ema/w"], [], ["ema"], True),
        (["*"], ["scheduler"], ["ema"], True),
        (["*/w"], ["scheduler"], ["ema"], True),
    ],
)
def test_only_is_about_parts_too(
    store: cs.Store, only: list[str], missing: list[str], unexpected: list[str], restored: bool
) -> None:
    """What is asked for and isn't on both sides is reported; what isn't asked for is not even that."""
    store.save({"model": {"w": torch.ones(3)}, "ema": {"w": torch.ones(3)}}, step=1)
    target = {"model": {"w": torch.zeros(3)}, "scheduler": {"last": 7}}
    loaded = store.load(into=target, strict="parts", only=only)
    assert (list(loaded.missing), list(loaded.unexpected)) == (missing, unexpected)
    assert target["model"]["w"].tolist() == [float(restored)] * 3  # type: ignore[index]
    assert target["scheduler"] == {"last": 7}


@pytest.mark.parametrize("only", [["modle/*"], ["model/*", "shceduler"], ["model/x"], []])
def test_a_pattern_that_neither_side_has_is_still_an_error(store: cs.Store, only: list[str]) -> None:
    """Parts that may lack make no room for slips of the pen."""
    store.save({"model": {"w": torch.ones(3)}, "ema": 1}, step=1)
    target = {"model": {"w": torch.zeros(3)}, "scheduler": 1}
    with pytest.raises(cs.StateError, match="matches nothing"):
        store.load(into=target, strict="parts", only=only)
    assert not target["model"]["w"].any()  # type: ignore[index]


@pytest.mark.parametrize("strict", ["part", "", None, 0, 1, ["parts"], torch.ones(2)])
def test_another_value_of_strict_is_refused(store: cs.Store, strict: Any) -> None:
    """By name, with what may be written, before anything is read."""
    with pytest.raises(cs.StateError, match="must be True, False or 'parts'"):
        store.load(into={"a": 1}, strict=strict)


def test_a_misfit_of_strict_names_the_way_out(store: cs.Store) -> None:
    """Who meets a missing entry learns of parts."""
    store.save({"a": 1}, step=1)
    with pytest.raises(cs.StateError, match="strict='parts'"):
        store.load(into={"a": 1, "b": 2})


NAMES = st.sets(st.sampled_from("abcdef"), min_size=1)


@given(saved=NAMES, live=NAMES)
def test_what_is_in_both_is_restored_and_nothing_else(saved: set[str], live: set[str]) -> None:
    """For any two sets of parts."""
    with cs.open("memory://parts") as store:
        checkpoint = store.save({name: part(1.0) for name in sorted(saved)}, step=1)
        target = {name: part(0.0) for name in sorted(live)}
        if not saved & live:
            with pytest.raises(cs.StateError, match="no entry in common"):
                store.load(checkpoint.id, into=target, strict="parts")
        else:
            loaded = store.load(checkpoint.id, into=target, strict="parts")
            assert (set(loaded.missing), set(loaded.unexpected)) == (live - saved, saved - live)
        for name in live:
            assert target[name]["n"] == (name in saved)
            assert target[name]["w"].tolist() == [float(name in saved)] * 3
