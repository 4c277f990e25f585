"""Latest, rolling, epochs' and best checkpoints, signals and kills: one store, many roles for each checkpoint."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ckptstore as cs
from ckptstore.storage import memory
from tests.trainer.loops import Loop, listed, run, steps, url, warned
from tests.trainer.processes import check_same, finish, reference, start
from tests.trainer.processes import run as run_process
from tests.trainer.processes import steps as windows
from tests.trainer.program import Options, notes
from tests.trainer.test_signals import code_of

EVERY_10 = "every(steps=10)"


def long_run(folder: Path, **changes: Any) -> Options:
    """Three epochs of 40 steps, saved every 10."""
    made = Options(str(folder / "store"), str(folder / "notes"), samples=120, save=EVERY_10, check=True)
    return replace(made, **changes)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the long run notes where nothing interrupts it."""
    folder = tmp_path_factory.mktemp("whole")
    return reference(long_run(folder), folder)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Options:
    """The long run, ended by Ctrl-C after step 50. Its store must not be changed."""
    made = long_run(tmp_path_factory.mktemp("stopped"))
    assert run_process(made, end_by="int", end_at=50) == 130
    return made


def test_T01_keep_three_of_five() -> None:
    """The newest three stay; latest and backup of the case are roles of the last two."""
    place = url()
    run(place, 50, save=EVERY_10, keep=cs.last(3))
    assert steps(place) == [30, 40, 50]
    with cs.open(place) as store:
        assert store.resolve("latest").step == 50
        assert store.verify().ok


def test_T02_an_epoch_that_ends_with_the_best() -> None:
    """One checkpoint for both reasons, which stays when ten newer ones have come."""
    place = url()
    keep = cs.last(3) | cs.epochs() | cs.best("val_loss")
    with cs.open(place, keep=keep) as store:
        loop = Loop(store, save="every(epochs=1) | every(steps=2) | on_best(val_loss)", final=False)
        with loop.ckpt as ckpt:
            ckpt.resume()
            for epoch in ckpt.epochs(3):
                for (batch,) in ckpt.batches(loop.data):
                    ckpt.step(loss=loop.learn(batch))
                ckpt.report(val_loss=[0.1, 0.3, 0.2][epoch])
        assert [(c.step, list(c.reasons)) for c in store.checkpoints()] == [
            (12, ["epoch 1", "every 2 steps", "best val_loss"]),
            (24, ["epoch 2", "every 2 steps"]),
            (32, ["every 2 steps"]),
            (34, ["every 2 steps"]),
            (36, ["epoch 3", "every 2 steps"]),
        ]
        assert [c.epoch for c in store.checkpoints()] == [1, 2, 2, 2, 3]
        assert store.resolve("best:val_loss").step == store.resolve("epoch:1").step == 12


def test_T04_by_steps_and_epochs() -> None:
    """Each 5 of 12 steps an epoch, and each epoch's end, where counts and ends don't meet.

    The case counts steps from 0, and so saves at 49 and 50; as completed steps these are 50 and 100, each once.
    """
    place = url()
    run(place, 41, save="every(steps=5) | every(epochs=1)")
    assert steps(place) == [5, 10, 12, 15, 20, 24, 25, 30, 35, 36, 40]
    assert listed(place)[-2] == (36, ["epoch 3"])


def test_T05_interrupted(tmp_path: Path, whole: list[dict[str, Any]]) -> None:
    """Every tenth step and the one at which it was interrupted; the next run begins with the first step not done."""
    made = long_run(tmp_path)
    assert run_process(made, end_by="int", end_at=53) == 130
    # Told after a step, it is minded before the next one.
    assert steps(made.url) == [10, 20, 30, 40, 50, 53]
    assert listed(made.url)[-1] == (53, ["SIGINT"])
    assert run_process(made) == 0
    found = notes(made.out)
    assert [note["step"] for note in found if "step" in note] == list(range(1, 121))
    check_same(found, whole)


