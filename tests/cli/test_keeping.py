"""``ckptstore hold``, ``release``, ``delete``, ``undelete`` and ``prune``."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import ckptstore
from tests.cli.conftest import Run, data_file

UNFINISHED = "0001-000009-step90-0123456789abcdef"


def remaining(url: str) -> list[str]:
    with ckptstore.open(url, read_only=True) as store:
        return [checkpoint.id for checkpoint in store.checkpoints()]


def test_hold_and_release(run: Run, url: str, ids: list[str]) -> None:
    answer = run("hold", url, "best:val_loss", "paper")
    assert answer.exit_code == 0
    assert f"held as paper: {ids[1]} (step 20, epoch 2, val_loss 1" in answer.stdout

    answer = run("release", url, "paper")
    assert answer.exit_code == 0
    assert ids[1] in answer.stdout
    assert run("release", url, "paper").exit_code == 1
    run("hold", url, "best:val_loss", "paper")
    assert "holds here: paper; did you mean 'paper'?" in run("release", url, "papre").stderr


def test_hold_and_release_as_json(run: Run, url: str, ids: list[str]) -> None:
    assert run("hold", url, "latest", "paper", "--json").json == {"held": ids[2], "name": "paper"}
    assert run("release", url, "paper", "--json").json == {"released": "paper", "id": ids[2]}
    assert run("release", url, "paper", "--json").json["error"]["code"] == "not_found"


def test_hold_names(run: Run, url: str) -> None:
    """A taken name is bad news, one that could be a selector wrong use."""
    run("hold", url, "latest", "paper")
    assert run("hold", url, "step:10", "paper").exit_code == 1
    assert run("hold", url, "step:10", "latest").exit_code == 2
    assert run("hold", url, "step:77", "other").exit_code == 1
    assert run("release", url, "no/name").exit_code == 2


def test_a_held_checkpoint_is_not_deleted(run: Run, url: str, ids: list[str]) -> None:
    run("hold", url, "latest", "paper")

    answer = run("delete", url, "latest", "--yes", "--json")
    assert answer.exit_code == 1
    assert (answer.json["error"]["code"], answer.json["error"]["id"]) == ("exists", ids[2])
    assert answer.stderr.startswith("error: ")
    assert remaining(url) == ids


def test_delete_and_undelete(run: Run, url: str, ids: list[str]) -> None:
    answer = run("delete", url, "step:20", "--yes")
    assert answer.exit_code == 0
    assert f"ckptstore undelete {url} {ids[1]}" in answer.stdout
    assert remaining(url) == [ids[0], ids[2]]

    assert run("undelete", url, ids[1][:11]).exit_code == 0
    assert remaining(url) == ids
    answer = run("undelete", url, ids[1], "--json")
    assert (answer.exit_code, answer.json["error"]["code"]) == (1, "not_found")


def test_delete_and_undelete_as_json(run: Run, url: str, ids: list[str]) -> None:
    deleted = run("delete", url, "latest", "--yes", "--json").json
    assert (deleted["deleted"], deleted["step"]) == (ids[2], 30)
    assert run("undelete", url, ids[2], "--json").json == {"undeleted": ids[2], "step": 30}


def test_undelete_needs_to_know_which(run: Run, url: str, ids: list[str]) -> None:
    run("delete", url, ids[0], "--yes")
    run("delete", url, ids[1], "--yes")
    assert run("undelete", url, "0001").exit_code == 2


def test_delete_without_a_terminal_needs_yes(run: Run, url: str, ids: list[str]) -> None:
    answer = run("delete", url, "latest", "--json")
    assert answer.exit_code == 2
    assert "--yes" in answer.stderr
    assert answer.json["error"]["code"] == "usage"
    assert remaining(url) == ids


@pytest.mark.parametrize(("said", "exit_code"), [("y\n", 0), ("n\n", 1), ("", 130)])
def test_delete_asks_at_a_terminal(
    run: Run, url: str, ids: list[str], said: str, exit_code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The question names what goes; only a yes deletes."""
    monkeypatch.setattr("ckptstore.cli.delete._at_terminal", lambda: True)

    answer = run("delete", url, "latest", input=said)
    assert answer.exit_code == exit_code
    assert f"Delete {ids[2]} (step 30, epoch 3, val_loss 2" in answer.stderr
    assert remaining(url) == (ids[:2] if exit_code == 0 else ids)


