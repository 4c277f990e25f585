"""Every end of a command is one line, one document and one exit code."""

from __future__ import annotations

from pathlib import Path

import click
import pytest

from ckptstore import __version__, errors
from ckptstore.cli.main import cli
from ckptstore.cli.outcome import exit_code
from tests.cli.conftest import Run

COMMANDS = {
    "init": (),
    "plan": (),
    "ls": (),
    "show": (),
    "report": ("-o", "report.html"),
    "watch": ("--once",),
    "verify": (),
    "du": (),
    "bisect": ("--good", "step:10", "--bad", "latest", "true"),
    "copy": ("memory://target of a copy",),
    "import": ("memory://target of an import",),
    "export": ("--to", "torch", "-o", "export"),
    "average": ("--last", "2", "--to", "memory://target of an average"),
    "diff": ("step:10", "latest"),
    "hold": ("latest", "name"),
    "release": ("name",),
    "delete": ("latest", "--yes"),
    "undelete": ("0001",),
    "rollback": ("step:10",),
    "prune": (),
    "signal": ("save",),
    "bench": ("--size", "2MB"),
    "doctor": ("--size", "2MB"),
    "completion": ("bash",),
}
# init writes a config, plan reads one, and completion is about none; they take no URL. import takes a file first.
WITH_URL = [name for name in COMMANDS if name not in ("init", "plan", "completion", "import")]
# doctor asks about storages, where no store need be.
OF_STORES = [name for name in WITH_URL if name != "doctor"]


def test_all_commands_are_tried_here() -> None:
    with click.Context(cli) as ctx:
        assert cli.list_commands(ctx) == list(COMMANDS)


@pytest.mark.parametrize("command", OF_STORES)
def test_no_store_is_exit_2_and_makes_none(run: Run, tmp_path: Path, command: str) -> None:
    """A wrong path is neither an empty store nor made into one."""
    place = tmp_path / "nothing"

    answer = run(command, str(place), *COMMANDS[command])
    assert (answer.exit_code, answer.stdout) == (2, "")
    assert answer.stderr.startswith("error: ")
    assert str(place) in answer.stderr
    assert answer.stderr.count("\n") == 1
    answer = run(command, str(place), *COMMANDS[command], "--json")
    assert answer.exit_code == 2
    assert set(answer.json["error"]) == {"code", "message"}
    assert not place.exists()


@pytest.mark.parametrize("command", [name for name in OF_STORES if name != "bench"])
def test_a_folder_that_is_no_store_is_exit_2(run: Run, tmp_path: Path, command: str) -> None:
    (tmp_path / "notes.txt").write_text("mine")

    answer = run(command, str(tmp_path), *COMMANDS[command], "--json")
    assert (answer.exit_code, answer.json["error"]["code"]) == (2, "no_store")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("command", WITH_URL)
@pytest.mark.parametrize("url", ["nosuch://x", "file://host/path", "s3://key:secret@bucket/x"])
def test_bad_urls_are_exit_2(run: Run, command: str, url: str) -> None:
    answer = run(command, url, *COMMANDS[command], "--json")
    assert answer.exit_code == 2
    assert answer.json["error"]["code"] == "storage"
    assert "secret" not in answer.stdout + answer.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_wrong_use_is_exit_2_with_usage(run: Run, command: str) -> None:
    for args in ((), ("x", *COMMANDS[command], "--nonsense")):
        answer = run(command, *args, "--json")
        assert answer.exit_code == 2
        assert "Usage: ckptstore" in answer.stderr
        assert answer.json["error"]["code"] == "usage"
        assert run(command, *args).stdout == ""


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(run: Run, command: str) -> None:
    """What it answers, an example that starts like a call, and the exit codes."""
    answer = run(command, "--help")
    assert answer.exit_code == 0
    assert f"    ckptstore {command} " in answer.stdout
    assert "Exit codes: 0 " in answer.stdout
    assert "--json" in answer.stdout
    assert run(command, "-h").stdout == answer.stdout


def test_the_group_lists_all_commands(run: Run) -> None:
    shown = run("--help").stdout
    for command in COMMANDS:
        assert f"\n  {command} " in shown
    assert "ckptstore completion bash" in shown
    listing = shown.partition("Commands:")[2]
    assert "..." not in listing, "a summary was cut"


def test_unknown_commands(run: Run) -> None:
    assert run("lss").exit_code == 2
    assert run("lss", "--json").json["error"]["code"] == "usage"
    assert "no such command 'verfy'; did you mean 'verify'?" in run("verfy", "x").stderr
    assert "did you mean" not in run("nonsense").stderr
    assert "Did you mean '--last'?" in run("ls", "x", "--lst", "5").stderr


def test_version(run: Run) -> None:
    assert run("--version").stdout == f"ckptstore, version {__version__}\n"


def test_exit_codes_of_all_errors() -> None:
    """Bad news is 1, no answer is 2; a new error must be sorted into one of them here."""
    bad_news = {"NotFoundError", "NoCheckpointError", "ExistsError", "IntegrityError"}
    for name in errors.__all__:
        assert exit_code(getattr(errors, name)("x")) == (1 if name in bad_news else 2), name


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        (errors.UnavailableError("the disk is away"), 2, "error: the disk is away"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(5, "Input/output error"), 2, "error: the answer can't be written: Input/output error"),
        (ZeroDivisionError("1\n2"), 2, "error: this is a bug in ckptstore: ZeroDivisionError: 1\\x0a2 (CKPTSTORE_"),
    ],
)
def test_whatever_is_raised_becomes_one_line(
    run: Run, url: str, raised: BaseException, code: int, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def fail(*args: object, **options: object) -> None:
        calls.append(args)
        raise raised

    monkeypatch.setattr("ckptstore.opening.open", fail)
    answer = run("ls", url)
    assert (answer.exit_code, answer.stdout, len(calls)) == (code, "", 1)
    assert answer.stderr.startswith(line)
    assert answer.stderr.count("\n") == 1
    answer = run("ls", url, "--json")
    assert (answer.exit_code, set(answer.json)) == (code, {"error"})
    assert answer.json["error"]["message"]


def test_a_bug_shows_its_traceback_on_request(run: Run, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr("ckptstore.opening.open", fail)
    monkeypatch.setenv("CKPTSTORE_TRACEBACK", "1")
    answer = run("ls", url)
    assert "Traceback (most recent call last)" in answer.stderr
    assert answer.stderr.rstrip().endswith("this is a bug in ckptstore: ZeroDivisionError: oh")


def test_warnings_are_lines_on_stderr(run: Run, url: str) -> None:
    """A damaged hold warns once and doesn't spoil the document."""
    run("hold", url, "latest", "paper")
    (Path(url) / "holds" / "paper.json").write_text("{}")

    answer = run("ls", url, "--json")
    assert len(answer.json["checkpoints"]) == 3
    assert answer.stderr.startswith("warning: holds/paper.json is damaged")
    assert answer.stderr.count("\n") == 1
