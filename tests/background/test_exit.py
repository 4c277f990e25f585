"""However a process ends or forks with a save in flight: nothing acknowledged is lost, and nobody hangs."""

from __future__ import annotations

import subprocess
import textwrap
from pathlib import Path

import pytest

import ckptstore as cs
from tests.background import scripts

PROLOGUE = """
import os, signal, sys, threading, time
import torch
import ckptstore as cs
from ckptstore.storage.localio import FileWriter

root, mode = sys.argv[1:3]
slow = threading.Event()
write = FileWriter.write

def slowly(*arguments):
    # The save is in flight when the process comes to its end.
    slow.set()
    time.sleep(0.5)
    write(*arguments)

model = torch.nn.Linear(256, 256)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
model.weight.grad, model.bias.grad = torch.ones_like(model.weight), torch.ones_like(model.bias)
optimizer.step()
state = {"model": model, "optimizer": optimizer}
with torch.no_grad():
    model.weight.fill_(1)
store = cs.open(root)
store.save(state, step=1)
with torch.no_grad():
    model.weight.fill_(2)
FileWriter.write = slowly
handle = store.save(state, step=2, mode=mode)
assert slow.wait(60) and not handle.done()
"""

# How the process ends → what it does, its exit code, whether the save in flight is there afterwards.
ENDS: dict[str, tuple[str, int, bool]] = {
    "end of the script": ("", 0, True),
    "sys.exit": ("sys.exit(3)", 3, True),
    "an exception": ("raise ValueError('mine')", 1, True),
    "no reference is left": ("del store, handle, model, optimizer, state", 0, True),
    "SystemExit in a handler": (
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)); os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)",
        143,
        True,
    ),
    "Ctrl-C": ("os.kill(os.getpid(), signal.SIGINT); time.sleep(9)", -2, True),
    "close": ("store.close()", 0, True),
    "a step": ("optimizer.step(); assert handle.result().step == 2", 0, True),
    "SIGTERM": ("os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)", -15, False),
    "SIGKILL": ("os.kill(os.getpid(), signal.SIGKILL)", -9, False),
    "os._exit": ("os._exit(5)", 5, False),
    "Ctrl-C twice": (
        "threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "try:\n    os.kill(os.getpid(), signal.SIGINT); time.sleep(9)\n"
        "except KeyboardInterrupt:\n    handle.wait()",
        -2,
        True,
    ),
    "Ctrl-C, and again in close": (
        "threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "with store:\n    os.kill(os.getpid(), signal.SIGINT); time.sleep(9)",
        -2,
        True,
    ),
    "Ctrl-C until it is abandoned": (
        "for late in (0.15, 0.3):\n    threading.Timer(late, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "with store:\n    os.kill(os.getpid(), signal.SIGINT); time.sleep(9)",
        -2,
        False,
    ),
}


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a script; one that hangs fails."""
    return scripts.run(PROLOGUE + textwrap.dedent(code), *arguments)


SAMPLED = {"SIGKILL"}
"""The ends that are tried in both modes in every run; the others in both only in the complete one."""


RARE = {
    "Ctrl-C twice",
    "Ctrl-C until it is abandoned",
    "Ctrl-C, and again in close",
    "os._exit",
    "sys.exit",
    "an exception",
    "no reference is left",
}
"""Those that differ little from another one: only in the complete run."""


@pytest.mark.parametrize(
    ("end", "mode"),
    [pytest.param(end, "async", marks=() if end in SAMPLED else pytest.mark.full) for end in ENDS]
    + [pytest.param(end, "overlapped", marks=pytest.mark.full if end in RARE else ()) for end in ENDS],
)
def test_ending_with_a_save_in_flight(end: str, mode: str, store_path: Path) -> None:
    """A process that ends by itself completes the save; a killed one leaves what prune collects."""
    code, expected, complete = ENDS[end]
    done = run(code, str(store_path), mode)
    assert done.returncode == expected, done.stderr
    assert "Traceback" not in done.stderr or end.startswith(("an exception", "Ctrl-C")), done.stderr
    with cs.open(store_path) as store:
        assert [c.step for c in store.checkpoints()] == [1, 2][: 1 + complete]
        report = store.verify()
        assert (report.ok, bool(report.leftovers)) == (True, not complete)
        weight = store.load("latest", only=["model/*"])["model"]["weight"]
        assert (weight == 1 + complete).all()
        store.prune(grace_s=0)
        assert not store.verify().leftovers
        store.save({"x": 1}, step=3)


def test_a_failure_that_nobody_asked_for_is_told_at_the_end(store_path: Path) -> None:
    """The process ends as it would, and says on stderr that its last save failed."""
    code = """
    def broken(*arguments):
        raise OSError(28, "No space left on device")
    handle.wait()
    FileWriter.write = broken
    store.save(state, step=3, mode=mode)
    """
    done = run(code, str(store_path), "async")
    assert done.returncode == 0
    assert "a save in the background failed" in done.stderr
    assert "step3" in done.stderr
    assert [c.step for c in cs.open(store_path).checkpoints()] == [1, 2]


AFTERWARDS = """
    optimizer.step()
    assert handle.result().step == 2
    """

FORKS = {
    "os.fork": """
    pid = os.fork()
    if pid == 0:
        for ask in (handle.wait, handle.wait_staged, lambda: store.save(state, step=9)):
            try:
                ask()
            except cs.CheckpointError as error:
                assert "fork" in str(error)
            else:
                os._exit(7)
        optimizer.step()
        assert (cs.open(root, read_only=True).load("step:1", only=["model/*"])["model"]["weight"] == 1).all()
        store.close()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    """,
    "a child that ends by itself": """
    pid = os.fork()
    if pid == 0:
        optimizer.step()
        sys.exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    """,
    "DataLoader": """
    loader = torch.utils.data.DataLoader(list(range(64)), batch_size=4, num_workers=2, multiprocessing_context="fork")
    assert sum(len(batch) for batch in loader) == 64
    """,
}


@pytest.mark.parametrize("mode", [pytest.param("async", marks=pytest.mark.full), "overlapped"])
@pytest.mark.parametrize("fork", FORKS)
def test_forking_with_a_save_in_flight(fork: str, mode: str, store_path: Path) -> None:
    """Children neither hang nor spoil the save; what they can't do they are told."""
    done = run(FORKS[fork] + AFTERWARDS, str(store_path), mode)
    assert done.returncode == 0, done.stderr
    with cs.open(store_path, read_only=True) as store:
        assert [c.step for c in store.checkpoints()] == [1, 2]
        assert (store.load(only=["model/*"])["model"]["weight"] == 2).all()
        assert store.verify().ok
