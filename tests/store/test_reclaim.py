"""Deleting for good."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import ckptstore as cs


def test_deleting_for_good(store_path: Path) -> None:
    """The files go at once, but for those that others borrow; nothing brings it back."""
    with cs.open(store_path) as store:
        model = torch.nn.Linear(300, 300).requires_grad_(False)
        first, second = (store.save({"model": model, "x": torch.full((9,), step)}, step=step) for step in (1, 2))
        assert second.lenders == [first.id]
        folder = store_path / "checkpoints" / first.id
        before = {file.name for file in folder.iterdir()}
        store.delete(first.id, reclaim=True)
        assert {file.name for file in folder.iterdir()} < before
        with pytest.raises(cs.NotFoundError):
            store.undelete(first.id)
        assert store.load("latest")["model"]["weight"].equal(model.weight)
        assert store.verify().ok
        store.delete(second.id, reclaim=True)
        assert not list((store_path / "commits").glob("*"))
        store.prune(grace_s=0)
        assert not folder.exists()
