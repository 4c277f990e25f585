"""Writers in processes of their own, and what must hold of a store after one of them has died."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ckptstore.format.layout import parse_id
from ckptstore.storage.s3 import S3Storage
from ckptstore.store import Store
from tests.faults.outcome import read
from tests.faults.worker import tensors
from tests.forked import CONTEXT, preload
from tests.s3.writer import tell

preload("ckptstore.storage.s3", "tests.s3.writer")


class Writer:
    """A running ``writer.py``. It keeps account of what it was told."""

    def __init__(self, url: str, options: dict[str, Any], first: int, backup: str = "") -> None:
        self.saved: list[str] = []
        self.unknown: list[str] = []
        self.stale = False
        self._told, pipe = CONTEXT.Pipe(duplex=False)
        arguments = (pipe, dict(os.environ), url, json.dumps(options), first, backup)
        self.process = CONTEXT.Process(target=tell, args=arguments)
        self.process.start()
        pipe.close()
        self._listener = threading.Thread(target=self._listen)
        self._listener.start()

    def _listen(self) -> None:
        with open(self._told.fileno(), closefd=False) as lines:
            for line in lines:
                word, _, what = line.strip().partition(" ")
                if word == "saved":
                    self.saved.append(what)
                elif word == "unknown":
                    self.unknown.append(what)
                self.stale = self.stale or word == "stale"

    def wait_saved(self, count: int) -> None:
        """Return when it has saved that many, or ended."""
        while len(self.saved) < count and self.process.is_alive():
            time.sleep(0.02)
        assert len(self.saved) >= count

    def signal(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def end(self) -> int:
        """Its exit status, once it has ended."""
        self.process.join()
        self._listener.join()
        self._told.close()
        assert self.process.exitcode is not None
        return self.process.exitcode


@contextmanager
def writing(url: str, options: dict[str, Any], first: int, backup: str = "") -> Iterator[Writer]:
    writer = Writer(url, options, first, backup)
    try:
        yield writer
    finally:
        if writer.process.is_alive():
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
