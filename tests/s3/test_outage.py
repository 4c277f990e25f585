"""A network that goes away while a run saves costs a line in the log, and time; not the run."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

import pytest
import torch

import ckptstore as cs
from ckptstore.store import Store
from tests.s3.bucket import MemoryBucket
from tests.s3.test_throttling import options
from tests.s3.wire import Exchange, Fault, FaultyServer, Request


def opened(server: FaultyServer, **more: Any) -> Store:
    return cs.open("s3://bucket/runs/a", storage_options=options(server) | more)


class Network:
    """Is there until its ``last`` request, away as long as it is asked ``misses`` times, and back then."""

    def __init__(self, last: int, misses: int) -> None:
        self.last, self.misses = last, misses
        self.away = threading.Event()

    def choose(self, number: int, request: Request) -> Fault | None:
        return self._lost if self.last <= number < self.last + self.misses else None

    def _lost(self, exchange: Exchange) -> None:
        self.away.set()
        exchange.reset()


def state(step: int) -> dict[str, Any]:
    return {"model": {"weight": torch.arange(12 << 20, dtype=torch.float32) + step}, "n": step}


@pytest.mark.parametrize(("mode", "last"), [("sync", 0), ("async", 9)])
def test_a_save_is_taken_up_again(
    mode: Any, last: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("ckptstore.storage.retrying.TELL_S", 0.0)
    network = Network(last, misses=6)
    caplog.set_level(logging.WARNING, "ckptstore")
    with FaultyServer(MemoryBucket("bucket")) as server, opened(server) as store:
        store.save(state(0), step=0)
        server.arm(network.choose)
        saved = store.save(state(1), step=1, mode=mode)
        if isinstance(saved, cs.SaveHandle):
            saved.result()
        assert network.away.is_set()
        assert torch.equal(store.load("step:1")["model"]["weight"], state(1)["model"]["weight"])
        assert store.verify().ok
        assert store._storage.uploads() == []

    assert caplog.text.count("is tried again for 900 s") >= 1
    assert caplog.text.count("answers again") == caplog.text.count("is tried again for 900 s")


def test_training_goes_on_meanwhile() -> None:
    """A save in the background waits with its copy of the state; who skips, skips the next ones."""
    gone = threading.Event()

    def lost(exchange: Exchange) -> None:
        exchange.reset()

    with FaultyServer(MemoryBucket("bucket")) as server, opened(server) as store:
        store.save(state(0), step=0)
        gone.set()
        server.arm(lambda number, request: lost if gone.is_set() else None)
        handle = store.save(state(1), step=1, mode="async", when_busy="skip")
        assert isinstance(handle, cs.SaveHandle)
        for step in range(2, 6):
            assert store.save(state(step), step=step, mode="async", when_busy="skip") is None
            time.sleep(0.05)
        gone.clear()
        assert handle.result().step == 1
        assert server.fired
        assert [c.step for c in store.checkpoints()] == [0, 1]


def test_the_time_can_be_set() -> None:
    """And then the save fails, certainly, and the next one works."""
    with FaultyServer(MemoryBucket("bucket")) as server, opened(server, deadline_s=0.2) as store:
        store.save(state(0), step=0)
        server.arm(lambda number, request: (lambda exchange: exchange.reset()) if request.method == "PUT" else None)
        with pytest.raises(cs.SaveFailedError):
            store.save(state(1), step=1)
        server.disarm()
        store.save(state(2), step=2)
        assert [c.step for c in store.checkpoints()] == [0, 2]
