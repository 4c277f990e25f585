"""The environment overrides a config's keys."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import ckptstore as cs
from ckptstore import config
from ckptstore.config.environment import OTHERS, variables
from tests.config.test_keys import parsed, problem

ROOT = Path(cs.__file__).parent


def test_keys_by_the_environment() -> None:
    made = parsed(
        {"storage": "runs/a", "run": {"total_steps": 10, "epochs": 2}},
        CKPTSTORE_STORAGE="runs/b # 2",
        CKPTSTORE_SAVE="every(steps=3) | on_best(val_loss)",
        CKPTSTORE_EVAL="every(steps=2)",
        CKPTSTORE_KEEP="last(1)",
        CKPTSTORE_RUN__TOTAL_STEPS="20",
        CKPTSTORE_RUN__STEP_TIME="2s",
        CKPTSTORE_FINAL="false",
        CKPTSTORE_TRASH="10m",
        CKPTSTORE_RESUME="step:5",
        CKPTSTORE_RESTORE__OPTIMIZER="false",
        CKPTSTORE_BACKUP="[runs/c, runs/d]",
        CKPTSTORE_PARAMETERS="1M",
    )

    assert made.storage == "runs/b # 2"
    assert (made.save, made.keep) == (cs.every(steps=3) | cs.on_best("val_loss"), cs.last(1))
    assert made.evaluate == cs.every(steps=2)
    assert made.run.length() == cs.Length(20, 2, 10, None, 2.0)
    assert (made.final, made.trash_s, made.resume, made.backup) == (False, 600, "step:5", ["runs/c", "runs/d"])
    assert (made.restore.optimizer, made.checkpoint_bytes) == (False, 12_000_000)


@pytest.mark.parametrize(("text", "resume"), [("true", True), ("false", False), ("latest", "latest"), ("0001", "0001")])
def test_resume_by_the_environment(text: str, resume: bool | str) -> None:
    assert parsed({}, CKPTSTORE_RESUME=text).resume == resume


def test_secrets_belong_there_and_are_not_shown() -> None:
    made = parsed(
        {"storage": "sftp://host/x", "storage_options": {"port": 22}},
        CKPTSTORE_STORAGE_OPTIONS__PASSWORD="0123",
        CKPTSTORE_STORAGE_OPTIONS__PORT="2222",
    )
    assert made.storage_options == {"password": "0123", "port": 2222}
    assert "0123" not in repr(made)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("CKPTSTORE_STORAG", "did you mean CKPTSTORE_STORAGE?"),
        ("CKPTSTORE_RUN__TOTALSTEPS", "did you mean CKPTSTORE_RUN__TOTAL_STEPS?"),
        ("CKPTSTORE_RUN_TOTAL_STEPS", "did you mean CKPTSTORE_RUN__TOTAL_STEPS?"),
        ("CKPTSTORE_EVALUATE", "did you mean CKPTSTORE_EVAL?"),
        ("CKPTSTORE_RUN", "no key is called so"),
        ("CKPTSTORE_SAVE__X", "did you mean CKPTSTORE_SAVE?"),
        ("CKPTSTORE_STORAGE_OPTIONS", "no key is called so"),
        ("CKPTSTORE_XYZZY", "there are CKPTSTORE_STORAGE, "),
    ],
)
def test_an_unknown_variable_is_an_error(name: str, meant: str) -> None:
    message = problem({}, **{name: "1"})
    assert message.startswith(f"config: {name}: no key is called so")
    assert meant in message


def test_errors_name_the_variable() -> None:
    message = problem(
        {"run": {"total_steps": 100}, "keep": "last(0)"},
        CKPTSTORE_RUN__TOTAL_STEPS="many",
        CKPTSTORE_SAVE="evry(steps=1)",
        CKPTSTORE_STORAGE_OPTIONS__PORT="[hunter2",
    )
    assert message.startswith("config has 4 errors: ")
    assert "CKPTSTORE_RUN__TOTAL_STEPS: 'many' must be a whole number" in message
    assert "CKPTSTORE_SAVE: 'evry' in" in message
    assert "CKPTSTORE_STORAGE_OPTIONS__PORT: the value can't be read" in message
    assert "keep: last: 0" in message
    assert "hunter2" not in message


def test_an_override_into_what_is_no_section() -> None:
    assert "run" in problem({"run": 3}, CKPTSTORE_RUN__EPOCHS="3")


def test_what_is_empty_or_of_others_says_nothing() -> None:
    made = parsed({"keep": "last(2)"}, CKPTSTORE_KEEP="", CKPTSTORE_TRACEBACK="1", HOME="/", _CKPTSTORE_COMPLETE="x")
    assert made.keep == cs.last(2)


def test_without_an_argument_it_is_that_of_the_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CKPTSTORE_KEEP", "last(7)")
    (tmp_path / "a.yaml").write_text("keep: last(2)\n")
    assert config.load(tmp_path / "a.yaml").keep == cs.last(7)
    assert config.parse({}).keep == cs.last(7)
    assert config.load(tmp_path / "a.yaml", environment={}).keep == cs.last(2)


def test_every_variable_of_the_package_is_known() -> None:
    """A variable that some module reads is no unknown key."""
    found: set[str] = set()
    for path in ROOT.rglob("*.py"):
        if path.parent.name != "config":
            found.update(re.findall(r"(?<!_)CKPTSTORE_[A-Z][A-Z_]*", path.read_text()))
    assert found <= OTHERS | set(variables())


def test_every_variable_sets_its_key() -> None:
    values: dict[str, Any] = {
        "KEEP": "last(2)", "SAVE": "every(steps=2)", "EVAL": "every(steps=2)", "DURABLE": "primary",
        "COMPRESSION": "zstd", "TRASH": "1h", "CHECKPOINT_SIZE": "1GB", "RUN__STEP_TIME": "1s", "STORAGE": "s3://b/x",
        "BACKUP": "runs/a",
    }  # fmt: skip
    for name in variables():
        if "OPTIONS" in name:
            continue
        key = name.removeprefix("CKPTSTORE_")
        flag = key == "FINAL" or key.startswith(("RESTORE", "INCLUDE", "RESUME"))
        environment = {name: values.get(key, "false" if flag else "3")}
        if key in ("RUN__DATASET_SIZE", "RUN__BATCH_SIZE"):
            environment |= {"CKPTSTORE_RUN__DATASET_SIZE": "3", "CKPTSTORE_RUN__BATCH_SIZE": "3"}
        assert parsed({}, **environment) != parsed({}) or key == "DURABLE", name