def test_T06_latest_best_and_a_path(tmp_path: Path) -> None:
    """And a selector or a path without a checkpoint is an error, not a fresh start."""
    place = str(tmp_path / "store")
    loop = Loop(place, save="every(steps=10) | on_best(val_loss)", final=False)
    with loop.ckpt as ckpt:
        ckpt.resume()
        loop.until(36, evaluate={4: 0.5, 14: 0.2, 24: 0.3})
    assert steps(place) == [4, 10, 14, 20, 30]
    with cs.open(place) as store:
        path = tmp_path / "store" / "checkpoints" / store.resolve("step:20").id
    for select, step in (("latest", 30), ("best:val_loss", 14), (path, 20)):
        with Loop(place, final=False).ckpt as ckpt:
            assert ckpt.resume(select).checkpoint.step == step  # type: ignore[union-attr]
    for select in ("best:accuracy", "step:5", path.with_name(path.name[:-1] + "_"), tmp_path / "other"):
        with Loop(place, final=False).ckpt as ckpt, pytest.raises(FileNotFoundError):
            ckpt.resume(select)


def test_T07_a_damaged_latest() -> None:
    """Then the one before, and then the one before that, each time with a warning."""
    place = url()
    run(place, 40, save=EVERY_10, keep=cs.last(3))
    space = memory._spaces[place.removeprefix("memory://")]
    with cs.open(place) as store:
        ids = {c.step: c.id for c in store.checkpoints()}
    for damaged, step in ((40, 30), (30, 20)):
        for key in [key for key in space if key.startswith(f"checkpoints/{ids[damaged]}/model")]:
            space[key] = space[key]._replace(data=space[key].data[:100])
        with Loop(place, final=False).ckpt as ckpt, warned() as said:
            assert ckpt.resume().checkpoint.step == step  # type: ignore[union-attr]
        told = [text.partition(":")[0] for text in said]
        assert told == [f"{ids[each]} is damaged, trying the one before" for each in range(40, step, -10)]


def test_T11_the_same_step_twice() -> None:
    """By the schedule it is saved once, and a run that resumes there saves it not again; by hand, as often as asked."""
    place = url()
    loop = Loop(place, save="every(steps=2) | at(2)")
    with loop.ckpt as ckpt:
        ckpt.resume()
        loop.until(2)
    assert listed(place) == [(2, ["every 2 steps", "step 2"])]
    with Loop(place, save="every(steps=2)").ckpt as ckpt:
        ckpt.resume()
    assert steps(place) == [2]
    with Loop(place, save="every(steps=2)").ckpt as ckpt:
        ckpt.resume()
        ckpt.save("by hand", wait=True)
    assert listed(place) == [(2, ["every 2 steps", "step 2"]), (2, ["by hand"])]


def test_T13_emergency_saves_and_the_others() -> None:
    """What signals saved is kept by its reason, whatever else goes, and the newest are kept beside it.

    The case gives emergencies a number of their own; here a rule names them, and ``last`` counts all.
    """
    place = url()
    for stop in (5, 7, 9):
        loop = Loop(place, save="every(steps=2)", signals=True, keep=cs.last(3) | cs.tagged("SIG*"))
        assert code_of(partial(train_until_told, loop, stop)) == 143
    assert listed(place)[1:3] == [(7, ["SIGTERM"]), (8, ["every 2 steps"])]
    run(place, 13, save="every(steps=2)", keep=cs.last(3) | cs.tagged("SIG*"))
    assert steps(place) == [5, 7, 9, 10, 12]


def train_until_told(loop: Loop, stop: int) -> None:
    with loop.ckpt as ckpt:
        ckpt.resume()
        loop.until(stop)
        os.kill(os.getpid(), signal.SIGTERM)
        loop.until(40)


def test_T14_the_best_and_the_one_before() -> None:
    """At 20, 30 and 40 each is better: best and latest are 40, and the one before stays as the second best."""
    place = url()
    loop = Loop(place, save="on_best(val_loss)", keep=cs.best("val_loss", n=2), final=False)
    with loop.ckpt as ckpt:
        ckpt.resume()
        loop.until(45, evaluate={20: 0.5, 30: 0.4, 40: 0.3})
    assert listed(place) == [(30, ["best val_loss"]), (40, ["best val_loss"])]
    with cs.open(place) as store:
        assert store.resolve("best:val_loss").step == store.resolve("latest").step == 40


def test_T15_a_fresh_start_where_checkpoints_are() -> None:
    """Is refused, and nothing is touched; resuming goes on in the same place."""
    place = url()
    run(place, 10, save=EVERY_10)
    with Loop(place).ckpt as ckpt, pytest.raises(cs.ExistsError, match="take another place for another run"):
        ckpt.resume(False)
    assert steps(place) == [10]
    run(place, 20, save=EVERY_10)
    assert steps(place) == [10, 20]


