"""The command as its users start it: a process with pipes, a terminal, signals, and no torch."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

import ckptstore
from tests.cli.conftest import environment, interrupt, process, started, told

NAMED = ("bench", "verify", "doctor", "init", "plan", "du", "bisect")
HEAVY = ("torch", "numpy", "pydantic", "rich", "blake3", "zstandard", "safetensors", "ruamel.yaml", "matplotlib")


@pytest.mark.parametrize("args", ["--help", "--version", *(f"{name} --help" for name in NAMED)])
def test_help_imports_nothing_heavy(args: str) -> None:
    """So that it answers at once."""
    program = (
        "import sys\n"
        "from ckptstore.cli.main import main\n"
        "try:\n    main()\n"
        "finally:\n    print([name for name in sys.modules], file=sys.stderr)\n"
    )
    command = [sys.executable, "-c", program, *args.split()]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=60, check=True)
    loaded = set(eval(done.stderr))
    assert done.stdout
    assert "ckptstore.cli.main" in loaded
    assert not loaded.intersection(HEAVY)


@pytest.fixture
def no_torch(tmp_path: Path) -> str:
    """A folder that, first on the path, makes importing torch fail."""
    folder = tmp_path / "no-torch"
    folder.mkdir()
    (folder / "torch.py").write_text('raise ImportError("torch is not here")\n')
    return str(folder)


def test_looking_needs_no_torch(url: str, ids: list[str], no_torch: str) -> None:
    """Machines that watch training runs have none."""
    program = [sys.executable, "-c", "import torch"]
    broken = subprocess.run(program, env=environment(first=no_torch), stderr=subprocess.PIPE, check=False)
    assert b"torch is not here" in broken.stderr
    listed = process("ls", url, "--json", first=no_torch)
    assert [c["id"] for c in listed.json["checkpoints"]] == ids
    assert process("show", url, first=no_torch).exit_code == 0
    assert process("du", url, first=no_torch).exit_code == 0
    assert process("verify", url, first=no_torch).exit_code == 0
    for command, *args in (["hold", "latest", "a"], ["release", "a"], ["delete", "latest", "--yes"], ["prune"]):
        assert process(command, url, *args, first=no_torch).exit_code == 0
    assert process("doctor", url, "--size", "2MB", "--json", first=no_torch).json["blocks"]


def test_bench_says_that_it_needs_torch(tmp_path: Path, no_torch: str) -> None:
    answer = process("bench", tmp_path, "--json", first=no_torch)
    assert (answer.exit_code, answer.json["error"]["code"]) == (2, "no_torch")
    assert "pip install torch" in answer.stderr
    assert "Traceback" not in answer.stderr


def ended_into(stdout: int, *args: str) -> tuple[int, str]:
    """Run with stdout at a descriptor, which is closed then: exit code and stderr."""
    command = [sys.executable, "-m", "ckptstore.cli", *args]
    try:
        done = subprocess.run(
            command, stdout=stdout, stderr=subprocess.PIPE, text=True, env=environment(), timeout=60, check=False
        )
    finally:
        os.close(stdout)
    return done.returncode, done.stderr


def test_a_reader_that_leaves_is_no_error(url: str) -> None:
    """As in ``ckptstore show … | head -1``."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    assert ended_into(write_end, "show", url) == (141, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
def test_a_full_disk_behind_stdout_is_one_line(url: str) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    assert ended_into(full, "show", url) == (2, "error: the answer can't be written: No space left on device\n")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
def test_a_full_disk_behind_a_long_document_is_one_line(store_path: Path) -> None:
    """A document over the size of a buffer fails while it is written, and so would the error's own document."""
    with ckptstore.open(store_path) as store:
        store.save({f"value {number}": number for number in range(10_000)}, step=1)
    full = os.open("/dev/full", os.O_WRONLY)
    code, said = ended_into(full, "show", str(store_path), "--json")
    assert (code, said) == (2, "error: the answer can't be written: No space left on device\n")


def in_terminal(args: list[str], said: bytes = b"") -> tuple[int, str, bytes]:
    """Run with stdin and stderr at a pseudo terminal: exit code, what it said there, and stdout."""
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "ckptstore.cli", *args]
    child = subprocess.Popen(
        command, stdin=follower, stdout=subprocess.PIPE, stderr=follower, env=environment(TERM="xterm")
    )
    os.close(follower)
    os.write(leader, said)
    seen = told(leader)
    stdout, _ = child.communicate(timeout=60)
    os.close(leader)
    return child.returncode, seen.decode(), stdout


def test_progress_goes_to_a_terminal_only(url: str) -> None:
    """The bar is on stderr, and stdout is the same as without it."""
    code, seen, stdout = in_terminal(["verify", url])
    assert code == 0
    assert "verifying" in seen
    assert stdout.startswith(b"good: 3 checkpoints")
    assert "verifying" not in process("verify", url).stderr


def test_a_narrow_terminal_cuts_no_id(url: str, ids: list[str]) -> None:
    """Lines break rather than lose what selects a checkpoint."""
    leader, follower = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-m", "ckptstore.cli", "ls", url],
        stdout=follower,
        env=environment(TERM="xterm", COLUMNS="30"),
        timeout=60,
        check=True,
    )
    seen = os.read(leader, 65536).decode()
    os.close(follower)
    os.close(leader)
    assert done.returncode == 0
    assert all(id[:11] in seen for id in ids)
    assert "every 10 steps" in seen


def test_delete_asks_at_a_real_terminal(url: str, ids: list[str]) -> None:
    code, seen, stdout = in_terminal(["delete", url, "latest", "--json"], said=b"n\n")
    assert code == 1
    assert f"Delete {ids[2]}" in seen
    assert b'"declined"' in stdout
    assert [c["id"] for c in process("ls", url, "--json").json["checkpoints"]] == ids


def test_ctrl_c_ends_bench_and_removes_its_files(tmp_path: Path) -> None:
    """One line, exit code 130, nothing left."""
    places = lambda: list(tmp_path.glob("bench-*/ckptstore-*"))  # noqa: E731
    with started("bench", tmp_path, "--size", "20MB", "--rounds", "10000", until=places) as child:
        assert interrupt(child) == (130, "", "interrupted\n")
    assert list(tmp_path.iterdir()) == []
