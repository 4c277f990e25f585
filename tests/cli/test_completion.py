"""What shells complete: the words themselves, and the scripts in real shells."""

from __future__ import annotations

import os
import pty
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest

from ckptstore.cli import completing
from ckptstore.cli.main import cli
from tests.cli.conftest import Run, environment, flip


def offered(*args: str) -> list[str]:
    """The words for the last of ``args``, which is incomplete; a kind of place in brackets."""
    shell = completing.BashCompletion(cli, {}, "ckptstore", "_CKPTSTORE_COMPLETE")
    items = shell.get_completions(list(args[:-1]), args[-1])
    return [item.value if item.type == "plain" else f"<{item.type}>" for item in items]


def test_commands_and_options() -> None:
    assert offered("ver") == ["verify"]
    assert {"ls", "completion"} <= set(offered(""))
    assert offered("verify", "x", "--sa") == ["--sample"]
    assert offered("bisect", "x", "--to", "") == ["torch", "safetensors", "hf", "dcp"]
    assert offered("completion", "z") == ["zsh"]


def test_places() -> None:
    assert offered("ls", "ru") == offered("copy", "a", "") == offered("ls", "x", "--backup", "") == ["<dir>"]
    assert offered("prune", "x", "--config", "") == ["<file>"]


def test_selectors_of_a_local_store(run: Run, url: str, ids: list[str]) -> None:
    run("hold", url, "step:20", "paper")
    run("delete", url, "step:30", "--yes")
    expected = ["latest", "best:val_loss", "epoch:2", "epoch:1", "paper", "step:20", "step:10"]
    assert offered("show", url, "") == offered("show", f"file://{url}", "") == expected
    assert offered("show", url, "best:v") == ["best:val_loss"]
    assert offered("show", url, "0001-") == [ids[1], ids[0]]
    assert offered("show", url, "step:1") == offered("bisect", url, "--good", "step:1") == ["step:10"]
    assert offered("copy", url, "x", "--select", "lat") == ["latest"]
    assert offered("release", url, "") == ["paper"]
    assert offered("undelete", url, "") == [ids[2]]


