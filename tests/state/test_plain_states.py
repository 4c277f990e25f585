"""State dicts that were saved as plain data, as programs without us save them, go into live objects."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import ckptstore as cs
from ckptstore.errors import StateError


class Counter:
    """An object of the user's own."""

    def __init__(self) -> None:
        self.count = 0

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


class Odd(nn.Linear):
    """A module whose state isn't just its tensors."""

    def load_state_dict(self, state: Any, *args: Any, **kwargs: Any) -> Any:
        self.loaded = True
        return super().load_state_dict(state, *args, **kwargs)


def trained(kind: type[nn.Linear] = nn.Linear) -> dict[str, Any]:
    model = kind(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    scheduler.step()
    return {"model": model, "optimizer": optimizer, "scheduler": scheduler}


@pytest.fixture
def store() -> cs.Store:
    return cs.open("memory://plain-states")


def saved(store: cs.Store, state: dict[str, Any], **more: Any) -> cs.Checkpoint:
    """As ``torch.save`` of state dicts, which somebody has imported."""
    return store.save({name: part.state_dict() for name, part in state.items()} | more, step=1)


@pytest.mark.parametrize("kind", [nn.Linear, Odd])
def test_into_live_objects(store: cs.Store, kind: type[nn.Linear]) -> None:
    """The run goes on as the one that was saved."""
    old, new = trained(kind), trained(kind)
    counter = Counter()
    checkpoint = saved(store, old, counter={"count": 5})

    loaded = store.load(checkpoint.id, into=new | {"counter": counter})

    assert [loaded.missing, loaded.unexpected, loaded.mismatched] == [[], [], []]
    assert counter.count == 5
    assert new["scheduler"].state_dict() == old["scheduler"].state_dict()
    assert new["optimizer"].param_groups[0]["lr"] == 0.25
    for state in (old, new):
        state["model"](torch.ones(1, 3)).sum().backward()
        state["optimizer"].step()
    assert torch.equal(new["model"].weight, old["model"].weight)
    assert getattr(new["model"], "loaded", kind is nn.Linear)


def test_nothing_is_changed_where_a_tensor_does_not_fit(store: cs.Store) -> None:
    checkpoint = saved(store, {"model": nn.Linear(3, 4)})
    model = nn.Linear(3, 2)
    before = model.weight.clone()

    with pytest.raises(StateError, match=r"mismatched: model/bias: saved F32 \[4\], target F32 \[2\]"):
        store.load(checkpoint.id, into={"model": model})

    assert torch.equal(model.weight, before)


def test_other_names_are_told(store: cs.Store) -> None:
    checkpoint = store.save({"model": {"weight": torch.ones(2, 3), "scale": torch.ones(1), "note": "x"}}, step=1)
    model = nn.Linear(3, 2)

    with pytest.raises(StateError, match="missing: model/bias; unexpected: model/note, model/scale"):
        store.load(checkpoint.id, into={"model": model})
    loaded = store.load(checkpoint.id, into={"model": model}, strict=False)

    assert loaded.missing == ["model/bias"]
    assert model.weight.eq(1).all()


def test_what_the_object_refuses(store: cs.Store) -> None:
    """Its own error is named with the place."""
    checkpoint = store.save({"counter": {"other": 1}}, step=1)
    with pytest.raises(StateError, match=r"the .*Counter at 'counter' refused what was saved: 'count'"):
        store.load(checkpoint.id, into={"counter": Counter()})
