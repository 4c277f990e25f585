"""What people ask of checkpoints beyond saving and loading, all in one run: each with the others, none in their way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import ckptstore as cs
from ckptstore.integrations.apprise import Notifier
from tests.integrations.test_apprise import Service, service

__all__ = ["service"]

pytestmark = pytest.mark.filterwarnings("ignore:'imghdr' is deprecated:DeprecationWarning")


def train(place: Path, backup: Path, notifier: Notifier) -> None:
    """Saved behind training, compressed, copied elsewhere and told of."""
    torch.manual_seed(0)
    model = torch.nn.Linear(64, 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with cs.Checkpointer(
        place,
        {"model": model, "optimizer": optimizer},
        save=cs.every(steps=2) | cs.on_best("val_loss"),
        mode="async",
        compression="float-zstd",
        backup=backup,
        listeners=[notifier],
        verbose=False,
    ) as ckpt:
        ckpt.resume()
        for step in range(6):
            loss = model(torch.ones(4, 64)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ckpt.step(loss=loss)
            ckpt.report(val_loss=1.0 / (step + 1))


def test_async_compressed_backed_up_told_verified_merged(tmp_path: Path, service: Service) -> None:
    train(tmp_path / "run", tmp_path / "backup", Notifier(service.url(), on=("saved", "best", "closed"), wait="60s"))
    assert "ckptstore: the run has ended" in service.titles
    assert any(title.startswith("ckptstore: best so far") for title in service.titles)
    with cs.open(tmp_path / "run", backup=tmp_path / "backup") as store:
        saved = store.checkpoints()
        assert all(c.stored_bytes < c.raw_bytes for c in saved)
        assert store.verify().ok
        assert [lag.behind for lag in store.lags()] == [0]
        merged = cs.average(store, last=3, target=tmp_path / "merged")
        parents = [store.load(c.id, only=["model/weight"])["model"]["weight"] for c in saved[-3:]]
    with cs.open(tmp_path / "backup", read_only=True) as copy:
        assert [c.id for c in copy.checkpoints()] == [c.id for c in saved]
        assert copy.verify().ok
    assert all(c.id in merged.reasons[0] for c in saved[-3:])
    with cs.open(tmp_path / "merged", read_only=True) as store:
        weight = store.load("latest")["model"]["weight"]
    assert torch.allclose(weight, torch.stack([parent.detach() for parent in parents]).mean(0))
