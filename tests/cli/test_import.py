"""``ckptstore import``: what it says, and how it ends."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import ckptstore
from tests.cli.conftest import Run
from tests.tools.foreign import Foreign

pytestmark = pytest.mark.usefixtures("sandbox")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "old"
    folder.mkdir()
    for step in (9, 10):
        torch.save({"w": torch.full((4,), step), "step": step, "epoch": 1, "val_loss": 0.5}, folder / f"{step}.pt")
    return folder


def test_a_run(run: Run, source: Path, store_path: Path) -> None:
    """First a look, then the import, then nothing that is new."""
    answer = run("import", source, store_path, "--dry-run")
    assert answer.exit_code == 0
    first, second, summary = answer.stdout.splitlines()
    assert first == f"would import {source / '9.pt'} (torch; step 9, epoch 1, val_loss 0.5)"
    assert second.startswith(f"would import {source / '10.pt'} (torch; step 10")
    assert summary.startswith("good: 2 checkpoints would be imported, ")
    assert not store_path.exists()

    answer = run("import", source, store_path, "--json")
    assert answer.exit_code == 0
    assert answer.json["ok"]
    found = [(one["step"], one["epoch"], one["was_there"], one["error"]) for one in answer.json["checkpoints"]]
    assert found == [(9, 1, False, None), (10, 1, False, None)]
    with ckptstore.open(store_path, read_only=True) as store:
        assert [one.id for one in store.checkpoints()] == [one["id"] for one in answer.json["checkpoints"]]
    answer = run("import", source, store_path)
    assert "was there" in answer.stdout
    assert "0 checkpoints imported, 2 there already" in answer.stdout


def test_what_is_wrong(run: Run, source: Path, store_path: Path) -> None:
    """A broken one among others is 1; one that needs code, or tells no step, is 2, with the way out."""
    (source / "11.pt").write_bytes((source / "10.pt").read_bytes()[:-100])
    answer = run("import", source, store_path)
    assert answer.exit_code == 1
    assert f"NOT IMPORTED {source / '11.pt'}" in answer.stdout
    assert "2 checkpoints imported, 1 not imported" in answer.stdout
    answer = run("import", source, store_path, "--json")
    assert (answer.exit_code, answer.json["ok"]) == (1, False)
    assert [one["error"]["code"] for one in answer.json["checkpoints"] if one["error"]] == ["integrity"]

    torch.save({"w": torch.ones(2), "config": Foreign()}, source.parent / "a.pt")
    answer = run("import", source.parent / "a.pt", store_path)
    assert answer.exit_code == 2
    assert "tests.tools.foreign.Foreign" in answer.stderr
    assert "--without-refused" in answer.stderr
    answer = run("import", source.parent / "a.pt", store_path, "--without-refused")
    assert answer.exit_code == 2
    assert "--step" in answer.stderr
    given = ("--step", "4", "--epoch", "2", "--metric", "acc=.5", "--only", "w")
    answer = run("import", source.parent / "a.pt", store_path, "--without-refused", *given)
    assert answer.exit_code == 0
    assert "  without config: is an object of tests.tools.foreign.Foreign" in answer.stdout
    assert "step 4, epoch 2, acc 0.5" in answer.stdout
    assert run("import", source.parent / "gone.pt", store_path).exit_code == 1
    for bad in (("--metric", "acc"), ("--metric", "acc=x"), ("--step", "-1"), ("--step", "x")):
        assert run("import", source, store_path, *bad).exit_code == 2
