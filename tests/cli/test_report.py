"""``ckptstore report``: where the page goes, what is said about it, and the answer for scripts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import ckptstore
from ckptstore.tools.report import MARK
from tests.cli.conftest import Run, process


def test_a_page_is_written_and_said_where(run: Run, url: str, ids: list[str], tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    answer = run("report", url, "-o", str(path))

    assert (answer.exit_code, answer.stdout) == (0, "")
    assert answer.stderr.startswith(f"the report went into {path} (3 checkpoints, ")
    text = path.read_text()
    assert MARK in text
    assert all(id in text for id in ids)


def test_a_dash_is_stdout(run: Run, url: str, tmp_path: Path) -> None:
    answer = run("report", url, "-o", "-")

    assert answer.exit_code == 0
    assert answer.stdout.startswith("<!doctype html>")
    assert answer.stdout.rstrip().endswith("</html>")
    assert answer.stderr == ""


def test_json_is_what_the_page_shows(run: Run, url: str, ids: list[str], tmp_path: Path) -> None:
    answer = run("report", url, "--json", "--keep", "last(1)")

    assert [save["id"] for save in answer.json["saves"]] == ids
    assert answer.json["retention"]["going"] == ids[:2]
    assert answer.json["written"] is None
    path = tmp_path / "report.html"
    assert run("report", url, "--json", "-o", str(path)).json["written"] == str(path)
    assert path.exists()


def test_rules_come_from_a_config_too(run: Run, url: str, ids: list[str], tmp_path: Path) -> None:
    config = tmp_path / "train.yaml"
    config.write_text("keep: best(val_loss)\n")

    assert run("report", url, "--json", "--config", str(config)).json["retention"]["going"] == ids[:1]
    both = run("report", url, "--json", "--config", str(config), "--keep", "last(1)")
    assert (both.exit_code, both.json["error"]["code"]) == (2, "usage")


@pytest.mark.parametrize("args", [(), ("-o", "-", "--json"), ("-o", "x.html", "--keep", "nonsense(")])
def test_wrong_use_writes_nothing(
    run: Run, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.iterdir())
    assert run("report", url, *args).exit_code == 2
    assert set(tmp_path.iterdir()) == before


def test_another_file_is_left_alone(run: Run, url: str, tmp_path: Path) -> None:
    path = tmp_path / "thesis.html"
    path.write_text("mine")

    answer = run("report", url, "-o", str(path), "--json")
    assert (answer.exit_code, answer.json["error"]["code"]) == (1, "exists")
    assert path.read_text() == "mine"
    assert run("report", url, "-o", str(path), "--force").exit_code == 0
    assert run("report", url, "-o", str(path)).exit_code == 0


def test_damage_is_bad_news_and_on_the_page(run: Run, url: str, ids: list[str], tmp_path: Path) -> None:
    (Path(url) / "commits" / f"{ids[1]}.json").write_text("torn")

    answer = run("report", url, "-o", str(tmp_path / "report.html"))
    assert answer.exit_code == 1
    assert "1 record damaged; the report says which" in answer.stderr
    assert "1 record damaged" in (tmp_path / "report.html").read_text()


def test_what_is_missing_is_named_before_anything_is_read(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "plotly", None)

    answer = run("report", str(tmp_path / "nothing"), "-o", str(tmp_path / "report.html"))
    assert answer.exit_code == 2
    assert "pip install 'ckptstore[report]'" in answer.stderr
    assert "nothing" not in answer.stderr


def test_json_needs_neither(run: Run, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.setitem(sys.modules, "jinja2", None)

    assert len(run("report", url, "--json").json["saves"]) == 3


def test_it_needs_no_torch(url: str, tmp_path: Path) -> None:
    """A machine that looks at runs has none."""
    folder = tmp_path / "no-torch"
    folder.mkdir()
    (folder / "torch.py").write_text('raise ImportError("torch is not here")\n')

    assert process("report", url, "-o", tmp_path / "report.html", first=str(folder)).exit_code == 0


def test_a_backup_can_be_looked_at_too(run: Run, tmp_path: Path) -> None:
    first, second = tmp_path / "store", tmp_path / "copy"
    with ckptstore.open(first, backup=second, keep=ckptstore.last(1)) as store:
        for step in (1, 2):
            store.save({"x": 1}, step=step, durable="backup")

    assert len(run("report", str(first), "--json", "--backup", str(second)).json["saves"]) == 2
