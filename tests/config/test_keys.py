"""What a config says, and what is told about one that is wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import ckptstore as cs
from ckptstore import config
from ckptstore.errors import FormatError, NotFoundError, StorageError

EVERYTHING = """
storage: s3://bucket/gpt2
storage_options: {endpoint_url: "https://s3.example", client_kwargs: {region_name: eu-central-1}}
backup: [s3://other/gpt2, runs/backup]
backup_options: {anon: true}
durable: backup
compression: float-zstd:3
save:
  - every(steps=250)
  - on_best(val_loss)
keep: last(10) | epochs() | best(val_loss)
eval: every(fraction=0.1)
trash: 1h
final: false
resume: best:val_loss
restore: {optimizer: false, rng: false}
include: {scheduler: false}
run:
  epochs: 2
  dataset_size: 1000
  batch_size: 2
  accumulation: 1
  tokens_per_step: 4096
  step_time: 1.5s
checkpoint_size: 1.5GB
"""


def parsed(data: dict[str, Any], **environment: str) -> config.Config:
    return config.parse(data, environment=environment)


def problem(data: dict[str, Any], **environment: str) -> str:
    with pytest.raises(FormatError) as caught:
        parsed(data, **environment)
    return str(caught.value)


def test_every_key(tmp_path: Path) -> None:
    path = tmp_path / "all.yaml"
    path.write_text(EVERYTHING)

    made = config.load(path, environment={})

    assert made.storage == "s3://bucket/gpt2"
    assert made.storage_options["client_kwargs"] == {"region_name": "eu-central-1"}
    assert (made.backup, made.backup_options) == (["s3://other/gpt2", "runs/backup"], {"anon": True})
    assert (made.durable, made.compression, made.final, made.resume) == (
        "backup",
        "float-zstd:3",
        False,
        "best:val_loss",
    )
    assert made.save == cs.every(steps=250) | cs.on_best("val_loss")
    assert made.keep == cs.last(10) | cs.epochs() | cs.best("val_loss")
    assert made.evaluate == cs.every(fraction=0.1)
    assert made.trash_s == 3600
    assert made.restore == config.Parts(optimizer=False, rng=False)
    assert made.save_parts == config.Parts(scheduler=False)
    assert made.run.length() == cs.Length(1000, 2, 500, 4096, 1.5)
    assert (made.checkpoint_bytes, made.notes) == (1_500_000_000, [])


def test_nothing_said_is_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("# nothing yet\n")

    made = config.load(tmp_path / "empty.yaml", environment={})

    assert made == config.Config(source=str(tmp_path / "empty.yaml"), backup=[], notes=[])
    assert made.run.length() == cs.Length()


def test_a_key_without_a_value_says_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    keys = ("storage", "backup", "save", "trash", "final", "resume", "run", "restore", "storage_options", "parameters")
    path.write_text("".join(f"{key}:\n" for key in keys))
    assert config.load(path, environment={}) == config.Config(source=str(path), backup=[], notes=[])


def test_toml_says_the_same(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('storage = "runs/a"\nsave = "every(steps=5)"\n[run]\ntotal_steps = 10\n')

    made = config.load(path, environment={})

    assert (made.storage, made.save, made.run.total_steps) == ("runs/a", cs.every(steps=5), 10)


def test_policies_may_be_objects() -> None:
    made = parsed({"save": [cs.every(steps=5), "at(3)"], "keep": cs.last(2), "storage": Path("runs/a")})

    assert (made.save, made.keep, made.storage) == (cs.every(steps=5) | cs.at(3), cs.last(2), "runs/a")


def test_parameters_tell_the_size() -> None:
    """12 bytes for fp32 weights and Adam's two moments; 4 where the optimizer is left out."""
    assert parsed({"parameters": "124M"}).checkpoint_bytes == 124_000_000 * 12
    assert parsed({"parameters": 1000, "include": {"optimizer": False}}).checkpoint_bytes == 4000
    assert "give one of them" in problem({"parameters": 1000, "checkpoint_size": "1GB"})


def test_all_errors_come_at_once_each_with_its_place_and_the_nearest_name(tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(
        "storag: x\n"
        "save: every(step=250)\n"
        "keep: lst(3)\n"
        "run:\n"
        "  total_step: 3\n"
        "  epochs: '3'\n"
        "  keep: last(1)\n"
        "total_steps: 5\n"
        "final: yes\n"
        "durable: both\n"
        "restore: all\n"
    )

    with pytest.raises(FormatError) as caught:
        config.load(path, environment={})

    message = str(caught.value)
    assert message.startswith(f"{path} has 10 errors: (1) ")
    for part in (
        "storag (line 1): unknown key; did you mean storage?",
        "save (line 2): 'every(step=250)': every() got an unexpected keyword argument 'step'",
        "keep (line 3): 'lst' in 'lst(3)' is not a rule: did you mean last?",
        "run.total_step (line 5): unknown key; did you mean total_steps?",
        "run.epochs (line 6): '3' must be a whole number of at least 1; write 3 without quotes",
        "run.keep (line 7): unknown key; keep stands at the top",
        "total_steps (line 8): unknown key; total_steps stands under run:",
        "final (line 9): 'yes' must be true or false",
        "durable (line 10): 'both' must be 'primary' or 'backup'",
        "restore (line 11): must be a section of keys: optimizer, scheduler, rng, data",
    ):
        assert part in message
    assert "pydantic" not in message


@pytest.mark.parametrize(
    ("data", "part"),
    [
        ({"run": {"total_steps": 0}}, "run.total_steps: 0 must be a whole number of at least 1"),
        ({"run": {"total_steps": 10.0}}, "10.0 must be a whole number of at least 1; write 10"),
        ({"run": {"total_steps": True}}, "True must be a whole number"),
        ({"run": {"batch_size": 8}}, "run: dataset_size and batch_size go together"),
        ({"run": {"total_steps": 2, "epochs": 3}}, "run: epochs=3 in total_steps=2"),
        ({"run": {"step_time": "0s"}}, "run.step_time: a step takes longer than 0 seconds"),
        ({"trash": "soon"}, "trash: 'soon' is no duration"),
        ({"trash": True}, "trash: True is no duration"),
        ({"storag": None}, "storag: unknown key; did you mean storage?"),
        ({"url": "runs/a"}, "url: unknown key; there are storage,"),
        ({"evaluate": "every(steps=5)"}, "evaluate: unknown key; did you mean eval?"),
        ({"checkpoint_size": "big"}, "checkpoint_size: 'big' is no size"),
        ({"parameters": 0}, "parameters: 0 is no count"),
        ({"parameters": "1T"}, "parameters: '1T' is no count"),
        ({"compression": "zip"}, "compression: compression='zip' is unknown"),
        ({"compression": 3}, "compression: 3 must be text"),
        ({"save": []}, "save: the list is empty: write every(steps=250)"),
        ({"save": 250}, "save: 250 is not a schedule"),
        ({"save": "last(3)"}, "'last' in 'last(3)' is not a schedule"),
        ({"save": "milestones()"}, "milestones('1B') says when to save"),
        ({"resume": "out/checkpoint-5"}, "resume: 'out/checkpoint-5' is no selector"),
        ({"resume": "worst:loss"}, "is no selector"),
        ({"resume": 5}, "resume: 5 is no selector"),
        ({"storage": ""}, "storage: '' is no place"),
        ({"storage": 3}, "storage: 3 is no place"),
        ({"storage_options": "anon"}, "storage_options: must be a section of options"),
        ({"storage": "runs/a", "storage_options": {"anon": True}}, "are for storage far away, and runs/a is a path"),
        ({"backup_options": {"anon": True}}, "there is no backup"),
        ({"durable": "backup"}, "durable: 'backup' needs a backup"),
        ({1: 2}, "1: unknown key; there are storage,"),
        ({"restore": {"optimiser": False}}, "restore.optimiser: unknown key; did you mean optimizer?"),
        ({"include": {"rng": False}}, "include.rng: unknown key; rng stands under restore:"),
    ],
)
def test_what_is_wrong_is_named(data: dict[str, Any], part: str) -> None:
    message = problem(data)
    assert message.startswith("config: ")
    assert part in message


def test_what_stands_beside_an_error_is_looked_at_too() -> None:
    message = problem({"save": "every(steps=250)", "run": {"total_steps": 100}, "kep": "last(1)", "durable": "backup"})
    assert message.startswith("config has 3 errors: ")
    assert "every(steps=250) would never save: the run has 100 steps" in message
    assert problem({"backup": 3, "durable": "backup"}).startswith("config: backup: ")


@pytest.mark.parametrize(
    ("key", "text"), [("save", "every(steps=250)"), ("eval", "at(101)"), ("save", "milestones('1M', of=steps)")]
)
def test_a_schedule_that_does_not_fit_the_run_is_an_error(key: str, text: str) -> None:
    run = {"total_steps": 100}
    assert f"config: {key}: " in problem({key: text, "run": run})
    # Where nobody knows how long the run is, a data loader may tell later.
    parsed({key: text, "run": {"epochs": 1}})


@pytest.mark.parametrize(
    "options",
    [
        {"key": "AKIA", "secret": "hunter2hunter2"},
        {"token": "hunter2hunter2"},
        {"password": "hunter2hunter2"},
        {"client_kwargs": {"aws_secret_access_key": "hunter2hunter2"}},
        {"connection_string": "hunter2hunter2"},
        {"account_key": "hunter2hunter2"},
        {"s3_additional_kwargs": {"SSECustomerKey": "hunter2hunter2"}},
        {"password": 12345678},
    ],
)
@pytest.mark.parametrize("name", ["storage_options", "backup_options"])
def test_secrets_do_not_belong_here(name: str, options: dict[str, Any]) -> None:
    """The error names the key and where its value belongs, and repeats nothing of it."""
    message = problem({name: options, "storage": "s3://b/x", "backup": "s3://c/x"})
    assert f"{name}: " in message
    assert "give it by the environment" in message
    assert f"CKPTSTORE_{name.upper()}__" in message
    assert "hunter2" not in message
    assert "12345678" not in message


def test_a_key_that_stands_twice_is_named_without_its_values(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("storage_options:\n  secret: hunter2\n  secret: hunter3\n")
    with pytest.raises(FormatError, match='line 3, column 3: found duplicate key "secret"') as caught:
        config.load(path, environment={})
    assert "hunter" not in str(caught.value)


def test_what_only_looks_like_a_secret_is_none() -> None:
    options = {
        "anon": True,
        "token": "anon",
        "key_filename": "id",
        "s3_additional_kwargs": {"SSEKMSKeyId": "alias/a", "ServerSideEncryption": "aws:kms"},
        "requester_pays": False,
    }
    assert parsed({"storage": "s3://b/x", "storage_options": options}).storage_options == options


@pytest.mark.parametrize("url", ["s3://key:hunter2@bucket/x", "s3://bucket/x?token=hunter2", "sftp://me@host/x"])
@pytest.mark.parametrize("key", ["storage", "backup"])
def test_urls_with_secrets_are_refused_and_not_repeated(key: str, url: str) -> None:
    message = problem({key: url})
    assert "may hold secrets" in message
    assert "hunter2" not in message


@pytest.mark.parametrize(
    ("name", "text", "part"),
    [
        ("a.yaml", "a: [1, 2", "is no YAML: line 1, column 9: expected"),
        ("a.yaml", "save: a\nsave: b\n", 'is no YAML: line 2, column 1: found duplicate key "save"'),
        ("a.yaml", "save: !!python/object:os.system x\n", "is no YAML: line 1, column 7: could not determine"),
        ("a.yaml", "save: !thing x\n", "is no YAML: "),
        ("a.yaml", "a: \x01\n", "is no YAML: "),
        ("a.yaml", "--- 1\n--- 2\n", "is no YAML: "),
        ("a.yaml", "- a\n- b\n", "holds list, no keys"),
        ("a.yaml", "just text\n", "holds str, no keys"),
        ("a.yaml", "storage_options: &a\n  b: *a\n", "levels: that is no config"),
        ("a.toml", "save = \n", "is no TOML: "),
    ],
)
def test_files_that_are_no_config(tmp_path: Path, name: str, text: str, part: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(FormatError) as caught:
        config.load(path, environment={})
    assert str(caught.value).startswith(f"{path} ")
    assert part in str(caught.value)


def test_aliases_of_aliases_do_not_fill_the_memory(tmp_path: Path) -> None:
    lines = ["storage_options:", "  a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"  a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    (tmp_path / "bomb.yaml").write_text("\n".join(lines))
    with pytest.raises(FormatError, match="values"):
        config.load(tmp_path / "bomb.yaml", environment={})


def test_files_that_can_not_be_read(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"ckptstore init .*writes one"):
        config.load(tmp_path / "missing.yaml", environment={})
    with pytest.raises(StorageError, match="can't be read"):
        config.load(tmp_path, environment={})
    (tmp_path / "binary.yaml").write_bytes(b"a: \xff\xfe\n")
    with pytest.raises(FormatError, match="no text in UTF-8"):
        config.load(tmp_path / "binary.yaml", environment={})
    (tmp_path / "large.yaml").write_bytes(b"#" * (5 << 20))
    with pytest.raises(FormatError, match="which is no config"):
        config.load(tmp_path / "large.yaml", environment={})


def test_the_dict_that_was_given_stays_as_it_was() -> None:
    data = {"storage": "s3://b/x", "storage_options": {"anon": True}, "run": {"total_steps": 10}}
    parsed(data, CKPTSTORE_RUN__TOTAL_STEPS="20", CKPTSTORE_STORAGE_OPTIONS__ANON="false")
    assert data == {"storage": "s3://b/x", "storage_options": {"anon": True}, "run": {"total_steps": 10}}


def test_the_package_stays_light() -> None:
    """Who doesn't read a config needs no pydantic and no YAML; who does, no torch."""
    code = (
        "import sys, ckptstore\n"
        "ckptstore.open\n"
        "assert 'ruamel.yaml' not in sys.modules and 'ckptstore.config' not in sys.modules\n"
        "import ckptstore.config\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
