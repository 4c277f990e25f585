"""The end of the interpreter, and interrupts: what was begun is finished, or undone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import ckptstore
from tests.s3.bucket import MemoryBucket
from tests.s3.cases import same
from tests.s3.test_throttling import options
from tests.s3.wire import Exchange, Fault, FaultyServer, Request

SLOW_S = 0.15

LEAVING = """
import sys, torch, ckptstore
options = {"key": "k", "secret": "s", "endpoint_url": sys.argv[1], "client_kwargs": {"region_name": "us-east-1"}}
store = ckptstore.open("s3://bucket/runs/a", storage_options=options)
store.save({"w": torch.arange(100_000)}, step=1, mode="async")
"""


def slow(number: int, request: Request) -> Fault:
    """Every answer takes its time, and ends its connection: the next request needs a new one."""

    def act(exchange: Exchange) -> None:
        time.sleep(SLOW_S)
        exchange.answer(exchange.apply())
        exchange.close()

    return act


@pytest.mark.parametrize("host", ["localhost", pytest.param("127.0.0.1", marks=pytest.mark.full)])
def test_a_save_outlives_the_script(host: str) -> None:
    """A script ends right after it began a save in the background, whose connections all have yet to be made."""
    bucket = MemoryBucket("bucket")
    with FaultyServer(bucket) as server:
        server.arm(slow)
        endpoint = f"http://{host}:{server.port}"
        environment = os.environ | {"PYTHONPATH": str(Path(ckptstore.__file__).parents[1])}
        done = subprocess.run(
            [sys.executable, "-c", LEAVING, endpoint], env=environment, capture_output=True, text=True, check=False
        )
        server.disarm()
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        with ckptstore.open("s3://bucket/runs/a", storage_options=options(server)) as store:
            assert [checkpoint.step for checkpoint in store.checkpoints()] == [1]
            assert same(store.load(), {"w": torch.arange(100_000)})
    assert len(server.fired) >= 10


class Interrupter:
    """Presses Ctrl-C when the ``nth`` request of that sort is there, and applies it a little later."""

    def __init__(self, sort: str, nth: int = 1) -> None:
        self.sort, self.left, self.pressed = sort, nth, 0

    def choose(self, number: int, request: Request) -> Fault | None:
        return self._act if request.operation == self.sort else None

    def _act(self, exchange: Exchange) -> None:
        self.left -= 1
        if self.left == 0:
            self.pressed += 1
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            time.sleep(SLOW_S)
        exchange.answer(exchange.apply())


@pytest.mark.parametrize("threads", [1, pytest.param(4, marks=pytest.mark.full)])
@pytest.mark.parametrize("sort", ["Head", "Begin", "Part", "Complete", "Put"])
def test_an_interrupted_save_leaves_no_upload(monkeypatch: pytest.MonkeyPatch, sort: str, threads: int) -> None:
    """Wherever Ctrl-C comes, every upload is completed or aborted, and the store goes on."""
    monkeypatch.setattr("ckptstore.storage.s3.upload.LEAST_PART_BYTES", 1)
    bucket = MemoryBucket("bucket")
    state: dict[str, Any] = {"table": torch.arange(5 << 19), "more": torch.arange(10)}
    with FaultyServer(bucket) as server:
        store = ckptstore.open("s3://bucket/runs/a", storage_options=options(server), threads=threads)
        store.save({"w": torch.ones(3)}, step=1)
        interrupter = Interrupter(sort)
        server.arm(interrupter.choose)

        with pytest.raises(KeyboardInterrupt):
            store.save(state, step=2)

        server.disarm()
        assert interrupter.pressed == 1
        # What the server was in the midst of.
        time.sleep(2 * SLOW_S)
        assert store._storage.uploads() == []
        assert [checkpoint.step for checkpoint in store.checkpoints()][:1] == [1]
        store.save(state, step=3)
        assert same(store.load(), state)
        store.prune(grace_s=0)
        assert store.verify().ok
        store.close()
