"""Saves begun by those whom Python doesn't wait for, or who come when it has waited already."""

from __future__ import annotations

from pathlib import Path

import pytest

import ckptstore as cs
from tests.background import scripts

PROLOGUE = """
import atexit, sys, threading, time
import torch
import ckptstore as cs
from ckptstore.storage.localio import FileWriter

root, mode = sys.argv[1:3]
model = torch.nn.Linear(256, 256)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
state = {"model": model, "optimizer": optimizer}
store = cs.open(root)
store.save(state, step=1)
write, slow = FileWriter.write, threading.Event()

def slowly(*arguments):
    slow.set()
    time.sleep(0.5)
    write(*arguments)

FileWriter.write = slowly

def save():
    handle = store.save(state, step=2, mode=mode)
    return handle
"""


def run(code: str, *arguments: str) -> None:
    """A script that ends well, and not by being ended."""
    done = scripts.run(PROLOGUE + code, *arguments)
    assert (done.returncode, done.stderr) == (0, "")


def check(path: Path) -> None:
    with cs.open(path, read_only=True) as store:
        assert [checkpoint.step for checkpoint in store.checkpoints()] == [1, 2]
        report = store.verify()
        assert report.ok
        assert not report.leftovers


BEGUN = {
    "a daemon thread": """
caller = threading.Thread(target=save, daemon=True)
caller.start()
caller.join()
assert slow.wait(60)
""",
    "a function at exit": "atexit.register(lambda: save())",
    "a thread after the main one": """
def late():
    threading.main_thread().join()
    save()
threading.Thread(target=late).start()
""",
}


@pytest.mark.parametrize("mode", ["async", pytest.param("overlapped", marks=pytest.mark.full)])
@pytest.mark.parametrize(
    "begun", [pytest.param(one, marks=pytest.mark.full if one == "a daemon thread" else ()) for one in BEGUN]
)
def test_a_save_outlives_whoever_began_it(store_path: Path, begun: str, mode: str) -> None:
    """Python ends only when it is durable, also where it drops the caller, or has waited for threads already."""
    run(BEGUN[begun], str(store_path), mode)
    check(store_path)
