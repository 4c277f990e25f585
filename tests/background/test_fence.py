"""When the fence comes: before every kind of step and load that changes what is read in place."""

from __future__ import annotations

import copy
import itertools
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import ckptstore as cs
from ckptstore.engine.plan import PlannedFile
from ckptstore.state import staging
from tests.background.rig import small_blocks


@pytest.fixture(autouse=True)
def small() -> Iterator[None]:
    with small_blocks():
        yield


_numbers = itertools.count()


class Gate:
    """Holds the pipeline back until it is opened, so that all that was not copied still lies in live memory."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened = threading.Event()
        self.reached = threading.Event()
        fill = PlannedFile.fill

        def gated(file: PlannedFile, number: int, raw: memoryview, hasher: Any = None) -> None:
            # Who copies at the fence hashes nothing, and isn't held back.
            if hasher is not None and not self.opened.is_set():
                self.reached.set()
                assert self.opened.wait(60)
            fill(file, number, raw, hasher)

        monkeypatch.setattr(PlannedFile, "fill", gated)

    def open_soon(self) -> None:
        """Let go of it while the caller waits at the fence."""
        threading.Timer(0.05, self.opened.set).start()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


@pytest.fixture
def store() -> Iterator[cs.Store]:
    with cs.open(f"memory://fence-{next(_numbers)}") as store:
        yield store


def trained(kind: type[torch.optim.Optimizer] = torch.optim.AdamW, **options: Any) -> tuple[nn.Module, Any]:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    optimizer = kind(model.parameters(), lr=0.1, **options)  # type: ignore[call-arg]
    prepare(model)
    optimizer.step()
    return model, optimizer


def prepare(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)


def clone(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def holds(store: cs.Store, id: str, weights: dict[str, torch.Tensor]) -> bool:
    saved = store.load(id, only=["model/*"])["model"]
    return all(torch.equal(saved[name], value) for name, value in weights.items())


STEPS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "for loop": (torch.optim.AdamW, {"foreach": False}),
    "foreach": (torch.optim.AdamW, {"foreach": True}),
    "fused": (torch.optim.AdamW, {"fused": True}),
    "sgd": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "rmsprop": (torch.optim.RMSprop, {"momentum": 0.5}),
    "adagrad": (torch.optim.Adagrad, {}),
    "tensor lr": (torch.optim.AdamW, {"foreach": False}),
}


@pytest.mark.parametrize("name", STEPS)
def test_every_kind_of_step(name: str, store: cs.Store, gate: Gate) -> None:
    """The checkpoint is the state at the call, though nothing was read before the step."""
    kind, options = STEPS[name]
    model, optimizer = trained(kind, **options)
    if name == "tensor lr":
        optimizer.param_groups[0]["lr"] = torch.tensor(0.1)
    before = clone(model)
    state = copy.deepcopy(optimizer.state_dict())
    handle = store.save({"model": model, "optimizer": optimizer}, step=1, mode="overlapped")
    assert handle.mode == "overlapped"
    assert gate.reached.wait(60)
    gate.open_soon()
    prepare(model)
    optimizer.step()
    assert not torch.equal(before["0.weight"], model[0].weight)
    assert handle.copied_bytes
    assert holds(store, handle.result().id, before)
    # The optimizer's state, too, is that of the call.
    other, second = trained(kind, **options)
    store.load(into={"model": other, "optimizer": second})
    for index, values in state["state"].items():
        for key, value in values.items():
            assert torch.equal(torch.as_tensor(second.state_dict()["state"][index][key]), torch.as_tensor(value)), key


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_step(store: cs.Store, gate: Gate) -> None:
    """The hook fires for a step inside of torch.compile, and before it changes anything."""
    model, optimizer = trained()
    cs.fence(optimizer)
    compiled = torch.compile(optimizer.step, backend="eager")
    prepare(model)
    compiled()
    before = clone(model)
    handle = store.save({"model": model, "optimizer": optimizer}, step=1, mode="overlapped")
    assert gate.reached.wait(60)
    gate.open_soon()
    prepare(model)
    compiled()
    assert not torch.equal(before["0.weight"], model[0].weight)
    assert holds(store, handle.result().id, before)


def test_a_step_that_the_scaler_skips_is_no_change(store: cs.Store, gate: Gate) -> None:
    """Infinite gradients: no step, no copy. Finite ones: the fence."""
    model, optimizer = trained()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    before = clone(model)
    handle = store.save({"model": model, "optimizer": optimizer}, step=1, mode="overlapped")
    assert gate.reached.wait(60)
    scaler.scale(model(torch.full((1, 64), float("inf"))).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert holds(store, handle.result().id, before) if gate.opened.is_set() else handle.copied_bytes == 0
    gate.open_soon()
    optimizer.zero_grad()
    scaler.scale(model(torch.ones(1, 64)).sum()).backward()
    scaler.step(optimizer)
    assert not torch.equal(before["0.weight"], model[0].weight)
    assert holds(store, handle.result().id, before)


LOADS: dict[str, Callable[[nn.Module, dict[str, Any]], object]] = {
    "the model": lambda model, other: model.load_state_dict(other),
    "a part of it": lambda model, other: model[0].load_state_dict({n: other[f"0.{n}"] for n in ("weight", "bias")}),
    "what it is part of": lambda model, other: nn.ModuleDict({"m": model}).load_state_dict(
        {f"m.{name}": value for name, value in other.items()}
    ),
}


@pytest.mark.parametrize("name", LOADS)
def test_loading_into_the_model(name: str, store: cs.Store, gate: Gate) -> None:
    """``load_state_dict`` is a fence, wherever it is called."""
    model, optimizer = trained()
    before = clone(model)
    handle = store.save({"model": model, "optimizer": optimizer}, step=1, mode="overlapped")
    assert gate.reached.wait(60)
    gate.open_soon()
    LOADS[name](model, {key: torch.zeros_like(value) for key, value in before.items()})
    assert not model[0].weight.any()
    assert holds(store, handle.result().id, before)


def test_loading_a_checkpoint_into_the_model(store: cs.Store, gate: Gate) -> None:
    """``store.load(into=)`` writes to memory directly, and is a fence."""
    model, optimizer = trained()
    first = store.save({"model": model}, step=0) if gate.opened.set() is None else None
    gate.opened.clear()
    prepare(model)
    optimizer.step()
    before = clone(model)
    handle = store.save({"model": model, "optimizer": optimizer}, step=1, mode="overlapped")
    assert gate.reached.wait(60)
    gate.open_soon()
    assert first is not None
    store.load(first.id, into={"model": model})
    assert not torch.equal(before["0.weight"], model[0].weight)
    assert holds(store, handle.result().id, before)


def test_an_optimizer_that_is_not_in_the_state(store: cs.Store, gate: Gate) -> None:
    """``fence`` makes known who trains a model that is saved alone."""
    model, optimizer = trained()
    cs.fence(optimizer)
    before = clone(model)
    handle = store.save({"model": model}, step=1, mode="overlapped")
    assert handle.mode == "overlapped"
    assert gate.reached.wait(60)
    gate.open_soon()
    prepare(model)
    optimizer.step()
    assert holds(store, handle.result().id, before)


def test_without_an_optimizer_it_is_async(store: cs.Store) -> None:
    """Nobody says when such a state changes, so it is copied at the call."""
    model = nn.Linear(64, 64)
    before = clone(model)
    handle = store.save({"model": model}, step=1, mode="overlapped")
    model.weight.data.zero_()
    assert handle.mode == "async"
    assert holds(store, handle.result().id, before)


def test_another_models_step_is_no_fence(store: cs.Store, gate: Gate) -> None:
    """A step that changes nothing of what is read in place copies nothing."""
    model, optimizer = trained()
    other, second = trained()
    handle = store.save({"model": model, "optimizer": optimizer}, step=1, mode="overlapped")
    assert gate.reached.wait(60)
    prepare(other)
    second.step()
    assert (handle.copied_bytes, handle.fence_s) == (0, 0.0)
    gate.opened.set()
    handle.result()


def test_wait_staged_makes_any_write_safe(store: cs.Store, gate: Gate) -> None:
    """After it even what no hook and no counter sees may happen."""
    model, optimizer = trained()
    before = clone(model)
    handle = store.save({"model": model, "optimizer": optimizer}, step=1, mode="overlapped")
    assert gate.reached.wait(60)
    gate.open_soon()
    handle.wait_staged()
    for parameter in model.parameters():
        parameter.data.numpy()[:] = 7
    assert holds(store, handle.result().id, before)


def test_a_write_by_hand_begins_the_save_again_and_is_told_once(store: cs.Store, gate: Gate) -> None:
    """The checkpoint holds the state after the write, and the user is warned at the next call, once for a store."""
    model, optimizer = trained()
    told = []
    for step in range(2):
        gate.reached.clear()
        gate.opened.clear()
        handle = store.save({"model": model, "optimizer": optimizer}, step=step, mode="overlapped")
        assert gate.reached.wait(60)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.clamp_(-0.01, 0.01)
        gate.opened.set()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert holds(store, handle.result().id, clone(model))
        told += [warning for warning in caught if warning.category is cs.TornReadWarning]
        prepare(model)
        optimizer.step()
    assert len(told) == 1
    assert "wait_staged()" in str(told[0].message)
    assert [c.step for c in store.checkpoints()] == [0, 1]
    assert store.verify().ok


def test_a_state_written_to_all_the_time_fails_and_training_goes_on(
    store: cs.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A save that tears again and again gives up, with what to do."""
    model, optimizer = trained()
    fill = PlannedFile.fill
    writes = []

    def writing(*arguments: Any) -> None:
        fill(*arguments)
        with torch.no_grad():
            model[0].weight.add_(1)
        writes.append(1)

    monkeypatch.setattr(PlannedFile, "fill", writing)
    handle = store.save({"model": model, "optimizer": optimizer}, step=1, mode="overlapped")
    with pytest.warns(cs.TornReadWarning), pytest.raises(cs.SaveFailedError, match="mode='async'"):
        handle.result()
    assert len(writes) >= 5
    assert not store.checkpoints()
    assert not store.verify().leftovers


