"""``ckptstore diff``."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

import ckptstore
from ckptstore.cli.diffmap import draw
from ckptstore.tools.diffmap import Cell, Map
from tests.cli.conftest import Run, data_file, flip, state


def test_what_changed_stands_first(run: Run, url: str, ids: list[str]) -> None:
    answer = run("diff", url, "step:10", "latest")

    assert (answer.exit_code, answer.stderr) == (0, "")
    lines = answer.stdout.splitlines()
    assert lines[0].startswith(f"before  {ids[0]} (step 10")
    assert lines[1].startswith(f"after   {ids[2]} (step 30")
    assert [line.split() for line in lines if line.startswith("model/")] == [
        ["model/layers.0.weight", "changed", "F32[64,", "64]", "2", "100", "%", "20"]
    ]
    assert lines[-1].startswith("different: of 3 tensors 1 changed; 0 values; ")


def other(place: Path) -> str:
    """A store whose state has another structure."""
    with ckptstore.open(place, compression="zstd") as store:
        changed = state(30)
        changed["model"]["new"] = changed["model"].pop("layers.0.bias")
        changed["model"]["head.weight"] = changed["model"]["head.weight"].float()
        changed["plain"] |= {"lr": 0.1, "more": "\x1b[31mred"}
        store.save(changed, step=31)
    return str(place)


def test_two_stores_as_json(run: Run, url: str, tmp_path: Path) -> None:
    found = run("diff", url, "latest", "latest", "--with", other(tmp_path / "other"), "--json").json
    assert found["equal"] is False
    assert [(it["name"], it["kind"]) for it in found["tensors"]] == [
        ("model/layers.0.bias", "removed"),
        ("model/new", "added"),
        ("model/head.weight", "cast"),
    ]
    assert found["tensors"][2]["before"] == {"dtype": "BF16", "shape": [8, 64]}
    assert found["values"] == [
        {"path": "plain/more", "kind": "added", "before": None, "after": "\x1b[31mred"},
        {"path": "plain/lr", "kind": "changed", "before": 0.001, "after": 0.1},
    ]
    assert (found["before"]["step"], found["after"]["step"], found["compared"]) == (30, 31, 4)


def test_tables_of_two_stores(run: Run, url: str, tmp_path: Path) -> None:
    answer = run("diff", url, "latest", "latest", "--with", other(tmp_path / "other"), "--limit", "2", "--map")
    assert "removed F32[64]" in answer.stdout
    assert "… and 1 more (--limit, --json)" in answer.stdout
    assert "plain/lr" in answer.stdout
    assert "\x1b" not in answer.stdout
    assert "different: of 4 tensors 1 removed, 1 added, 1 cast; 2 values; " in answer.stdout
    lines = answer.stdout.splitlines()
    # Columns: bias, new, weight.
    assert [line.split() for line in lines if line.startswith(("layers.0 ", "head "))] == [
        ["head", "~"],
        ["layers.0", "-", "·"],
    ]


def test_exit_code_tells_whether_they_differ(run: Run, url: str) -> None:
    assert run("diff", url, "step:10", "step:20", "--exit-code").exit_code == 1
    same = run("diff", url, "latest", "step:30", "--exit-code")
    assert (same.exit_code, same.stdout.splitlines()[-1]) == (0, "equal: 3 tensors, bit by bit; 0 B read")
    assert run("diff", url, "step:10", "step:20", "--only", "plain", "--only", "*bias", "--exit-code").exit_code == 0


def test_a_picture(run: Run, url: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "map.svg"
    assert run("diff", url, "step:10", "step:20", "--picture", str(path)).exit_code == 0
    assert "layers.0" in path.read_text()
    wrong = run("diff", url, "step:10", "step:20", "--picture", "map.gif")
    assert (wrong.exit_code, "must end in .svg or .png" in wrong.stderr) == (2, True)
    nowhere = run("diff", url, "step:10", "step:20", "--picture", str(tmp_path / "no" / "map.svg"))
    assert (nowhere.exit_code, "can't be written" in nowhere.stderr) == (2, True)


def test_bad_news(run: Run, url: str, ids: list[str], tmp_path: Path) -> None:
    assert run("diff", url, "latest", "step:7").exit_code == 1
    assert run("diff", url, "latest", "latest", "--with", str(tmp_path / "nothing")).exit_code == 2
    assert "matches nothing" in run("diff", url, "latest", "latest", "--only", "zzz").stderr
    path = data_file(url, ids[1])
    flip(path, path.stat().st_size - 1)
    answer = run("diff", url, "latest", "step:20", "--json")
    assert (answer.exit_code, answer.json["error"]["id"]) == (1, ids[1])


def test_a_map_is_cut_where_the_terminal_ends() -> None:
    """Into strips, each of which names its layers and its kinds."""
    kinds = [f"k{number}" for number in range(1, 13)]
    cells = {(layer, kind): Cell("changed", 0.5) for layer in ("h.0", "h.1") for kind in kinds}
    console = Console(width=40, no_color=True)
    with console.capture() as captured:
        for part in draw(Map(["h.0", "h.1"], kinds, cells), 3 + 5 * 3):
            console.print(part)
    lines = [line.rstrip() for line in captured.get().splitlines()]
    assert lines[:4] == ["     1  2  3  4  5", "h.0" + 5 * " ██", "h.1" + 5 * " ██", ""]
    assert lines[8:12] == ["    11 12", "h.0 ██ ██", "h.1 ██ ██", ""]
    assert lines[12:24] == [f"{number:>2}  k{number}" for number in range(1, 13)]
