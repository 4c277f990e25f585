"""Runs that save at chosen steps: what lies there is the state after so many optimizer steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ckptstore as cs
from tests.trainer.loops import Loop, listed, run, steps, url, warned


def test_S18_first_middle_and_last_step() -> None:
    """Step 0 before any update, the last one too, each once and none besides."""
    place = url()
    loop = Loop(place, save="at(0, 5, 10)")
    before = loop.weights
    with loop.ckpt as ckpt:
        ckpt.resume()
        loop.until(10)
    assert listed(place) == [(0, ["step 0"]), (5, ["step 5"]), (10, ["step 10"])]
    for selector, expected in (("step:0", before), ("step:10", loop.weights)):
        other = Loop(url(), seed=2)
        with cs.open(place) as store:
            store.load(selector, into={"model": other.model}, strict="parts")
        assert other.weights == expected


def test_E01_the_state_before_training_can_be_resumed() -> None:
    """0, 10 and 30 of 36 steps, each once; from 0 the whole run comes out the same."""
    place = url()
    whole = run(place, 36, save="at(0, 10, 30)")
    assert steps(place) == [0, 10, 30]
    with cs.open(place) as store:
        assert sorted(store.load("step:0")) == ["model", "optimizer", "scheduler", "trainer"]
    again = run(url(), 36, resume=False, seed=5)
    assert again.losses != whole.losses
    loop = Loop(place, seed=5, final=False)
    with loop.ckpt as ckpt:
        assert ckpt.resume("step:0").kept == []
        loop.until(36)
    assert (loop.losses, loop.seen, loop.weights) == (whole.losses, whole.seen, whole.weights)


def test_E02_unsorted_and_twice() -> None:
    """What is written in any order, or twice, is saved once and in order."""
    place = url()
    run(place, 32, save="at(30, 10, 10, 30)")
    assert steps(place) == [10, 30]


def test_E08_accumulation_counts_optimizer_steps() -> None:
    """Windows of 4 micro batches: saves at steps 1 and 2 after 4 and 8 of them, never within a window."""
    place = url()
    loop = Loop(place, save="at(1, 2)", final=False)
    with loop.ckpt as ckpt:
        ckpt.resume()
        for number, (batch,) in enumerate(ckpt.batches(loop.data), 1):
            loop.model(batch.reshape(-1, 1).expand(-1, 4)).sum().backward()
            if number % 4 == 0:
                loop.optimizer.step()
                loop.optimizer.zero_grad()
                loop.scheduler.step()
                ckpt.step()
    assert steps(place) == [1, 2]
    with cs.open(place) as store:
        for step in (1, 2):
            assert store.load(f"step:{step}")["trainer"]["progress"]["batch"] == 4 * step
            assert store.load(f"step:{step}")["scheduler"]["last_epoch"] == step


def test_E10_choosing_checkpoints() -> None:
    """All, the last, single ones by step, in the order of the saves; what isn't there is an error that says so.

    Where the case sorts folders by number, checkpoints come in the order in which they were saved, which is that of the
    steps in a run that never went back.
    """
    place = url()
    run(place, 20, save="at(0, 9, 10, 20)")
    with cs.open(place) as store:
        assert [c.step for c in store.checkpoints()] == [c.step for c in store.checkpoints("all")] == [0, 9, 10, 20]
        assert [c.step for c in store.checkpoints([0, 10, "latest"])] == [0, 10, 20]
        with warned() as said:
            assert [c.step for c in store.checkpoints([0, 7])] == [0]
        assert "has no checkpoint 'step:7'" in said[0]
        assert store.resolve("latest").step == 20
        chosen = [store.resolve(f"step:{step}") for step in (0, 10)]
        assert [c.step for c in chosen] == [0, 10]
        assert store.resolve(chosen[1].id) == chosen[1]
        with pytest.raises(cs.NotFoundError, match="step:7"):
            store.resolve("step:7")
        with pytest.raises(ValueError, match="newest"):
            store.resolve("newest:step")


@pytest.mark.parametrize("mode", ["sync", "async", "overlapped"])
@pytest.mark.parametrize("batches", [True, False])
def test_each_mode_saves_the_state_after_the_step(mode: Any, batches: bool) -> None:
    """Not that of the step before, and not that of the one which runs meanwhile; with batches from here or not."""
    place = url()
    loop = Loop(place, save="every(steps=1)", mode=mode, final=False)
    expected = {}
    with loop.ckpt as ckpt:
        ckpt.resume()
        if batches:
            for (batch,) in ckpt.batches(loop.data):
                ckpt.step(loss=loop.learn(batch))
                expected[ckpt.progress.step] = loop.model.state_dict()["0.weight"].clone()
        else:
            for _ in range(12):
                loop.step()
                expected[ckpt.progress.step] = loop.model.state_dict()["0.weight"].clone()
    assert steps(place) == list(range(1, 13))
    with cs.open(place) as store:
        for checkpoint in store.checkpoints():
            assert torch.equal(store.load(checkpoint.id)["model"]["0.weight"], expected[checkpoint.step])