def test_hooks_change_nothing_else(store: cs.Store) -> None:
    """A model that was saved so is still copied, still saved tensor by tensor, and gets each hook once."""
    model, optimizer = trained()
    for step in range(3):
        store.save({"model": model, "optimizer": optimizer}, step=step, mode="overlapped").result()
    assert [len(part._load_state_dict_pre_hooks) for part in model.modules()] == [0, 1, 1]
    twin = copy.deepcopy(model)
    twin.load_state_dict(model.state_dict())
    contents = store.contents(store.resolve())
    assert contents.parts[0].tree["model"]["$"] == "module"  # type: ignore[index,call-overload]


def test_frozen_parameters_are_not_copied_at_a_step(store: cs.Store, gate: Gate) -> None:
    """What nobody trains is read in place past the fence; once somebody trains it, it is copied, too."""
    base, head = nn.Linear(64, 64), nn.Linear(64, 64)
    base.requires_grad_(False)
    model = nn.Sequential(base, head)
    optimizer = torch.optim.AdamW(head.parameters())
    prepare(head)
    before = clone(model)
    handle = store.save({"model": model, "optimizer": optimizer}, step=1, mode="overlapped")
    assert gate.reached.wait(60)
    gate.open_soon()
    optimizer.step()
    frozen = base.weight.nbytes + base.bias.nbytes
    assert 0 < handle.copied_bytes <= handle.raw_bytes - frozen
    base.requires_grad_(True)
    optimizer.add_param_group({"params": base.parameters()})
    prepare(model)
    optimizer.step()
    assert not torch.equal(before["0.weight"], base.weight)
    assert holds(store, handle.result().id, before)


