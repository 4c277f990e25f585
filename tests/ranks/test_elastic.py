"""Saved by some ranks, loaded by others, sharded otherwise: the same numbers, and training goes on as it would have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

import ckptstore as cs
from tests.ranks.models import spread, train, weights
from tests.ranks.processes import run

SAVED = [("ddp", 4), ("fsdp", 4), ("tp", 2), ("hsdp", 4), ("fsdp+tp", 4), ("fsdp", 3), ("plain", 1)]
LOADED = [("fsdp", 4), ("fsdp", 3), ("fsdp+tp", 4), ("ddp", 2), ("tp", 2), ("plain", 1)]
SAMPLE = [("plain", 1), ("ddp", 2), ("fsdp", 4), ("fsdp", 3), ("tp", 2), ("fsdp+tp", 4), ("fsdp", 4)]
"""By what each of ``SAVED`` is loaded, unless all are wanted."""
STEPS = 3


def _optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.1)


def _state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"model": model, "optimizer": optimizer, "rng": cs.RNG(), "note": {"lr": 0.1, "names": ["a", "b"]}}


def save(url: str, kind: str, mode: str) -> tuple[dict[str, torch.Tensor], list[float], int]:
    model = spread(kind)
    optimizer = _optimizer(model)
    train(model, optimizer, 0, STEPS)
    torch.manual_seed(distributed.get_rank())
    with cs.open(url) as store:
        saved: Any = store.save(_state(model, optimizer), step=STEPS, metrics={"loss": 0.5}, mode=mode)  # type: ignore[call-overload]
        if mode != "sync":
            saved = saved.result()
        assert saved.step == STEPS
        assert saved.metrics == {"loss": 0.5}
    whole = weights(model)
    return whole, train(model, optimizer, STEPS, 2 * STEPS), torch.randint(2**62, ()).item()


def load(url: str, kind: str) -> tuple[dict[str, torch.Tensor], list[float], int]:
    model = spread(kind, seed=7)
    optimizer = _optimizer(model)
    state = _state(model, optimizer)
    state["note"] = {"lr": 0.0, "names": ["a"]}
    with cs.open(url, read_only=True) as store:
        loaded = store.load(into=state)
        size = distributed.get_world_size()
        alike = loaded.checkpoint.world_size == size
        differences = (loaded.missing, loaded.unexpected, loaded.mismatched, loaded.cast)
        assert not any(differences), differences
        if alike:
            # Every bit of every shard is what was saved.
            assert store.compare(loaded.checkpoint.id, state) == []
    assert state["note"] == {"lr": 0.1, "names": ["a", "b"]}
    drawn = torch.randint(2**62, ()).item()
    whole = weights(model)
    return whole, train(model, optimizer, STEPS, 2 * STEPS), drawn


@pytest.mark.parametrize("saved", SAVED, ids=lambda case: f"{case[0]}-{case[1]}")
def test_any_number_of_ranks_goes_on(saved: tuple[str, int], tmp_path: Path, full: bool) -> None:
    kind, size = saved
    number = SAVED.index(saved)
    mode = ("sync", "async", "overlapped")[number % 3]
    before = run(size, save, str(tmp_path), kind, mode)
    losses = before[0][1]
    cases = LOADED if full else [SAMPLE[number]]
    for other, ranks in cases:
        after = run(ranks, load, str(tmp_path), other)
        for rank, (found, again, _) in enumerate(after):
            for name, value in before[0][0].items():
                assert torch.equal(found[name], value), f"{name} on rank {rank} of {ranks}, {other}"
            assert again == pytest.approx(losses, rel=1e-5), (other, ranks)
        drawn = [one[2] for one in after]
        assert len(set(drawn)) == ranks, "two ranks draw the same random numbers"
        old = min(ranks, size)
        assert drawn[:old] == [one[2] for one in before[:old]], "whoever was there goes on with its own"
    with cs.open(tmp_path, read_only=True) as store:
        assert store.verify().ok
        assert store.resolve().world_size == size
        _check_plain_load(store, before[0][0])


def _check_plain_load(store: cs.Store, expected: dict[str, torch.Tensor]) -> None:
    """A single process that only looks gets whole tensors, and what each rank had of its own."""
    state = store.load()
    for name, value in expected.items():
        assert torch.equal(state["model"][name], value), name
    assert state["optimizer"]["state"]["model/0.weight"]["exp_avg"].shape == (8, 6)
    only = store.load(only=["model/2.*"])
    assert only["model"].keys() == {"2.weight", "2.bias"}
