"""``ckptstore verify``."""

from __future__ import annotations

from pathlib import Path

import torch

import ckptstore
from tests.cli.conftest import Run, data_file, flip

UNFINISHED = "0001-000009-step90-0123456789abcdef"


def test_a_good_store(run: Run, url: str, ids: list[str]) -> None:
    answer = run("verify", url)

    assert (answer.exit_code, answer.stderr) == (0, "")
    assert len(answer.stdout.splitlines()) == 1
    assert answer.stdout.startswith("good: 3 checkpoints, ")
    assert "B/s" in answer.stdout


def test_json_shape(run: Run, url: str, ids: list[str]) -> None:
    report = run("verify", url, "--json").json

    assert set(report) == {
        *("url", "ok", "checkpoints", "records", "leftovers", "foreign", "sample", "read_bytes", "seconds"),
        "repaired",
    }
    assert report["ok"] is True
    assert [c["id"] for c in report["checkpoints"]] == ids
    assert all(c["ok"] and c["damages"] == [] for c in report["checkpoints"])
    assert report["read_bytes"] == sum(c["read_bytes"] for c in report["checkpoints"]) > 0


def test_damage_names_block_file_and_tensors(run: Run, url: str, ids: list[str]) -> None:
    """A person learns what is lost; a script gets the same as fields."""
    path = data_file(url, ids[1])
    flip(path, path.stat().st_size - 1)

    answer = run("verify", url)
    assert answer.exit_code == 1
    damaged, tensors, way_out, summary = answer.stdout.splitlines()
    assert damaged == f"DAMAGED block 0 of checkpoints/{ids[1]}/model.safetensors has other bytes than were saved"
    assert tensors == "  with model/layers.0.bias, model/layers.0.weight, model/head.weight"
    assert way_out.endswith(f": ckptstore delete {url} {ids[1]}")
    assert summary.startswith("DAMAGED: 3 checkpoints, 1 damaged, ")

    report = run("verify", url, "--json")
    assert report.exit_code == 1
    (damage,) = report.json["checkpoints"][1]["damages"]
    assert (damage["id"], damage["block"]) == (ids[1], 0)
    assert "model/head.weight" in damage["tensors"]
    assert report.json["ok"] is False


def test_a_block_of_many_tensors_takes_two_lines(run: Run, store_path: Path) -> None:
    """Some names say where the damage is; the document for scripts has all."""
    with ckptstore.open(store_path) as store:
        saved = store.save({"model": {f"layers.{number:02}": torch.zeros(4) for number in range(60)}}, step=1)
    path = data_file(str(store_path), saved.id)
    flip(path, path.stat().st_size - 1)

    damaged, tensors = run("verify", store_path).stdout.splitlines()[:2]
    assert damaged.count(saved.id) == 1
    assert tensors == "  with model/layers.00, model/layers.01, model/layers.02 and 57 more (--json names all)"
    (damage,) = run("verify", store_path, "--json").json["checkpoints"][0]["damages"]
    assert len(damage["tensors"]) == 60


def test_a_missing_file_is_named_once(run: Run, url: str, ids: list[str]) -> None:
    path = data_file(url, ids[0])
    path.unlink()

    first = run("verify", url).stdout.splitlines()[0]
    assert first == f"DAMAGED checkpoints/{ids[0]}/model.safetensors is missing"


def test_one_checkpoint_only(run: Run, url: str, ids: list[str]) -> None:
    """Damage elsewhere doesn't matter for the one that was asked for."""
    flip(data_file(url, ids[0]), 5000)

    assert run("verify", url, "latest").exit_code == 0
    assert run("verify", url, "step:10").exit_code == 1
    assert run("verify", url, "step:77").exit_code == 1


def test_damaged_records_are_damage(run: Run, url: str, ids: list[str]) -> None:
    flip(Path(url) / "commits" / f"{ids[2]}.json", 40)

    answer = run("verify", url, "--json")
    assert answer.exit_code == 1
    assert [damage["key"] for damage in answer.json["records"]] == [f"commits/{ids[2]}.json"]
    assert "1 damaged record" in run("verify", url).stdout


def test_leftovers_and_foreign_objects_are_no_damage(run: Run, url: str) -> None:
    """What a killed save left is named with the command that collects it."""
    left = Path(url) / "checkpoints" / UNFINISHED / "model.safetensors"
    left.parent.mkdir()
    left.write_bytes(b"half")
    (Path(url) / "notes.txt").write_text("mine")

    answer = run("verify", url)
    assert answer.exit_code == 0
    assert f"unfinished: {UNFINISHED} (1 object, 4 B)" in answer.stdout
    assert f"ckptstore prune {url}" in answer.stdout
    assert "notes.txt" in answer.stdout
    report = run("verify", url, "--json").json
    assert [(it["id"], it["stored_bytes"]) for it in report["leftovers"]] == [(UNFINISHED, 4)]
    assert report["foreign"] == ["notes.txt"]


def test_sample(run: Run, url: str) -> None:
    for text in ("10%", "0.1"):
        answer = run("verify", url, "--sample", text, "--json")
        assert (answer.exit_code, answer.json["sample"]) == (0, 0.1)
    assert "a sample of 0.1" in run("verify", url, "--sample", "10%").stdout
    for text in ("0", "0%", "101%", "1.5", "-1", "x", "nan"):
        assert run("verify", url, f"--sample={text}").exit_code == 2


def test_nothing_is_put_down_but_what_came_of_it(run: Run, url: str, ids: list[str]) -> None:
    """A record in a folder of its own, or with --no-record not even that."""

    def listing() -> dict[str, float]:
        return {str(path): path.stat().st_mtime_ns for path in Path(url).rglob("*")}

    before = listing()
    run("verify", url, "--no-record")
    assert listing() == before
    run("verify", url, "step:10")
    new = [Path(path).relative_to(url) for path in sorted(listing().keys() - before.keys())]
    assert [path.parts[0] for path in new] == ["verifications", "verifications"]
    with ckptstore.open(url, read_only=True) as store:
        (found,) = store.verifications()
    assert (found.ok, found.id, found.by) == (True, ids[0], "verify")
    assert run("verify", url, "--json").json["foreign"] == []


def test_where_nothing_can_be_put_down_it_is_no_error(run: Run, url: str) -> None:
    """As on a file system that is mounted to be read only."""
    (Path(url) / "verifications").write_bytes(b"no folder")

    answer = run("verify", url)
    assert (answer.exit_code, answer.stderr) == (0, "")
    assert "not ckptstore's, left alone: verifications" in answer.stdout


def test_nothing_is_put_down_where_a_store_is_lost(run: Run, url: str, tmp_path: Path) -> None:
    """A backup that stands in for it is read, and verified by itself."""
    lost = tmp_path / "lost"
    assert run("verify", lost, "--backup", url).exit_code == 0
    assert not lost.exists()
    assert not (Path(url) / "verifications").exists()
