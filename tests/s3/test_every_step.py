"""Writers that are killed or stopped at each of their requests, before the server got it and after it did it."""

from __future__ import annotations

import queue
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import ckptstore
from ckptstore.format.layout import parse_id
from ckptstore.store import Store
from tests.faults.points import SEED, named
from tests.faults.worker import save
from tests.s3.bucket import MemoryBucket
from tests.s3.wire import Exchange, Fault, FaultyServer, Request
from tests.s3.writer import STALE, opened
from tests.s3.writing import Writer, check, check_end, writing

BACKUP = "s3://bucket/runs/a"
EVERY = 71
"""Of so many requests, a sampled run breaks one, once before and once after it."""
HANG_S = 60.0
MEASURED: dict[bool, list[Request]] = {}
"""The requests of a writer without and with a backup."""


@dataclass
class Scene:
    """A bucket, and the store: in it, or, with a backup in it, in a folder.

    Attributes:
        claimed: the number of the request by which the writer becomes the store's; from 0, as all numbers here.
        requests: how many the writer makes until it has saved twice.
    """

    bucket: MemoryBucket
    server: FaultyServer
    url: str
    backup: str
    rounds: Iterator[int]
    claimed: int = 0
    requests: int = 0
    options: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.options = {
            "key": "ci-access",
            "secret": "ci-secret",
            "endpoint_url": f"http://127.0.0.1:{self.server.port}",
            "client_kwargs": {"region_name": "us-east-1"},
        }

    def measure(self) -> None:
        """Let a writer save twice, undisturbed; once for all tests, as each makes the same requests."""
        requests = MEASURED.get(bool(self.backup))
        if requests is None:
            with self.writing() as writer:
                writer.wait_saved(2)
                requests = MEASURED[bool(self.backup)] = list(self.server.requests)
        claims = [n for n, request in enumerate(requests) if request.operation == "Put" and "/writers/" in request.key]
        # In a backup it looks once more: who finds a newer one there, before a first save, takes a newer number.
        self.claimed, self.requests = claims[0] + bool(self.backup), len(requests)

    def writing(self) -> Any:
        """A new writer on a new store."""
        self.bucket.restore({})
        self.url = self.url if not self.backup else str(Path(self.url).parent / f"round {next(self.rounds)}")
        return writing(self.url, self.options, 1, self.backup)

    def heir(self) -> Store:
        """The store, opened by the next run."""
        return opened(self.url, self.options, self.backup)

    def check(self, saved: list[str], unknown: list[str]) -> None:
        """What was acknowledged is in the bucket, and all is whole."""
        with ckptstore.open(self.backup or self.url, storage_options=self.options) as store:
            check(store, saved, unknown)
            check_end(store)
        if self.backup:
            with ckptstore.open(self.url) as store:
                store.prune(grace_s=0)
                report = store.verify()
                assert report.ok, report.damages
                assert not report.leftovers

    def numbers(self, first: int, *, full: bool) -> range:
        return range(first, self.requests) if full else range(first + SEED % EVERY, self.requests, EVERY)


@pytest.fixture(params=["bucket", "folder and bucket"])
def scene(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Scene]:
    bucket = MemoryBucket("bucket")
    with FaultyServer(bucket) as server:
        tiers = request.param != "bucket"
        url, backup = (str(tmp_path / "run"), BACKUP) if tiers else (BACKUP, "")
        scene = Scene(bucket, server, url, backup, iter(range(10_000)))
        server.arm(lambda number, request: None)
        scene.measure()
        yield scene


def at(number: int, fault: Fault) -> Any:
    """That ``fault`` happens to the request of that number."""

    def choose(found: int, request: Request) -> Fault | None:
        return fault if found == number else None

    return choose


class Kill:
    """The writer's end at one request."""

    def __init__(self, *, applied: bool) -> None:
        self.applied = applied
        self.writer: queue.Queue[Writer] = queue.Queue(1)

    def __call__(self, exchange: Exchange) -> None:
        if self.applied:
            exchange.apply()
        self.writer.get(timeout=HANG_S).signal(signal.SIGKILL)
        exchange.reset()


class Stop:
    """The writer stands still at one request; when it may go on, the server gets the request or it the answer."""

    def __init__(self, *, applied: bool) -> None:
        self.applied = applied
        self.writer: queue.Queue[Writer] = queue.Queue(1)
        self.stopped, self.goes_on = threading.Event(), threading.Event()

    def __call__(self, exchange: Exchange) -> None:
        response = exchange.apply() if self.applied else None
        self.writer.get(timeout=HANG_S).signal(signal.SIGSTOP)
        self.stopped.set()
        assert self.goes_on.wait(HANG_S)
        exchange.answer(response or exchange.apply())


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("applied", [False, True], ids=["before", "after"])
def test_killed_at_each_request(scene: Scene, applied: bool, full: bool) -> None:
    """The next run finds all that was acknowledged and goes on from the newest of it."""
    for number in scene.numbers(0, full=full):
        kill = Kill(applied=applied)
        scene.server.arm(at(number, kill))
        with named(f"request {number}", f"applied {applied}"), scene.writing() as writer:
            kill.writer.put(writer)
            assert writer.end() == -signal.SIGKILL
            assert len(scene.server.fired) == 1
            scene.server.disarm()
            with scene.heir() as store:
                if writer.saved:
                    assert store.resolve().order >= parse_id(writer.saved[-1])
                mine = save(store, 1000, durable="backup" if scene.backup else "primary").id
                assert store.resolve().id == mine
            scene.check([*writer.saved, mine], writer.unknown)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("applied", [False, True], ids=["before", "after"])
def test_stopped_at_each_request(scene: Scene, applied: bool, full: bool) -> None:
    """Once another run has saved, the one that wakes up is told so, and it is never again ``latest``."""
    for number in scene.numbers(scene.claimed + (not applied), full=full):
        stop = Stop(applied=applied)
        scene.server.arm(at(number, stop))
        with named(f"request {number}", f"applied {applied}"), scene.writing() as zombie:
            stop.writer.put(zombie)
            assert stop.stopped.wait(HANG_S)
            with scene.heir() as store:
                heirs = save(store, 1000, durable="backup" if scene.backup else "primary").id
                store.prune()
                zombie.signal(signal.SIGCONT)
                stop.goes_on.set()
                assert zombie.end() == STALE
                assert len(scene.server.fired) == 1
                assert store.resolve().id == heirs
            scene.check([*zombie.saved, heirs], zombie.unknown)
