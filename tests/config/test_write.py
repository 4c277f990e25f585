"""Steps are written back into a config, and nothing else in it changes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ckptstore as cs
from ckptstore import config
from ckptstore.config import write
from ckptstore.config.files import yaml_value
from ckptstore.errors import ExistsError, FormatError, NotFoundError, StorageError

THEIRS = """---
# the experiment
model:   {layers: 2}   # small
data:
    - name: 'a'
    - name: "b"    # second
training:
  # how it learns
  lr: 1e-4
  auto_generate_checkpoints: true   # on

  warmup: null
  checkpoint_schedule: [1, 2,   3]   # filled in by a command
# the end
seed: 0o17
"""


def after(tmp_path: Path, text: str, steps: list[int]) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    config.write_steps(path, steps)
    assert sorted(os.listdir(tmp_path)) == ["run.yaml"]
    return path.read_text()


def test_s20_other_keys_order_and_comments_stay(tmp_path: Path) -> None:
    assert after(tmp_path, THEIRS, [30, 0, 10, 10]) == THEIRS.replace("[1, 2,   3]", "[0, 10, 30]")
    assert config.load(tmp_path / "run.yaml", environment={}).save == cs.at(0, 10, 30)


@pytest.mark.parametrize("old", ["", " null", " []", " ~", "\n  - 1\n  - 2", "\n    - 1   # one\n    - 2   # two"])
def test_s20_whatever_stood_there_is_replaced(tmp_path: Path, old: str) -> None:
    before = f"a: 1\ntraining:\n  checkpoint_schedule:{old}\n  lr: 1  # rate\n# end\n"
    made = after(tmp_path, before, [5, 7])
    assert made.startswith("a: 1\ntraining:\n  checkpoint_schedule: [5, 7]")
    assert made.endswith("\n  lr: 1  # rate\n# end\n")


def test_s20_a_missing_key_comes_last_in_its_section(tmp_path: Path) -> None:
    before = "training:\n    auto_generate_checkpoints: true  # on\n    tags:\n    - a  # first\n\n# next\nmodel: x\n"
    expected = before.replace("- a  # first\n", "- a  # first\n    checkpoint_schedule: [5]\n")
    assert after(tmp_path, before, [5]) == expected
    before = "training:\n  checkpoint_interval:   # empty\n  log_base:\n# next\nmodel: x\n"
    assert after(tmp_path, before, [5]) == before.replace("log_base:\n", "log_base:\n  checkpoint_schedule: [5]\n")


def test_s20_a_missing_section_is_made(tmp_path: Path) -> None:
    made = after(tmp_path, "save_total_limit: 3  # few", [5, 6])
    assert made == "save_total_limit: 3  # few\ntraining:\n  checkpoint_schedule: [5, 6]\n"


def test_s20_explicit_steps_stay_where_they_are_given(tmp_path: Path) -> None:
    before = "checkpointing:\n  save_steps: 5   # old\n  eval_steps: 0.1\n"
    assert after(tmp_path, before, [5, 6]) == before + "  save_at_steps: [5, 6]\n"


def test_s20_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="there is no config"):
        config.write_steps(tmp_path / "missing.yaml", [1])
    assert os.listdir(tmp_path) == []


def test_in_a_config_of_ours_it_is_save(tmp_path: Path) -> None:
    before = "# mine\nsave: every(steps=250)   # often\nkeep: last(2)\n"
    steps = [0, 10, 30, *range(2000, 10001, 1000)]
    assert after(tmp_path, before, steps) == before.replace("every(steps=250)", "at(0, 10, 30, '2000-10000/1000')")
    assert config.load(tmp_path / "run.yaml", environment={}).save == cs.at(0, 10, 30, "2000-10000/1000")


def test_what_depends_on_metrics_stays_beside_the_steps(tmp_path: Path) -> None:
    before = "save:\n- every(steps=250)\n- on_best(val_loss)   # too\n- budget('1%')\nrun: {total_steps: 1000}\n"
    made = after(tmp_path, before, [250, 500])
    assert "save: at(250, 500) | on_best('val_loss') | budget(overhead='1%', mtbf='6h')" in made
    assert made.endswith("run: {total_steps: 1000}\n")


def test_an_empty_config(tmp_path: Path) -> None:
    assert after(tmp_path, "", [1]) == "save: at(1)\n"
    assert after(tmp_path, "# nothing yet\n", [1]) == "# nothing yet\nsave: at(1)\n"


@pytest.mark.parametrize(
    "before",
    [
        "{training: {checkpoint_schedule: [1], lr: 2}, seed: 3}  # all in one\n",
        "training: {lr: 2, auto_generate_checkpoints: true}  # flow\nseed: 3\n",
        "training:\n  checkpoint_schedule: &steps [1]\n  eval: *steps\nseed: 3  # three\n",
        "training:\n  ? checkpoint_schedule\n  : [1]\nseed: 3  # three\n",
        "training:\n  checkpoint_schedule : [1]\nseed: 3  # three\n",
        "training:\n  auto_generate_checkpoints: true\n  text: |\n    a\n    b\nseed: 3\n",
        "training:\n  auto_generate_checkpoints: true\nseed: 3\n...\n",
    ],
)
def test_whatever_the_style_the_values_are_right(tmp_path: Path, before: str) -> None:
    wanted = yaml_value(before, "x")
    wanted["training"] = {**wanted["training"], "checkpoint_schedule": [5, 7]}
    made = after(tmp_path, before, [5, 7])
    assert yaml_value(made, "x") == wanted
    assert made.count("#") == before.count("#")


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=200))
def test_any_steps_come_back(steps: list[int]) -> None:
    text = " | ".join(map(str, [cs.at(*write._segments(sorted(set(steps))))]))
    for path, value in ((("save",), text), (("training", "checkpoint_schedule"), sorted(set(steps)))):
        edited = write._edited("# head\na: 1  # one\n", path, value, "x")
        assert edited.startswith("# head\na: 1  # one\n")
        assert max(map(len, edited.split("\n"))) < 130
        made = config.parse({"save": text}, environment={}).save
        assert made is not None
        assert made.enumerate(cs.Length()) == sorted(set(steps))
        assert yaml_value(edited, "x")[path[0]]


def test_long_lists_are_folded_and_read_back(tmp_path: Path) -> None:
    steps = [n * n for n in range(300)]
    after(tmp_path, "save: at(1)\nkeep: last(2)  # two\n", steps)
    assert config.load(tmp_path / "run.yaml", environment={}).save == cs.at(*steps)
    made = after(tmp_path, THEIRS, steps)
    assert yaml_value(made, "x")["training"]["checkpoint_schedule"] == steps
    assert "   # filled in by a command\n# the end\n" in made


def test_elsewhere(tmp_path: Path) -> None:
    source, target = tmp_path / "a.yaml", tmp_path / "b.yaml"
    source.write_text("save: at(1)\n")
    source.chmod(0o640)
    config.write_steps(source, [2], target)
    assert (source.read_text(), target.read_text()) == ("save: at(1)\n", "save: at(2)\n")
    assert target.stat().st_mode & 0o777 == 0o640


def test_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.yaml").write_text("save: at(1)\n")
    (tmp_path / "a.yaml").symlink_to(tmp_path / "real" / "a.yaml")
    config.write_steps(tmp_path / "a.yaml", [2])
    assert (tmp_path / "a.yaml").is_symlink()
    assert (tmp_path / "real" / "a.yaml").read_text() == "save: at(2)\n"


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("save: at(1)\n")

    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, call, fail)
        with pytest.raises(StorageError, match="can't be written: No space left"):
            config.write_steps(path, [2])
    assert path.read_text() == "save: at(1)\n"
    assert os.listdir(tmp_path) == ["run.yaml"]


def test_the_file_is_flushed_before_it_takes_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("save: at(1)\n")
    calls: list[str] = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: (calls.append(name), real(*args))[1])
    config.write_steps(path, [2])
    assert calls == ["fsync", "replace", "fsync"]


@pytest.mark.parametrize(
    ("name", "text", "steps", "part"),
    [
        ("a.yaml", "save: at(1)\n", [], "give at least one step"),
        ("a.yaml", "save: at(1)\n", [-1], "that is no step"),
        ("a.yaml", "save: [\n", [1], "is no YAML"),
        ("a.yaml", "sav: at(1)\n", [1], "did you mean save?"),
        ("a.yaml", "- 1\n", [1], "no keys"),
        ("a.yaml", "base: &base {log_base: 2}\ntraining: *base\n", [1], "can't be written without changing other"),
        ("a.yaml", "training: fast\nsave_total_limit: 3\n", [1], "training must be a section of keys"),
        ("a.toml", 'save = "at(1)"\n', [1], "YAML only"),
    ],
)
def test_what_can_not_be_written(tmp_path: Path, name: str, text: str, steps: list[int], part: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(FormatError, match=part.replace("?", r"\?")):
        config.write_steps(path, steps)
    assert path.read_text() == text


def test_a_new_config_replaces_none_by_itself(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    config.write_new(path, "keep: last(1)\n")
    with pytest.raises(ExistsError, match="exists"):
        config.write_new(path, "keep: last(2)\n")
    assert path.read_text() == "keep: last(1)\n"
    config.write_new(path, "keep: last(2)\n", replace=True)
    assert path.read_text() == "keep: last(2)\n"
    with pytest.raises(StorageError, match="can't be written"):
        config.write_new(tmp_path / "none" / "a.yaml", "")
