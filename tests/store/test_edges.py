"""What is rare and must be right all the same: limits, signals, scarce memory, clocks, states with loops."""

from __future__ import annotations

import os
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ckptstore as cs
from ckptstore.engine import saver


@pytest.fixture
def store(tmp_path: Path) -> cs.Store:
    return cs.open(tmp_path / "store")


def folder(store: cs.Store) -> Path:
    return Path(store.url.removeprefix("file://"))


def test_plain_data_too_large_to_be_loaded_is_not_acknowledged(
    store: cs.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A save whose part a reader would refuse fails, leaves nothing, and the next one succeeds."""
    store.save({"x": 1}, step=1)
    monkeypatch.setattr(saver, "PART_LIMIT", 10_000)
    with pytest.raises(cs.StateError, match="10000 can be loaded again"):
        store.save({"w": torch.ones(3), "text": "x" * 10_001}, step=2)
    assert [c.step for c in store.checkpoints()] == [1]
    assert not store.verify().leftovers
    assert store.save({"x": 2}, step=2).step == 2


def test_a_signal_handler_saves_in_the_midst_of_a_save(store: cs.Store) -> None:
    """A handler that saves while its own thread saves doesn't wait for itself; both checkpoints are good."""
    inner: list[int] = []

    def handler(*_: object) -> None:
        inner.append(store.save({"w": torch.ones(3)}, step=2).step)

    def interrupt(done: int, total: int) -> None:
        if not inner:
            signal.raise_signal(signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        outer = store.save({"w": torch.ones(40 << 20, dtype=torch.uint8)}, step=1, progress=interrupt)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert (outer.step, inner[0]) == (1, 2)
    assert sorted(c.step for c in store.checkpoints()) == sorted([1, *inner])
    assert store.verify().ok


def test_lack_of_memory_is_no_damage(store: cs.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """latest doesn't go back to an older checkpoint because the newest doesn't fit into memory now."""
    store.save({"w": torch.ones(3)}, step=1)
    store.save({"w": torch.ones(1 << 10)}, step=2)
    empty, refused = torch.empty, []

    def scarce(shape: Any, **options: Any) -> torch.Tensor:
        if shape != (3,):
            refused.append(shape)
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes.")
        return empty(shape, **options)

    with monkeypatch.context() as patch, warnings.catch_warnings():
        patch.setattr(torch, "empty", scarce)
        warnings.simplefilter("error")
        with pytest.raises(cs.StateError, match="no memory for the 4096 bytes of 'w'"):
            store.load()
    assert refused
    assert store.load()["w"].shape == (1 << 10,)


def test_an_inference_tensor_is_a_misfit_and_no_damage(store: cs.Store) -> None:
    """A target that torch lets nobody write to is named before anything changes; inside of the mode it is restored."""
    store.save({"v": torch.ones(4), "w": torch.ones(4, 4)}, step=1)
    with torch.inference_mode():
        target = {"v": torch.zeros(4), "w": torch.zeros(4, 8)[:, ::2]}
    with pytest.raises(cs.StateError, match=r"w: .*inference tensor"):
        store.load(into=target)
    assert not target["v"].any()
    with torch.inference_mode():
        store.load(into=target)
        assert target["w"].all()


def test_a_file_from_the_future_ends_no_grace(store: cs.Store) -> None:
    """A foreign file with a wrong time doesn't make prune reclaim what was deleted just now."""
    store.save({"w": 1}, step=1)
    store.save({"w": 2}, step=2)
    stranger = folder(store) / "notes.txt"
    stranger.touch()
    os.utime(stranger, (time.time() + 1e6,) * 2)
    deleted = store.delete("step:1")
    assert not store.prune().reclaimed
    assert store.undelete(deleted.id).id == deleted.id


def test_an_optimizer_that_lists_a_parameter_twice_is_restored(store: cs.Store) -> None:
    """Two heads that share a trunk: what was acknowledged can be loaded, in place and as plain values."""

    def make() -> dict[str, Any]:
        trunk = nn.Linear(4, 4)
        actor, critic = nn.Sequential(trunk, nn.Linear(4, 2)), nn.Sequential(trunk, nn.Linear(4, 1))
        with pytest.warns(UserWarning, match="duplicate parameters"):
            optimizer = torch.optim.SGD([*actor.parameters(), *critic.parameters()], 0.1, momentum=0.9)
        return {"actor": actor, "critic": critic, "optimizer": optimizer}

    state, target = make(), make()
    x = torch.ones(1, 4)
    (state["actor"](x).sum() + state["critic"](x).sum()).backward()
    state["optimizer"].step()
    store.save(state, step=1)
    store.load(into=target)
    for mine, other in zip(state["optimizer"].param_groups, target["optimizer"].param_groups, strict=True):
        for one, two in zip(mine["params"], other["params"], strict=True):
            momenta = state["optimizer"].state[one], target["optimizer"].state[two]
            assert torch.equal(momenta[0]["momentum_buffer"], momenta[1]["momentum_buffer"])
            assert torch.equal(one, two)
    names = store.load()["optimizer"]["groups"][0]["params"]
    assert len(set(names)) == len(names) == 8
