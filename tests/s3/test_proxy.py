"""The same faults between the library and a real server."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from tenacity import wait_fixed

from ckptstore.errors import CheckpointError, CommitUnknownError, SaveFailedError
from ckptstore.storage.s3 import S3Storage
from tests.faults.points import SEED, named
from tests.s3.cases import opened, same
from tests.s3.kinds import KINDS, Kind
from tests.s3.proxy import Upstream
from tests.s3.seaweed import Seaweed
from tests.s3.wire import Fault, FaultyServer, Request

EVERY = 4
LARGE = 17 << 18
NEEDS_DELETION = {"keys failed"}
"""Kinds that only a request of a sort which isn't made here can suffer."""


@pytest.fixture(scope="module")
def proxy(server: Seaweed) -> Iterator[FaultyServer]:
    with FaultyServer(Upstream(server.endpoint)) as proxy:
        yield proxy


class Once:
    """One fault, at the ``nth`` request that it fits."""

    def __init__(self, kind: Kind, nth: int) -> None:
        self.kind, self.left = kind, nth

    def __call__(self, number: int, request: Request) -> Fault | None:
        self.left -= self.kind.fits(request)
        return self.kind.act if self.kind.fits(request) and self.left == 0 else None


def state(step: int) -> dict[str, torch.Tensor]:
    """More than a block, so that it goes up in two parts, and a little."""
    return {"table": torch.arange(step, step + LARGE, dtype=torch.int32), "step": torch.tensor(step)}


def attempt(storage: S3Storage, step: int, acknowledged: set[int]) -> CheckpointError | None:
    """Save, load and prune, until something fails."""
    try:
        store = opened(storage)
        store.save(state(step), step=step)
        acknowledged.add(step)
        assert same(store.load(), state(step))
        store.prune(grace_s=0)
    except CheckpointError as error:
        return error
    return None


@pytest.mark.full
def test_faults_before_a_real_server(
    server: Seaweed, proxy: FaultyServer, bucket: str, prefix: str, full: bool
) -> None:
    """Saves and loads that one fault each hits, at random: what it may cost is the save that it hit."""
    place = server.options | {"endpoint_url": f"http://127.0.0.1:{proxy.port}"}
    patient, hasty = (S3Storage(bucket, prefix, place | {"config_kwargs": {"read_timeout": s}}) for s in (20, 2))
    patient._client._tries.wait = hasty._client._tries.wait = wait_fixed(0.02)
    opened(patient).save(state(1), step=1)
    acknowledged, unknown, step = {1}, set[int](), 1
    choose = random.Random(SEED)

    for kind in KINDS * 4 if full else KINDS[SEED % EVERY :: EVERY]:
        if kind.name in NEEDS_DELETION:
            continue
        step += 1
        with named(kind, f"step {step}"):
            proxy.arm(Once(kind, choose.randint(1, 8)))
            error = attempt(hasty if kind.slow else patient, step, acknowledged)
            hit = len(proxy.fired)
            proxy.disarm()
            assert hit == 1, "the fault did not fire"
            assert error is None or not kind.heals, repr(error)
            if step not in acknowledged:
                assert isinstance(error, SaveFailedError | CommitUnknownError)
            if isinstance(error, CommitUnknownError):
                unknown.add(step)

    direct = S3Storage(bucket, prefix, server.options)
    store = opened(direct)
    found = [checkpoint.step for checkpoint in store.checkpoints()]
    assert found == sorted(found)
    assert acknowledged <= set(found) <= acknowledged | unknown
    assert same(store.load(f"step:{max(acknowledged)}"), state(max(acknowledged)))
    assert store.verify().ok
    store.prune(grace_s=0)
    assert not store.verify().leftovers
    assert direct.uploads() == []