def test_T18_the_same_losses_from_30_to_50() -> None:
    """Resumed at 30 although the run had come to 50: losses, samples and all random numbers are the same again."""
    place = url()
    whole, again = [drawing(place, select, 50) for select in (True, "step:30")]
    assert list(again) == list(range(31, 51))
    assert again == {step: whole[step] for step in again}
    assert steps(place) == [30]


def drawing(place: str, select: bool | str, until: int) -> dict[int, Any]:
    """A run that draws from each generator at each step."""
    loop = Loop(place, seed=1 if select is True else 8, save="at(30)", final=False)
    drawn = {}
    with loop.ckpt as ckpt:
        ckpt.resume(select)
        for _ in ckpt.epochs(9):
            for (batch,) in ckpt.batches(loop.data):
                numbers = random.random(), float(np.random.rand()), torch.rand(1).item()
                loss = loop.learn(batch + numbers[0])
                ckpt.step(loss=loss)
                drawn[ckpt.progress.step] = (batch.tolist(), numbers, loss.item())
                if ckpt.progress.step == until:
                    return drawn
    raise AssertionError


@pytest.mark.parametrize("when", ["twice", "in the last step", "while evaluating", "while saving"])
def test_T19_a_signal_at_an_inconvenient_moment(when: str) -> None:
    """One complete save of that very step, and the exit code that says so."""
    place = url()

    def told(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    hooks: dict[str, Any] = {"on_saved": told} if when == "while saving" else {}
    save = "at(36)" if when == "while saving" else None
    loop = Loop(place, save=save, signals=True, **hooks)

    def train() -> None:
        with loop.ckpt as ckpt:
            ckpt.resume()
            for epoch in ckpt.epochs(3):
                for (batch,) in ckpt.batches(loop.data):
                    loss = loop.learn(batch)
                    if when == "twice" and ckpt.progress.step == 6:
                        told()
                        told()
                    if when == "in the last step" and ckpt.progress.step == 35:
                        told()
                    ckpt.step(loss=loss)
                if when == "while evaluating" and epoch == 1:
                    told()
                    ckpt.check()
                    raise AssertionError
                ckpt.report(val_loss=0.1)

    assert code_of(train) == 143
    expected = {"twice": 7, "in the last step": 36, "while evaluating": 24, "while saving": 36}[when]
    assert steps(place) == [expected]
    with cs.open(place) as store:
        assert store.verify().ok


def test_T20_killed_at_any_moment_of_a_save(tmp_path: Path, whole: list[dict[str, Any]], full: bool) -> None:
    """Saving at each step it is mostly saving: what is there is whole, and the run goes on exactly from it."""
    choose = random.Random(20)
    made = long_run(tmp_path, save="every(steps=1)")
    for number in range(12 if full else 1):
        case = replace(made, url=str(tmp_path / f"store-{number}"), out=str(tmp_path / f"notes-{number}"))
        process = start(case)
        until = choose.randint(2, 100)
        while not any("step" in note and note["step"] >= until for note in partly(case.out)) and process.is_alive():
            time.sleep(0.002)
        time.sleep(choose.uniform(0, 0.02))
        process.kill()
        # Rarely it was faster.
        assert finish(process) in (-signal.SIGKILL, 0)
        with cs.open(case.url) as store:
            report = store.verify()
            assert report.ok, report
            assert [c.step for c in store.checkpoints()] == list(range(1, len(store.checkpoints()) + 1))
            newest = store.resolve().step
        done = max(note["step"] for note in partly(case.out) if "step" in note)
        # A step is noted after it was counted, and its save may come to its end after the next one's begin.
        assert newest >= done - 2
        out = str(tmp_path / f"rest-{number}")
        assert run_process(replace(case, out=out)) == 0
        rest = windows(notes(out))
        assert rest == {step: window for step, window in windows(whole).items() if step > newest}
        assert notes(out)[-1] == whole[-1]


def partly(out: str) -> list[dict[str, Any]]:
    """Notes of a process that may just be writing one."""
    with suppress(ValueError):
        return notes(out)
    return []


# The seven instructions by which the three tiers of a training script were to be tried out.


def test_instruction_1_basic_saving(stopped: Options) -> None:
    """50 steps, saved each 10, then Ctrl-C: all five are there, and latest is one of them."""
    assert listed(stopped.url)[:4] == [(step, ["every 10 steps"]) for step in (10, 20, 30, 40)]
    assert steps(stopped.url) == [10, 20, 30, 40, 50]
    with cs.open(stopped.url) as store:
        assert store.verify().ok
        assert store.resolve("latest").step == 50


def test_instruction_2_resume(tmp_path: Path, whole: list[dict[str, Any]]) -> None:
    """To step 100, Ctrl-C, and resume: begins with step 101, and its losses go on where they left off."""
    made = long_run(tmp_path)
    assert run_process(made, end_by="int", end_at=100) == 130
    before = notes(made.out)
    assert run_process(made) == 0
    after = notes(made.out)[len(before) :]
    assert after[1] == {"resumed": 100, "loaded": True}
    assert [note["step"] for note in after if "step" in note] == list(range(101, 121))
    check_same(notes(made.out), whole)


def test_instruction_3_random_state(tmp_path: Path, stopped: Options) -> None:
    """Resumed from the path of step 30, the losses until 50 are identical to those of the run that was stopped."""
    copied = tmp_path / "store"
    shutil.copytree(stopped.url, copied)
    with cs.open(copied) as store:
        path = copied / "checkpoints" / store.resolve("step:30").id
    again = replace(stopped, url=str(copied), out=str(tmp_path / "again"), select=str(path))
    assert run_process(again, end_by="int", end_at=50) == 130
    first, second = windows(notes(stopped.out)), windows(notes(again.out))
    assert second == {step: first[step] for step in range(31, 51)}
    assert steps(again.url) == [10, 20, 30, 40, 50, 40, 50]


def test_instruction_4_cleanup(tmp_path: Path) -> None:
    """100 steps, the last three kept: only they are left, also as files."""
    made = long_run(tmp_path, keep="last(3)")
    assert run_process(made, end_by="term", end_at=100) == 143
    assert steps(made.url) == [80, 90, 100]
    assert len(list((tmp_path / "store" / "checkpoints").iterdir())) == 3


def test_instruction_5_the_best() -> None:
    """After several evaluations the best is the one with the lowest validation loss, wherever it was in the run."""
    place = url()
    losses = {5: 0.9, 10: 0.7, 15: 0.4, 20: 0.6, 25: 0.5, 30: 0.8}
    loop = Loop(place, save="every(steps=5) | on_best(val_loss)", keep=cs.last(2) | cs.best("val_loss"), final=False)
    with loop.ckpt as ckpt:
        ckpt.resume()
        loop.until(36, evaluate=losses)
        assert ckpt.best == {"val_loss": 0.4}
    with cs.open(place) as store:
        best = store.resolve("best:val_loss")
        assert (best.step, best.metrics["val_loss"]) == (15, 0.4)
        assert [c.step for c in store.checkpoints()] == [15, 30, 35]
        assert store.load("best:val_loss")["trainer"]["progress"]["step"] == 15


def test_instruction_6_distributed_names_in_one_process() -> None:
    """A model wrapped for several processes resumes a plain one's checkpoint, and the other way round."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        for first, second in ((True, False), (False, True), (True, True)):
            place = url()
            found = []
            for wrapped in (first, second):
                loop = Loop(place, seed=1 + len(found), save="at(20)", final=False)
                if wrapped:
                    loop.model = torch.nn.parallel.DistributedDataParallel(loop.model)
                    loop.ckpt.state["model"] = loop.model
                with loop.ckpt as ckpt:
                    ckpt.resume(check=True)
                    assert ckpt.progress.step == 20 * len(found)
                    loop.until(20 * (len(found) + 1))
                found.append(loop)
            with cs.open(place) as store:
                assert not any("module" in name for name in store.contents(store.resolve()).tensors)
            plain = run(url(), 40)
            assert found[1].losses == {step: loss for step, loss in plain.losses.items() if step > 20}
    finally:
        torch.distributed.destroy_process_group()


def test_instruction_7_epochs() -> None:
    """Three epochs, to their end: a checkpoint for each, of epoch 1, 2 and 3, and the last of those between."""
    place = url()
    loop = Loop(place, save="every(epochs=1) | every(steps=5)", keep=cs.epochs() | cs.last(2))
    with loop.ckpt as ckpt:
        ckpt.resume()
        loop.until(100, epochs=3)
    assert listed(place) == [(12, ["epoch 1"]), (24, ["epoch 2"]), (35, ["every 5 steps"]), (36, ["epoch 3"])]
    with cs.open(place) as store:
        assert [c.epoch for c in store.checkpoints()] == [1, 2, 2, 3]
        assert [store.resolve(f"epoch:{number}").step for number in (1, 3)] == [12, 36]
