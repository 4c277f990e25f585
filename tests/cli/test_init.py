"""``ckptstore init``."""

from __future__ import annotations

from pathlib import Path

import pytest

import ckptstore as cs
from ckptstore import config
from tests.cli.conftest import Run, process


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckptstore.cli.init._at_terminal", lambda: True)


def answers(**given: str) -> str:
    """What is typed, Enter where nothing is said."""
    questions = ("total_steps", "epochs", "storage", "save", "milestones", "keep", "backup")
    assert set(given) <= set(questions)
    return "".join(f"{given.get(each, '')}\n" for each in questions)


def test_the_defaults_make_a_config_that_plans(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    answer = run("init", str(path), "--yes")
    assert (answer.exit_code, answer.stderr) == (0, "")
    assert f"wrote {path}" in answer.stdout
    made = config.load(path, environment={})
    assert (made.storage, made.save, made.keep) == ("runs/first", cs.every(steps=250), cs.last(3))
    assert made.save is not None
    plan = cs.foresee(made.save, made.keep, made.run.length(), checkpoint_bytes=1)
    assert len(plan.moments) == 40
    assert path.read_text().count("# ") >= 6


def test_without_a_path_it_is_the_usual_one(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("init", "--yes", "--json").json == {
        "written": "ckptstore.yaml",
        "config": {
            "storage": "runs/first",
            "save": "every(steps=250)",
            "keep": "last(3)",
            "run": {"total_steps": 10000},
        },
    }
    assert (tmp_path / "ckptstore.yaml").exists()


@pytest.mark.usefixtures("terminal")
def test_answers_become_keys(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    typed = answers(
        total_steps="5000", epochs="2", storage="s3://bucket/x", save="every(epochs=1) | on_best(val_loss)",
        milestones="1,5,10,30", keep="last(2) | epochs()", backup="runs/b",
    )  # fmt: skip
    answer = run("init", str(path), input=typed)
    assert answer.exit_code == 0
    assert answer.stdout.startswith(f"wrote {path}\n")
    made = config.load(path, environment={})
    assert (made.storage, made.backup) == ("s3://bucket/x", ["runs/b"])
    assert made.save == cs.every(epochs=1) | cs.on_best("val_loss") | cs.milestones("1B,5B,10B,30B")
    assert made.keep == cs.last(2) | cs.epochs() | cs.milestones()
    assert made.run.length() == cs.Length(5000, 2, 2500)


@pytest.mark.usefixtures("terminal")
def test_what_is_not_wanted_is_left_out(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    run("init", str(path), input=answers(total_steps="none", keep="None"))
    made = config.load(path, environment={})
    assert (made.keep, made.backup, made.run) == (None, [], config.Run())
    assert made.save == cs.every(steps=250)


@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize(
    ("question", "wrong", "right", "way_out"),
    [
        ("total_steps", "many", "1000", "'many' must be a whole number of at least 1"),
        ("total_steps", "0", "1000", "0 must be a whole number of at least 1"),
        ("epochs", "20000", "3", "an epoch has at least one step"),
        ("storage", "s3://key:hunter2@bucket/x", "runs/a", "give credentials by the environment"),
        ("storage", "none", "runs/a", "saves nothing; for example runs/first"),
        ("save", "every(steps=20000)", "every(steps=100)", "would never save: the run has 10000 steps"),
        ("save", "evry(steps=100)", "every(steps=100)", "did you mean every?"),
        ("save", "none", "every(steps=100)", "for example every(steps=250)"),
        ("milestones", "1T", "1B", "is no count; write numbers with commas"),
        ("milestones", "1,,5", "1B", "is no count"),
        ("milestones", "-1", "1B", "is no count"),
        ("keep", "last(0)", "last(1)", "the newest checkpoint always stays"),
        ("keep", "every(steps=5)", "last(1)", "is not a rule"),
        ("backup", "s3://b?x", "none", "may hold secrets"),
    ],
)
def test_m06_a_wrong_answer_says_the_way_out_and_is_asked_again(
    run: Run, tmp_path: Path, question: str, wrong: str, right: str, way_out: str
) -> None:
    path = tmp_path / "a.yaml"
    answer = run("init", str(path), input=answers(**{question: f"{wrong}\n{right}"}))
    assert answer.exit_code == 0
    assert way_out in answer.stderr
    assert answer.stderr.count("Error: ") == 1
    assert answer.stderr.count("Where shall checkpoints lie?") == (2 if question == "storage" else 1)
    assert "hunter2" not in answer.stdout + path.read_text()
    config.load(path, environment={})


@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize(
    ("typed", "counts"),
    [("1B,5B", "1B,5B"), ("1b, 5b", "1B,5B"), (" 2 , 3 ", "2B,3B"), ("30,1,30", "1B,30B"), ("0.5B", "500M"),
     ("1000", "1K"), ("999", "999B"), ("1.5b,250k", "250K,1.5B")],
)  # fmt: skip
def test_m01_m05_milestones(run: Run, tmp_path: Path, typed: str, counts: str) -> None:
    path = tmp_path / "a.yaml"
    run("init", str(path), input=answers(milestones=typed))
    assert f"milestones('{counts}')" in str(config.load(path, environment={}).save)


def test_a_short_run_is_saved_as_well(run: Run, tmp_path: Path, terminal: None) -> None:
    path = tmp_path / "a.yaml"
    run("init", str(path), input=answers(total_steps="3"))
    assert config.load(path, environment={}).save == cs.every(steps=1)


def test_an_existing_file_is_not_replaced(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("mine")
    answer = run("init", str(path), "--yes", "--json")
    assert (answer.exit_code, answer.json["error"]["code"]) == (1, "exists")
    assert "--force" in answer.stderr
    assert path.read_text() == "mine"
    assert run("init", str(path), "--yes", "--force").exit_code == 0
    assert config.load(path, environment={}).storage == "runs/first"


@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize(("said", "exit_code"), [("y\n", 0), ("n\n", 1), ("", 130)])
def test_an_existing_file_is_asked_for(run: Run, tmp_path: Path, said: str, exit_code: int) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("mine")
    answer = run("init", str(path), input=said + answers() if said else "")
    assert answer.exit_code == exit_code
    assert "Replace it?" in answer.stderr
    assert (path.read_text() == "mine") is (exit_code != 0)


@pytest.mark.usefixtures("terminal")
def test_an_interrupted_one_writes_nothing(run: Run, tmp_path: Path) -> None:
    answer = run("init", str(tmp_path / "a.yaml"), input="1000\n2\n")
    assert answer.exit_code == 130
    assert list(tmp_path.iterdir()) == []


def test_nobody_to_ask(run: Run, tmp_path: Path) -> None:
    answer = run("init", str(tmp_path / "a.yaml"))
    assert (answer.exit_code, "--yes" in answer.stderr) == (2, True)
    assert list(tmp_path.iterdir()) == []


def test_places_that_can_not_be_written(run: Run, tmp_path: Path) -> None:
    answer = run("init", str(tmp_path / "none" / "a.yaml"), "--yes", "--json")
    assert (answer.exit_code, answer.json["error"]["code"]) == (2, "storage")
    answer = run("init", "s3://key:hunter2@bucket/a.yaml", "--yes")
    assert (answer.exit_code, "hunter2" in answer.stderr) == (2, False)


def test_it_needs_no_torch(tmp_path: Path) -> None:
    folder = tmp_path / "no-torch"
    folder.mkdir()
    (folder / "torch.py").write_text('raise ImportError("torch is not here")\n')
    assert process("init", tmp_path / "a.yaml", "--yes", first=str(folder)).exit_code == 0