def test_nothing_is_asked_of_a_network(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """And what is damaged or no store at all breaks no line."""
    opened: list[str] = []
    monkeypatch.setattr("ckptstore.storage.open_storage", lambda place, **_: opened.append(place))
    for place in ("s3://bucket/x", "memory://x", "https://example.com/x"):
        assert offered("show", place, "") == []
    assert opened == []
    monkeypatch.undo()
    assert offered("show", f"{url}/nothing", "") == offered("show", __file__, "") == []


def test_a_damaged_record_is_passed_over(url: str, ids: list[str]) -> None:
    flip(Path(url) / "commits" / f"{ids[2]}.json", 0)
    assert offered("show", url, "e") == ["epoch:2", "epoch:1"]
    assert offered("show", url, "b") == ["best:val_loss"]
    for strange in ("[]", "{}", '{"metrics": 1}', '{"reasons": [1]}', "null"):
        (Path(url) / "commits" / f"{ids[2]}.json").write_text(strange)
        assert offered("show", url, "e") == ["epoch:2", "epoch:1"]


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash here")
def test_words_are_quoted_for_bash() -> None:
    """Whoever named a metric must not run what he likes in the shell of another."""
    shell = completing.BashCompletion(cli, {}, "ckptstore", "_CKPTSTORE_COMPLETE")
    words = ["milestone:1B tokens", "best:$(touch /tmp/x)", "best:a;b|c&d`e`", "best:'\"\\", "best:損失", "~", "{a,b}*"]
    items = [shell.format_completion(completing.CompletionItem(word)).removeprefix("plain,") for word in words]
    assert shlex.split(" ".join(items)) == words
    script = ["bash", "-c", f"printf '%s\\n' {' '.join(items)}"]
    assert subprocess.run(script, capture_output=True, text=True, check=True).stdout.splitlines() == words


def test_all_that_names_something_is_completed() -> None:
    """A new command's URL and selectors are offered like those of the others, by their names."""
    for name in cli.list_commands(None):  # type: ignore[arg-type]
        command = cli.get_command(cli.make_context("ckptstore", [name], resilient_parsing=True), name)
        assert command is not None
        for param in command.params:
            known = ("url", "source", "target", "selector", "good", "bad")
            if param.name in known and not isinstance(param.type, click.Choice):
                assert hasattr(param.type, "_find") or hasattr(param.type, "_kind"), f"{name}: {param.name}"


def test_the_scripts_are_printed(run: Run) -> None:
    for shell in ("bash", "zsh", "fish"):
        answer = run("completion", shell)
        assert (answer.exit_code, answer.stderr) == (0, "")
        assert "_CKPTSTORE_COMPLETE" in answer.stdout
        assert run("completion", shell, "--json").json == {"shell": shell, "script": answer.stdout}
    assert "'tcsh' is not one of" in run("completion", "tcsh").stderr


@pytest.fixture
def program(tmp_path: Path) -> dict[str, str]:
    """Variables by which a shell finds ``ckptstore`` as a command, and nothing of the user's own."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "ckptstore"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m ckptstore.cli "$@"\n')
    script.chmod(0o755)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    return environment(PATH=path, HOME=str(tmp_path), ZDOTDIR=str(tmp_path), TERM="dumb", PS1="> ")


def typed(shell: list[str], setup: str, words: str, variables: dict[str, str], until: str) -> str:
    """What an interactive shell shows when ``words`` and a tab were typed, as soon as ``until`` matches it."""
    leader, follower = pty.openpty()
    child = subprocess.Popen(
        shell, stdin=follower, stdout=follower, stderr=follower, env=variables, start_new_session=True
    )
    os.close(follower)
    try:
        os.write(leader, setup.encode() + b"; echo rea''dy\n")
        waited(leader, "ready\r")
        os.write(leader, words.encode() + b"\t")
        return waited(leader, until)
    finally:
        child.kill()
        child.wait()
        os.close(leader)


def waited(leader: int, until: str) -> str:
    """All that a terminal shows until a pattern is matched."""
    seen, end = "", time.monotonic() + 60
    os.set_blocking(leader, False)
    while not re.search(until, seen):
        assert time.monotonic() < end, seen
        try:
            seen += os.read(leader, 65536).decode(errors="replace")
        except BlockingIOError:
            time.sleep(0.01)
    return seen


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash here")
def test_bash(program: dict[str, str], url: str) -> None:
    """Also behind a colon, where bash cuts words."""
    bash, setup = ["bash", "--norc", "-i"], 'eval "$(ckptstore completion bash)"'
    assert "ckptstore show x best:val_loss" in typed(
        bash, f"cd {url}/..; ln -s store x; {setup}", "ckptstore show x best:", program, "val_loss"
    )
    assert "ckptstore verify " in typed(bash, setup, "ckptstore ver", program, "verify ")


@pytest.mark.skipif(shutil.which("zsh") is None, reason="there is no zsh here")
def test_zsh(program: dict[str, str], url: str) -> None:
    zsh, setup = ["zsh", "-i"], 'autoload -U compinit; compinit -D -u; eval "$(ckptstore completion zsh)"'
    assert "val_loss" in typed(
        zsh, f"cd {url}/..; ln -s store x; {setup}", "ckptstore show x best:", program, "val_loss"
    )


@pytest.mark.skipif(shutil.which("fish") is None, reason="there is no fish here")
def test_fish(program: dict[str, str], url: str) -> None:
    def completed(words: str) -> list[str]:
        script = f"ckptstore completion fish | source; complete -C '{words}'"
        done = subprocess.run(
            ["fish", "-c", script], env=program, capture_output=True, text=True, check=True, timeout=60
        )
        return [line.partition("\t")[0] for line in done.stdout.splitlines()]

    assert completed("ckptstore ver") == ["verify"]
    assert completed(f"ckptstore show {url} best:") == ["best:val_loss"]
