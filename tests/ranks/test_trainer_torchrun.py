"""Under ``torchrun`` itself: it starts a broken job again, and passes a signal on to all ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from tests.ranks.test_trainer_exact import made, saved
from tests.ranks.trained import Shared, notes, reference
from tests.trainer.processes import check_same
from tests.trainer.test_signals import wait_for

pytestmark = pytest.mark.full
SIZE = 2


@contextmanager
def torchrun(options: Shared, *more: str) -> Iterator[subprocess.Popen[bytes]]:
    """A job of two ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={SIZE}", *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    job = subprocess.Popen(
        [*command, "-m", "tests.ranks.trained", json.dumps(asdict(options))],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield job
    finally:
        # First the job as a whole: it ends its ranks, which have sessions of their own.
        job.terminate()
        job.wait(60)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Shared:
    folder = tmp_path_factory.mktemp("whole")
    return reference(made(folder, epochs=30), folder, SIZE)


def test_a_rank_that_dies_is_started_again(tmp_path: Path, whole: Shared) -> None:
    """The others are ended by it, and all go on exactly. More than once, as gloo itself may hear of the job before."""
    options = made(tmp_path, epochs=30, end_by="kill", end_at=17, breaks=1, more={"rank_timeout": 5})
    with torchrun(options, "--max-restarts=3") as job:
        assert job.wait(200) == 0
    assert len([note for note in notes(options, 0) if "resumed" in note]) >= 2
    for rank in range(SIZE):
        check_same(notes(options, rank), notes(whole, rank))
    saved(options)


def test_the_end_by_a_signal(tmp_path: Path, whole: Shared) -> None:
    """All ranks get it, save one step, and a new job goes on exactly."""
    options = made(tmp_path, epochs=30, save="every(steps=1000)")
    with torchrun(replace(options, step_s=0.02)) as job:
        wait_for(lambda: sum("step" in note for note in notes(options, 0)) >= 3)
        job.send_signal(signal.SIGTERM)
        assert job.wait(100) != 0
    [(_, reasons)] = saved(options)
    assert reasons == ["SIGTERM"]
    with torchrun(options) as job:
        assert job.wait(200) == 0
    for rank in range(SIZE):
        check_same(notes(options, rank), notes(whole, rank))
