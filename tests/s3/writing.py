"""Writers in processes of their own, and what must hold of a store after one of them has died."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ckptstore
from ckptstore.format.layout import parse_id
from ckptstore.storage.s3 import S3Storage
from ckptstore.store import Store
from tests.faults.outcome import read
from tests.faults.worker import tensors


class Writer:
    """A running ``writer.py``. It keeps account of what it was told."""

    def __init__(self, url: str, options: dict[str, Any], first: int, backup: str = "") -> None:
        self.saved: list[str] = []
        self.unknown: list[str] = []
        self.stale = False
        environment = os.environ | {"PYTHONPATH": str(Path(ckptstore.__file__).parents[1])}
        command = [sys.executable, "-m", "tests.s3.writer", url, json.dumps(options), str(first), backup]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        self._listener = threading.Thread(target=self._listen)
        self._listener.start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            word, _, what = line.strip().partition(" ")
            if word == "saved":
                self.saved.append(what)
            elif word == "unknown":
                self.unknown.append(what)
            self.stale = self.stale or word == "stale"

    def wait_saved(self, count: int) -> None:
        """Return when it has saved that many, or ended."""
        while len(self.saved) < count and self.process.poll() is None:
            time.sleep(0.02)
        assert len(self.saved) >= count

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)

    def end(self) -> int:
        """Its exit status, once it has ended."""
        status = self.process.wait()
        self._listener.join()
        assert self.process.stdout is not None
        self.process.stdout.close()
        return status


@contextmanager
def writing(url: str, options: dict[str, Any], first: int, backup: str = "") -> Iterator[Writer]:
    writer = Writer(url, options, first, backup)
    try:
        yield writer
    finally:
        if writer.process.poll() is None:
            writer.signal(signal.SIGKILL)
        writer.end()


def check(store: Store, saved: list[str], unknown: list[str]) -> None:
    """What was acknowledged is there, bit by bit, and nothing else but what may have been saved."""
    found = {checkpoint.id: checkpoint for checkpoint in store.checkpoints()}
    assert set(saved) <= set(found)
    # A writer may have been killed before it could say so of its last one.
    unsaid = [parse_id(id).writer for id in found if id not in {*saved, *unknown}]
    assert len(unsaid) == len(set(unsaid))
    for checkpoint in found.values():
        assert read(store, checkpoint) == tensors(checkpoint.step)


def check_end(store: Store) -> None:
    """Nothing is left of what was broken off."""
    store.prune()
    store.prune(grace_s=0)
    report = store.verify()
    assert report.ok, report.damages
    assert not report.leftovers
    assert isinstance(store._storage, S3Storage)
    assert store._storage.uploads() == []
