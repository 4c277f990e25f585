"""``ckptstore rollback``: the old one is the latest again, and what was done is told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import ckptstore
from tests.cli.conftest import Run, data_file, flip, state


def test_goes_back(run: Run, url: str, ids: list[str]) -> None:
    answer = run("rollback", url, "best:val_loss")
    assert answer.exit_code == 0
    with ckptstore.open(url, read_only=True) as store:
        new = store.resolve("latest")
        assert torch.equal(store.load()["model"]["layers.0.weight"], state(20)["model"]["layers.0.weight"])
    assert answer.stdout.startswith(f"the latest is now {new.id} (step 20, epoch 2, val_loss 1")
    assert f"with all that {ids[1]} holds" in answer.stdout
    assert f"rollback to {ids[1]}" in run("show", url, "latest").stdout


def test_as_json(run: Run, url: str, ids: list[str]) -> None:
    answer = run("rollback", url, "step:10", "--json").json
    assert (answer["rolled_back_to"], answer["step"]) == (ids[0], 10)
    shown = run("show", url, "latest", "--json").json
    assert shown["id"] == answer["id"]
    assert 0 < answer["borrowed_bytes"] == shown["stored_bytes"]


@pytest.mark.parametrize(
    ("selector", "code"), [("latest", "exists"), ("step:77", "not_found"), ("step:10", "integrity")]
)
def test_bad_news(run: Run, url: str, ids: list[str], selector: str, code: str) -> None:
    flip(data_file(url, ids[0]), 5000)
    answer = run("rollback", url, selector, "--json")
    assert (answer.exit_code, answer.json["error"]["code"]) == (1, code)
    with ckptstore.open(url, read_only=True) as store:
        assert [c.id for c in store.checkpoints()] == ids


def test_with_a_backup(run: Run, url: str, tmp_path: Path) -> None:
    backup = tmp_path / "backup"
    answer = run("rollback", url, "step:10", "--backup", str(backup), "--json")
    assert answer.exit_code == 0
    with ckptstore.open(backup, read_only=True) as store:
        assert store.resolve("latest").id == answer.json["id"]
