"""``ckptstore bisect``."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

import ckptstore
from tests.cli.conftest import Run, data_file, flip, started


def looking_at(*args: str, good: str = "step:10", bad: str = "latest") -> list[str]:
    return ["--good", good, "--bad", bad, *args]


def test_what_a_person_sees(run: Run, url: str, ids: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    """Each step on stderr, the answer on stdout, with what changed between the two."""
    answer = run("bisect", url, *looking_at("--", "sh", "-c", "echo said; test {step} -lt 30"))
    assert answer.exit_code == 0
    first_bad, last_good, between = answer.stdout.splitlines()
    assert first_bad.startswith(f"first bad: {ids[2]} (step 30, ")
    assert last_good.startswith(f"last good: {ids[1]} (step 20, ")
    assert between == "between: 10 steps, 1 epoch, val_loss 1 to 2"
    assert answer.stderr.splitlines()[:2] == [
        f"good     step 10  {ids[0]}; at most 1 more test",
        f"bad      step 30  {ids[2]}; at most 1 more test",
    ]
    assert capfd.readouterr() == ("", "said\n" * 3)


def test_json(run: Run, url: str, ids: list[str]) -> None:
    found = run("bisect", url, "--json", *looking_at("--", "sh", "-c", "test {step} -lt 20", "--json")).json
    assert (found["first_bad"]["id"], found["last_good"]["id"]) == (ids[1], ids[0])
    assert (found["undecided"], found["steps"]) == ([], 10)
    assert [trial["verdict"] for trial in found["trials"]] == ["good", "bad", "bad"]
    trusted = run("bisect", url, "--json", "--trust-ends", *looking_at("--", "test", "{step}", "-lt", "20")).json
    assert [trial["step"] for trial in trusted["trials"]] == [20]


def test_what_stands_behind_the_dashes_is_the_commands_own(run: Run, url: str) -> None:
    """Its --json asks for nothing here."""
    answer = run("bisect", url, *looking_at("--", "false", "--json"))
    assert (answer.exit_code, answer.stdout) == (2, "")
    assert "was given as good, and the test says bad" in answer.stderr


def test_only_narrowed_down_is_bad_news(run: Run, url: str, ids: list[str]) -> None:
    answer = run("bisect", url, *looking_at("--", "sh", "-c", "test {step} = 20 && exit 125; test {step} -lt 20"))
    assert answer.exit_code == 1
    assert "skipped  step 20" in answer.stderr
    assert f"  {ids[1]} (step 20, " in answer.stdout
    assert f"{ids[2]} (step 30, " in answer.stdout
    flip(data_file(url, ids[1]), 5000)
    damaged = run("bisect", url, *looking_at("--", "test", "{step}", "-lt", "20"))
    assert damaged.exit_code == 1
    assert f"damaged  step 20  {ids[1]} (block 0 of" in damaged.stderr


def test_wrong_use(run: Run, url: str) -> None:
    for args, says in (
        (["--good", "step:10", "--", "true"], "Missing option '--bad'"),
        (looking_at(), "Missing argument"),
        (looking_at("--", "no-such-command"), "no-such-command can't be run"),
        (looking_at("--", "sh", "-c", "kill -9 $$"), "signal 9 ended it"),
        (looking_at("--", "true", good="latest", bad="step:10"), "swap them"),
        (looking_at("--dir", "/no/such/folder", "--", "test", "-f", "{path}"), "has no room for exports"),
    ):
        answer = run("bisect", url, *args)
        assert (answer.exit_code, answer.stdout) == (2, "")
        assert says in answer.stderr


def test_exports_are_made_for_the_command_and_removed(run: Run, url: str, tmp_path: Path) -> None:
    """``{path}`` is a file that torch loads; of --only just a part of it."""
    exports, copies = tmp_path / "exports", tmp_path / "copies"
    exports.mkdir()
    copies.mkdir()
    script = f"cp '{{path}}' '{copies}/{{step}}.pt' && test {{step}} -lt 30"
    answer = run("bisect", url, *looking_at("--dir", exports, "--only", "model/head*", "--", "sh", "-c", script))
    assert answer.exit_code == 0
    assert "first bad: " in answer.stdout
    assert list(exports.iterdir()) == []
    assert sorted(path.name for path in copies.iterdir()) == ["10.pt", "20.pt", "30.pt"]
    loaded = torch.load(copies / "20.pt", weights_only=True)
    with ckptstore.open(url, read_only=True) as store:
        expected = store.load("step:20", only=["model/head*"])
    assert list(loaded["model"]) == list(expected["model"]) == ["head.weight"]
    assert torch.equal(loaded["model"]["head.weight"], expected["model"]["head.weight"])


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.full)]
)
def test_a_search_that_is_broken_off_leaves_no_export(url: str, tmp_path: Path, signum: int, code: int) -> None:
    script = f"touch '{tmp_path}/begun'; : '{{path}}'; exec sleep 100"
    args = looking_at("--dir", str(tmp_path / "exports"), "--", "sh", "-c", script)
    (tmp_path / "exports").mkdir()
    with started("bisect", url, *args, until=(tmp_path / "begun").exists) as child:
        assert list((tmp_path / "exports").iterdir()) != []
        child.send_signal(signum)
        stdout, _ = child.communicate(timeout=60)
    assert (child.returncode, stdout) == (code, "")
    assert list((tmp_path / "exports").iterdir()) == []
