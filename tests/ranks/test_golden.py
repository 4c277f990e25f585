"""A store that three ranks wrote when several could for the first time goes on loading, on any number of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import ckptstore as cs
from tests.ranks.golden import PLACE, SIZE, state
from tests.ranks.models import plain


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    """A copy, as a person makes one."""
    return Path(shutil.copytree(PLACE, tmp_path / "copy"))


def test_verifies(golden: Path) -> None:
    report = cs.open(golden, read_only=True).verify()
    assert report.ok
    assert (len(report.checkpoints), report.leftovers, report.foreign) == (1, [], [])


def test_loads_as_it_was(golden: Path) -> None:
    store = cs.open(golden, read_only=True)
    saved = store.resolve("best:loss")
    assert (saved.step, saved.world_size) == (1, SIZE)
    expected = state(0, plain())
    for rank in range(SIZE):
        loaded = store.load(rank=rank)
        assert loaded["own"]["x"].tolist() == [float(rank)] * 3
        assert loaded["own"]["rank"] == rank
        assert torch.equal(loaded["all"], torch.arange(4.0))
    for name, value in expected["model"].state_dict().items():
        assert torch.equal(store.load()["model"][name], value), name
    target = state(0, plain(seed=3))
    store.load(into=target)
    for name, value in expected["model"].state_dict().items():
        assert torch.equal(target["model"].state_dict()[name], value), name
    momentum = [s["momentum_buffer"] for s in target["optimizer"].state.values()]
    assert all(torch.equal(each, torch.ones_like(each)) for each in momentum)


def test_goes_on(golden: Path) -> None:
    with cs.open(golden) as store:
        assert store.save({"x": 1}, step=2).step == 2
        assert store.verify().ok
