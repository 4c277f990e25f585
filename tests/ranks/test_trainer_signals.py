"""A signal to any rank saves on all, at one step that they agree on; so does a request, and a clock."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

import ckptstore as cs
from tests.ranks.test_trainer_exact import made, saved
from tests.ranks.trained import Shared, finish, notes, reference, run, started
from tests.trainer.processes import check_same
from tests.trainer.test_signals import wait_for

SLOW_S = 0.02
"""A step takes so long that something can happen in between."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Shared:
    folder = tmp_path_factory.mktemp("whole")
    return reference(made(folder, epochs=30), folder, 2)


def count(options: Shared, mark: str, rank: int = 0) -> int:
    return sum(mark in note for note in notes(options, rank))


@pytest.mark.parametrize(
    ("signum", "ranks"),
    [
        (signal.SIGTERM, [1]),
        (signal.SIGINT, [0]),
        (signal.SIGTERM, [0, 1]),
        pytest.param(signal.SIGTERM, [0], marks=pytest.mark.full),
        pytest.param(signal.SIGINT, [1], marks=pytest.mark.full),
        pytest.param(signal.SIGINT, [0, 1], marks=pytest.mark.full),
    ],
)
def test_the_end(signum: signal.Signals, ranks: list[int], tmp_path: Path, whole: Shared) -> None:
    """All ranks save one step and end alike, and the next run goes on exactly."""
    options = made(tmp_path, epochs=30, save="every(steps=1000)")
    with started(replace(options, step_s=SLOW_S), 2) as processes:
        wait_for(lambda: count(options, "step") >= 3)
        for rank in ranks:
            os.kill(processes[rank].pid, signum)
        assert [finish(process) for process in processes] == [128 + signum] * 2
    [(step, reasons)] = saved(options)
    assert reasons == [signum.name]
    assert all(max(note["step"] for note in notes(options, rank) if "step" in note) == step for rank in range(2))
    assert run(options, 2) == [0, 0]
    for rank in range(2):
        check_same(notes(options, rank), notes(whole, rank))


def test_at_random_moments(tmp_path: Path, whole: Shared, full: bool) -> None:
    """Some ranks get it, at any time from before they load: all end alike, and the next run goes on exactly."""
    choose = random.Random(7)
    for number in range(30 if full else 2):
        options = made(tmp_path / str(number), epochs=30, save="every(steps=5)")
        (tmp_path / str(number)).mkdir()
        ended: set[int] = set()
        for _ in range(3):
            begun = [len(notes(options, rank)) for rank in range(2)]
            with started(replace(options, step_s=0.003), 2) as processes:
                wait_for(lambda: all(len(notes(options, rank)) > begun[rank] for rank in range(2)))  # noqa: B023
                time.sleep(choose.uniform(0, 1))
                for rank in choose.choice([[0], [1], [0, 1]]):
                    # Rarely it was faster.
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(processes[rank].pid, signal.SIGTERM)
                ended = {finish(process) for process in processes}
            assert ended in ({143}, {0})
            saved(options)
            if ended == {0}:
                break
        if ended != {0}:
            assert run(options, 2) == [0, 0]
        for rank in range(2):
            check_same(notes(options, rank), notes(whole, rank))


def test_save_and_go_on(tmp_path: Path) -> None:
    """SIGUSR1 to one rank, and a request: each makes one checkpoint of all ranks."""
    options = made(tmp_path, epochs=30, save="every(steps=1000)", step_s=SLOW_S)
    with started(replace(options, more={**options.more, "poll": 0.1, "final": False}), 2) as processes:
        wait_for(lambda: count(options, "step") >= 1)
        os.kill(processes[1].pid, signal.SIGUSR1)
        with cs.open(options.url) as store:
            wait_for(lambda: len(store.checkpoints()) == 1)
            store.signal("save")
            wait_for(lambda: len(store.checkpoints()) == 2)
            store.signal("stop")
        assert [finish(process) for process in processes] == [143] * 2
    assert [reasons for _, reasons in saved(options)] == [["SIGUSR1"], ["ckptstore signal"], ["SIGTERM"]]


def test_by_the_clock(tmp_path: Path) -> None:
    """What only rank 0's clock knows, all do at one step."""
    options = made(tmp_path, epochs=10, save="every(minutes=0.005)", step_s=SLOW_S)
    assert run(options, 2) == [0, 0]
    found = saved(options)
    assert ["every 0.005 minutes"] in [reasons for _, reasons in found]
    assert found[-1][0] == 40


def test_a_deadline_holds_for_all(tmp_path: Path) -> None:
    """Also on ranks that the signal didn't reach."""
    options = made(tmp_path, save="at(0)", step_s=1000.0)
    with started(replace(options, more={**options.more, "deadline": 0.5}), 2) as processes:
        wait_for(lambda: all(count(options, "working", rank) for rank in range(2)))
        os.kill(processes[0].pid, signal.SIGTERM)
        assert [finish(process) for process in processes] == [143] * 2
    assert [step for step, _ in saved(options)] == [0]
