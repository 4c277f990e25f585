"""A server that asks to slow down gets fewer requests at a time, not an error."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest
import torch

import ckptstore
from ckptstore.storage.s3.gate import Gate
from tests.s3.bucket import MemoryBucket, error
from tests.s3.wire import Exchange, Fault, FaultyServer, Request

TOLERATED = 2
SERVED_S = 0.03


class Strict:
    """Answers "slow down" whenever more than ``TOLERATED`` requests are there at a time."""

    def __init__(self) -> None:
        self.inside = 0
        self.seen: list[int] = []
        self.refused = 0
        self._lock = threading.Lock()

    def choose(self, number: int, request: Request) -> Fault | None:
        return self._serve if request.operation in ("Part", "Get") else None

    def _serve(self, exchange: Exchange) -> None:
        with self._lock:
            self.inside += 1
            self.seen.append(self.inside)
            refuse = self.inside > TOLERATED
            self.refused += refuse
        try:
            time.sleep(SERVED_S)
            exchange.answer(error(503, "SlowDown") if refuse else exchange.apply())
        finally:
            with self._lock:
                self.inside -= 1


def options(server: FaultyServer) -> dict[str, Any]:
    return {
        "key": "ci-access",
        "secret": "ci-secret",
        "endpoint_url": f"http://127.0.0.1:{server.port}",
        "client_kwargs": {"region_name": "us-east-1"},
    }


def test_slow_down_slows_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """A save and a load succeed, and the number in flight comes down to what the server bears."""
    monkeypatch.setattr("ckptstore.storage.s3.upload.LEAST_PART_BYTES", 1)
    strict = Strict()
    state = {"table": torch.arange(40 << 20, dtype=torch.int32)}
    with FaultyServer(MemoryBucket("bucket")) as server:
        server.arm(strict.choose)
        with ckptstore.open("s3://bucket/runs/a", storage_options=options(server), threads=8) as store:
            assert store.save(state, step=1).step == 1
            uploading = list(strict.seen)
            loaded = store.load()
            limit = store._storage._client._gate.limit  # type: ignore[attr-defined]

    assert torch.equal(loaded["table"], state["table"])
    assert strict.refused
    assert max(uploading) > TOLERATED, "nothing was asked too much"
    assert max(strict.seen[-5:]) <= TOLERATED + 1
    assert limit < 8


def test_each_refusal_halves_and_each_success_adds_a_little() -> None:
    """Refusals of what was sent before the last halving count as one."""

    async def play() -> None:
        gate = Gate(16, lambda error: isinstance(error, OSError))
        turn = asyncio.Event()

        async def request(outcome: BaseException | None) -> None:
            async with gate.passing():
                await turn.wait()
                if outcome is not None:
                    raise outcome

        flying = [asyncio.ensure_future(request(OSError("slow down"))) for _ in range(8)]
        await asyncio.sleep(0)
        turn.set()
        await asyncio.gather(*flying, return_exceptions=True)
        assert gate.limit == 4

        with pytest.raises(ValueError, match="something else"):
            await request(ValueError("something else"))
        assert gate.limit == 4

        for _ in range(4):
            await request(None)
        assert 4.9 < gate.limit < 5

        for _ in range(10):
            await asyncio.gather(request(OSError("slow down")), return_exceptions=True)
        assert gate.limit == 1

        for _ in range(1000):
            await request(None)
        assert gate.limit == 16

    asyncio.run(play())


def test_no_turn_is_lost() -> None:
    """Whoever is cancelled, while waiting or inside, keeps nobody out."""

    async def play() -> None:
        gate = Gate(2, lambda error: False)
        inside, most = 0, 0

        async def request() -> None:
            nonlocal inside, most
            async with gate.passing():
                inside += 1
                most = max(most, inside)
                try:
                    await asyncio.sleep(0.001)
                finally:
                    inside -= 1

        flying = [asyncio.ensure_future(request()) for _ in range(40)]
        await asyncio.sleep(0.002)
        for task in flying[::3]:
            task.cancel()
        ended = await asyncio.gather(*flying, return_exceptions=True)
        assert sum(end is None for end in ended) >= 26
        assert most == 2
        await request()

    asyncio.run(play())
