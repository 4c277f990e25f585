"""Writers that are killed or stopped anywhere, and others that take over, on a real server."""

from __future__ import annotations

import random
import signal
import time

import pytest

import ckptstore
from ckptstore.format.layout import parse_id
from tests.faults.points import SEED, named
from tests.s3.seaweed import Seaweed
from tests.s3.writer import STALE
from tests.s3.writing import check, check_end, writing


@pytest.fixture
def url(bucket: str, prefix: str) -> str:
    return f"s3://{bucket}/{prefix}"


@pytest.mark.timeout(1200)
def test_writers_killed_one_after_the_other(server: Seaweed, url: str, full: bool) -> None:
    """No acknowledged save is lost, and ``latest`` never goes back."""
    choose = random.Random(SEED)
    saved: list[str] = []
    unknown: list[str] = []
    latest = None
    store = ckptstore.open(url, storage_options=server.options)

    for number in range(20 if full else 2):
        with named(f"writer {number}"), writing(url, server.options, 100 * number) as writer:
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
            writing(url, server.options, 1000 * number) as zombie,
        ):
            zombie.wait_saved(1)
            time.sleep(choose.uniform(0, 0.2))
            zombie.signal(signal.SIGSTOP)
            with writing(url, server.options, 1000 * number + 500) as heir:
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