def test_prune_reclaims_what_was_deleted(run: Run, url: str, ids: list[str]) -> None:
    run("delete", url, "step:10", "--yes")
    assert run("prune", url, "--json").json["reclaimed"] == []
    assert data_file(url, ids[0]).exists()

    # The grace is counted by the storage's clock: two days pass by turning the tombstone's time back.
    tombstone = Path(url) / "trash" / f"{ids[0]}.json"
    old = tombstone.stat().st_mtime - 2 * 24 * 3600
    os.utime(tombstone, (old, old))
    assert run("prune", url, "--grace", "3d", "--json").json["reclaimed"] == []
    answer = run("prune", url)

    assert answer.exit_code == 0
    assert f"reclaimed {ids[0]}" in answer.stdout
    assert "freed 2" in answer.stdout
    assert not data_file(url, ids[0]).exists()
    assert remaining(url) == ids[1:]


def test_prune_collects_leftovers_after_the_grace(run: Run, url: str, ids: list[str]) -> None:
    left = Path(url) / "checkpoints" / UNFINISHED / "model.safetensors"
    left.parent.mkdir()
    left.write_bytes(b"half")

    report = run("prune", url, "--json").json
    assert (report["spared"], report["leftovers"]) == ([UNFINISHED], [])
    assert "may still be running" in run("prune", url).stdout
    report = run("prune", url, "--grace", "0s", "--json").json
    nothing = {"dry_run": False, "retired": [], "reclaimed": [], "spared": [], "uploads": []}
    assert report == nothing | {"leftovers": [UNFINISHED], "freed_bytes": 4}
    assert not left.exists()
    assert remaining(url) == ids


def test_prune_refuses_bare_numbers(run: Run, url: str) -> None:
    for text in ("10", "h", "-1h", "1w", ""):
        answer = run("prune", url, f"--grace={text}")
        assert (answer.exit_code, "as 90s, 10m, 24h or 7d" in answer.stderr) == (2, True)


@pytest.fixture
def ten(tmp_path: Path) -> str:
    """A store with ten checkpoints, of which the third is held."""
    with ckptstore.open(tmp_path / "ten") as store:
        for step in range(1, 11):
            store.save({"x": step}, step=step)
        store.hold("step:3", "paper")
    return str(tmp_path / "ten")


def test_prune_tells_which_rule_keeps_what(run: Run, ten: str) -> None:
    done = run("prune", ten, "--keep", "last(6)", "--dry-run")
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert lines[0].startswith("goes   step 1        not kept by last(6)")
    assert lines[2].startswith("stays  step 3        held as paper")
    assert lines[9].startswith("stays  step 10       one of the newest 6")
    assert lines[10].startswith("3 of 10 would be deleted")
    assert len(ckptstore.open(ten).checkpoints()) == 10

    fields = run("prune", ten, "--keep", "last(6)", "--dry-run", "--json").json
    assert fields["dry_run"]
    assert [one["step"] for one in fields["checkpoints"] if not one["stays"]] == [1, 2, 4]
    assert fields["needs_force"] is None


def test_prune_by_rules_can_be_undone(run: Run, ten: str) -> None:
    assert "deleted" in run("prune", ten, "--keep", "last(6)").stdout
    assert [c.step for c in ckptstore.open(ten).checkpoints()] == [3, 5, 6, 7, 8, 9, 10]
    assert run("undelete", ten, "step:1").exit_code == 0
    assert ckptstore.open(ten).load("step:1") == {"x": 1}


def test_prune_of_very_many_needs_force(run: Run, ten: str) -> None:
    done = run("prune", ten, "--keep", "last(1)")
    assert done.exit_code == 2
    assert "8 of 10 checkpoints would go at once" in done.stderr
    assert "--force" in done.stderr
    assert len(ckptstore.open(ten).checkpoints()) == 10
    assert run("prune", ten, "--keep", "last(1)", "--force").exit_code == 0
    assert [c.step for c in ckptstore.open(ten).checkpoints()] == [3, 10]


def test_prune_by_a_config(run: Run, ten: str, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("storage: x\nkeep: last(6)\n")
    assert run("prune", ten, "--config", str(config)).exit_code == 0
    assert len(ckptstore.open(ten).checkpoints()) == 7
    config.write_text("storage: x\n")
    assert "doesn't say what stays" in run("prune", ten, "--config", str(config)).stderr
    assert run("prune", ten, "--config", str(config), "--keep", "last(1)").exit_code == 2
    assert "did you mean last?" in run("prune", ten, "--keep", "lst(1)").stderr