def test_only_optimizers_can_be_fenced() -> None:
    """What wraps an optimizer steps unseen."""
    with pytest.raises(cs.StateError, match="mode='async'"):
        cs.fence(object())  # type: ignore[arg-type]


def test_an_embedding_that_renorms_itself_is_copied_at_the_call(store: cs.Store, gate: Gate) -> None:
    """Its forward pass changes the weight, so that it can't be read in place."""
    model = nn.ModuleList([nn.Embedding(64, 64, max_norm=0.1), nn.Linear(64, 64)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = clone(model)
    threading.Timer(0.2, gate.opened.set).start()
    handle = store.save({"model": model, "optimizer": optimizer}, step=1, mode="overlapped")
    model[0](torch.arange(64))
    assert not torch.equal(before["0.weight"], model[0].weight)
    assert holds(store, handle.result().id, before)


def test_the_fence_costs_nothing_while_nothing_is_read() -> None:
    """Without a save in flight the hook looks at one empty set."""
    assert not staging._open
    model, optimizer = trained()
    cs.fence(optimizer, optimizer)
    prepare(model)
    optimizer.step()
    assert not staging._open


def test_a_frozen_tensor_written_to_after_the_next_step_fails_the_save(
    store: cs.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It can't be begun again with the state of another step; training goes on, and so does the store."""
    base, head = nn.Linear(64, 64), nn.Linear(64, 64)
    base.requires_grad_(False)
    optimizer = torch.optim.AdamW(head.parameters())
    prepare(head)
    state = {"head": head, "optimizer": optimizer, "base": base}
    fill, go = PlannedFile.fill, threading.Event()

    def gated(file: PlannedFile, *arguments: Any) -> None:
        assert not file.frozen or go.wait(60)
        fill(file, *arguments)

    monkeypatch.setattr(PlannedFile, "fill", gated)
    handle = store.save(state, step=1, mode="overlapped")
    optimizer.step()
    with torch.no_grad():
        base.weight.add_(1)
    go.set()
    with pytest.raises(cs.SaveFailedError, match="frozen"):
        handle.result()
    assert store.save(state, step=2).step == 2
