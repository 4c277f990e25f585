"""Writers that are killed or stopped anywhere, and others that take over, on a real server."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import ckptstore
from ckptstore.format.layout import parse_id
from ckptstore.storage.s3 import S3Storage
from ckptstore.store import Store
from tests.faults.outcome import read
from tests.faults.points import SEED, named
from tests.faults.worker import tensors
from tests.s3.seaweed import Seaweed
from tests.s3.writer import STALE


class Writer:
    """A running ``writer.py``. It keeps account of what it was told."""

    def __init__(self, url: str, server: Seaweed, first: int) -> None:
        self.saved: list[str] = []
        self.unknown: list[str] = []
        self.stale = False
        environment = os.environ | {"PYTHONPATH": str(Path(ckptstore.__file__).parents[1])}
        command = [sys.executable, "-m", "tests.s3.writer", url, json.dumps(server.options), str(first)]
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
def writing(url: str, server: Seaweed, first: int) -> Iterator[Writer]:
    writer = Writer(url, server, first)
    try:
        yield writer
    finally:
        if writer.process.poll() is None:
            writer.signal(signal.SIGKILL)
        writer.end()


@pytest.fixture
def url(bucket: str, prefix: str) -> str:
    return f"s3://{bucket}/{prefix}"


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


@pytest.mark.timeout(1200)
def test_writers_killed_one_after_the_other(server: Seaweed, url: str, full: bool) -> None:
    """No acknowledged save is lost, and ``latest`` never goes back."""
    choose = random.Random(SEED)
    saved: list[str] = []
    unknown: list[str] = []
    latest = None
    store = ckptstore.open(url, storage_options=server.options)

    for number in range(20 if full else 2):
        with named(f"writer {number}"), writing(url, server, 100 * number) as writer:
            writer.wait_saved(1)
            time.sleep(choose.uniform(0, 0.3))
            writer.signal(signal.SIGKILL)
            assert writer.end() == -signal.SIGKILL
            saved += writer.saved
            unknown += writer.unknown
            newest = store.resolve().order
            assert newest >= parse_id(writer.saved[-1])
            assert latest is None or newest > latest
            latest = newest
            check(store, saved, unknown)

    check_end(store)


@pytest.mark.timeout(1200)
def test_a_writer_that_sleeps_is_replaced(server: Seaweed, url: str, full: bool) -> None:
    """When it wakes up, it is told so; it never becomes ``latest`` again, and removes nothing of its successor's."""
    choose = random.Random(SEED)
    saved: list[str] = []
    unknown: list[str] = []
    store = ckptstore.open(url, storage_options=server.options)

    for number in range(8 if full else 1):
        with (
            named(f"zombie {number}"),
            writing(url, server, 1000 * number) as zombie,
        ):
            zombie.wait_saved(1)
            time.sleep(choose.uniform(0, 0.2))
            zombie.signal(signal.SIGSTOP)
            with writing(url, server, 1000 * number + 500) as heir:
                heir.wait_saved(2)
                store.prune()
                zombie.signal(signal.SIGCONT)
                assert zombie.end() == STALE
                assert zombie.stale
                assert store.resolve().order.writer == parse_id(heir.saved[0]).writer
                heir.wait_saved(len(heir.saved) + 1)
                heir.signal(signal.SIGKILL)
                assert heir.end() == -signal.SIGKILL
            saved += zombie.saved + heir.saved
            unknown += zombie.unknown + heir.unknown
            assert store.resolve().order >= parse_id(heir.saved[-1])
            check(store, saved, unknown)

    check_end(store)
