"""A small store, and ways to call the command line on it: in this process and as a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

import ckptstore
from ckptstore.cli.main import cli

SOURCE = Path(ckptstore.__file__).parents[1]


@dataclass
class Answer:
    """What a command said."""

    exit_code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        return json.loads(self.stdout)


Run = Callable[..., Answer]


@pytest.fixture
def run() -> Run:
    """Call the command line in this process; an exception that gets through is the test's failure."""

    def call(*args: str, input: str | None = None) -> Answer:
        result: Result = CliRunner().invoke(cli, [str(arg) for arg in args], input=input, prog_name="ckptstore")
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Answer(result.exit_code, result.stdout, result.stderr)

    return call


def environment(**extra: str) -> dict[str, str]:
    """Variables for a process that finds the package and nothing of the user's settings."""
    path = os.pathsep.join(filter(None, (extra.pop("first", ""), str(SOURCE))))
    kept = {name: value for name, value in os.environ.items() if not name.startswith("CKPTSTORE_")}
    return {**kept, "PYTHONPATH": path, **extra}


@contextmanager
def started(*args: object, until: Callable[[], object]) -> Iterator[subprocess.Popen[str]]:
    """The command line as a process of its own that has come so far that ``until`` holds; killed at the latest here."""
    command = [sys.executable, "-m", "ckptstore.cli", *map(str, args)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
    try:
        while not until():
            assert child.poll() is None, child.communicate()
            time.sleep(0.01)
        yield child
    finally:
        child.kill()


def interrupt(child: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Press Ctrl-C: exit code, stdout and stderr."""
    child.send_signal(signal.SIGINT)
    stdout, stderr = child.communicate(timeout=60)
    return child.returncode, stdout, stderr


def process(*args: object, **extra: str) -> Answer:
    """Call the command line as a process of its own."""
    command = [sys.executable, "-m", "ckptstore.cli", *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(**extra), timeout=120, check=False)
    return Answer(done.returncode, done.stdout, done.stderr)


def state(step: int) -> dict[str, Any]:
    """A state whose tensors differ from step to step."""
    model = {
        "layers.0.weight": torch.full((64, 64), float(step)),
        "layers.0.bias": torch.arange(64.0),
        "head.weight": torch.ones(8, 64, dtype=torch.bfloat16),
    }
    return {
        "model": model,
        "plain": {"lr": 0.001, "names": ["a", "b"], "history": list(range(50)), "nan": float("nan")},
    }


@pytest.fixture
def url(store_path: Path) -> str:
    """A store with checkpoints of steps 10, 20 and 30; step 20 has the best loss."""
    with ckptstore.open(store_path) as store:
        for step, loss in ((10, 3.0), (20, 1.0), (30, 2.0)):
            store.save(state(step), step=step, epoch=step // 10, metrics={"val_loss": loss}, reasons=["every 10 steps"])
    return str(store_path)


@pytest.fixture
def ids(url: str) -> list[str]:
    """The ids in the store, oldest first."""
    with ckptstore.open(url, read_only=True) as store:
        return [checkpoint.id for checkpoint in store.checkpoints()]


def data_file(url: str, id: str) -> Path:
    """The data file with the model's tensors."""
    return Path(url) / "checkpoints" / id / "model.safetensors"


def flip(path: Path, offset: int) -> None:
    """Change one byte of a file."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 0xFF
    path.write_bytes(data)
    assert path.read_bytes()[offset] == data[offset]


def told(leader: int) -> bytes:
    """All that is said at a pseudo terminal."""
    seen = b""
    try:
        while chunk := os.read(leader, 65536):
            seen += chunk
    except OSError:
        # Linux reports the end of a terminal so.
        pass
    return seen
