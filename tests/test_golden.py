"""Stores written by every released format go on loading, read-only."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ckptstore as cs
from ckptstore.engine.catalogue import Timing
from ckptstore.format.records import CommitRecord, seal, unseal
from tests.golden.make import HERE, exponents, plain_state, trained, tuned

STORES = sorted(path for path in HERE.iterdir() if path.is_dir() and path.name.startswith("v"))


def same(left: Any, right: Any) -> bool:
    """Equal in value and type, down to tensors and arrays."""
    if type(left) is not type(right):
        return False
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left.to(torch.complex128), right.to(torch.complex128))
    if isinstance(left, np.ndarray):
        return left.dtype == right.dtype and np.array_equal(left, right)
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


@pytest.fixture(params=STORES, ids=lambda path: path.name)
def golden(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy, as a person makes one."""
    return Path(shutil.copytree(request.param, tmp_path / "copy"))


def test_there_is_one_for_this_format() -> None:
    """The current format has its golden store."""
    assert [path.name for path in STORES] == ["v1"]


def test_verifies(golden: Path) -> None:
    """Every byte is good, and nothing lies there that isn't known."""
    report = cs.open(golden, read_only=True).verify()
    assert report.ok
    assert (len(report.checkpoints), report.leftovers, report.foreign) == (5, [], [])


def test_loads_as_it_was(golden: Path) -> None:
    """Plain values, tensors, modules and optimizers come back exactly."""
    store = cs.open(golden, read_only=True)
    assert [(c.step, c.epoch, dict(c.metrics)) for c in store.checkpoints()] == [
        (0, 0, {"val_loss": 3.0}),
        (2, 1, {"val_loss": 1.0}),
        (3, None, {}),
        (4, None, {}),
        (5, None, {}),
    ]
    assert store.resolve("best:val_loss") == store.resolve("release") == store.resolve("step:2")
    for step in (0, 2):
        assert same(store.load(f"step:{step}", only=["plain/*"])["plain"], plain_state(step))
        model, optimizer = trained(0)
        store.load(f"step:{step}", into={"model": model, "optimizer": optimizer}, only=["model/*", "optimizer/*"])
        expected, reference = trained(step)
        assert same(model.state_dict(), expected.state_dict())
        assert same(optimizer.state_dict(), reference.state_dict())
    assert store.load("step:3")["zeros"].tolist() == [0.0] * 5000
    for step in (4, 5):
        loaded = store.load(f"step:{step}")
        assert same(loaded["values"], exponents())
        assert same(loaded["model"], dict(tuned().state_dict()))
    assert store.resolve("step:5").record.lenders == [store.resolve("step:4").id]
    codecs = {b.codec for file in store.contents(store.resolve("step:4")).files for b in file.entry.blocks}
    assert "float-zstd" in codecs


def test_goes_on(golden: Path) -> None:
    """A new save stands after the old ones, and a deleted one comes back."""
    store = cs.open(golden)
    store.undelete("step:9")
    store.save({"x": 1}, step=1)
    assert [c.step for c in store.checkpoints()] == [0, 2, 9, 3, 4, 5, 1]
    assert store.verify().ok


def test_records_of_the_first_version_are_written_alike() -> None:
    """What came later stands in a record only where it is known."""
    for path in sorted((HERE / "v1" / "commits").iterdir()):
        assert seal(unseal(path.read_bytes(), path.name, [CommitRecord])) == path.read_bytes()


def test_times_and_verifications_stay() -> None:
    """How long the saves took, and what a verification found, as version 1 puts it down since it does."""
    store = cs.open(HERE / "timed1", read_only=True)
    assert [(c.step, c.timing) for c in store.checkpoints()] == [
        (1, Timing(0.062548, 0.062548)),
        (2, Timing(0.004936, 0.004936)),
        (1, Timing(0.005404, None)),
    ]
    (found,) = store.verifications()
    assert (found.created, found.by, found.id) == (datetime(2026, 11, 26, 4, 7, 31, 324062, UTC), "verify", None)
    assert (found.ok, found.checkpoints, found.read_bytes, found.seconds) == (True, 3, 8220, 0.008)
    report = store.verify()
    assert (report.ok, report.foreign, report.leftovers) == (True, [], [])
    for step in (1, 2):
        assert torch.equal(store.load(f"step:{step}")["weights"], torch.arange(2.0 + step))
