"""Signals at any moment: one complete save or what was there before, the right exit code, and an end in time."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import ckptstore as cs
from ckptstore.trainer.signals import Signals
from tests.trainer.processes import check_same, finish, reference, run, start
from tests.trainer.program import Options, notes

EXITS = {signal.SIGTERM: 143, signal.SIGINT: 130}


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.002)


def is_whole(options: Options) -> list[int]:
    """The steps that are there, every byte of them proven."""
    with cs.open(options.url) as store:
        report = store.verify()
        assert report.ok, report
        return [checkpoint.step for checkpoint in store.checkpoints()]


@pytest.mark.parametrize(
    ("moment", "signum"),
    [
        pytest.param(moment, signum, id=f"{moment}-{signum.name}", marks=() if sampled else pytest.mark.full)
        for number, moment in enumerate(["training", "saving", "evaluating", "resuming"])
        for signum in EXITS
        for sampled in [(signum == signal.SIGTERM) == (number % 2 == 0)]
    ],
)
def test_at_random_moments(moment: str, signum: signal.Signals, tmp_path: Path, full: bool) -> None:
    """The process ends as a scheduler expects, the store is whole, and the next one goes on exactly."""
    choose = random.Random(f"{moment} {signum}")
    made = Options(str(tmp_path / "store"), str(tmp_path / "notes"), check=True)
    # Saving at each step, the run is mostly saving.
    made = replace(made, save="every(steps=1)" if moment == "saving" else "every(steps=3)")
    expected = reference(made, tmp_path)
    for number in range(50 if full else 1):
        case = replace(made, url=str(tmp_path / f"store-{number}"), out=str(tmp_path / f"notes-{number}"))
        if moment == "resuming":
            assert run(case, end_by="exit", end_at=11) == 9
        pause = {"training": 0.0, "saving": 0.0, "evaluating": 0.05, "resuming": 0.0}[moment]
        process = start(replace(case, more={"deadline": 60}, evaluation_s=pause))
        begun = len(notes(case.out))
        mark = {"evaluating": "evaluating", "resuming": "resuming"}.get(moment, "step")
        count = choose.randint(1, 10) if mark == "step" else choose.randint(1, 2) if mark == "evaluating" else 1
        wait_for(lambda: sum(mark in note for note in notes(case.out)[begun:]) >= count)  # noqa: B023
        time.sleep(choose.uniform(0, 0.03))
        os.kill(process.pid, signum)
        ended = finish(process)
        # Rarely it was faster.
        assert ended in (EXITS[signum], 0)
        is_whole(case)
        assert run(case) == 0
        check_same(notes(case.out), expected)


def test_a_second_interrupt_gives_up_at_once(tmp_path: Path) -> None:
    """In the midst of a step that takes for ever."""
    made = Options(str(tmp_path / "store"), str(tmp_path / "notes"), step_s=1000.0)
    process = start(made)
    wait_for(lambda: any("working" in note for note in notes(made.out)))
    os.kill(process.pid, signal.SIGINT)
    process.join(0.2)
    assert process.exitcode is None
    # More than once: one that comes right before the long step begins is seen with the next one only.
    while process.exitcode is None:
        os.kill(process.pid, signal.SIGINT)
        process.join(0.2)
    assert process.exitcode == -signal.SIGINT


@pytest.mark.parametrize("doing", ["sleeps", "is stuck in C"])
def test_a_deadline(doing: str, tmp_path: Path) -> None:
    """What doesn't come to its end in time is ended, and the next run goes on from before."""
    made = Options(str(tmp_path / "store"), str(tmp_path / "notes"), save="at(0)")
    sleeps = doing == "sleeps"
    process = start(replace(made, step_s=1000.0 * sleeps, stuck=not sleeps, more={"deadline": 0.5}))
    wait_for(lambda: any("working" in note for note in notes(made.out)))
    os.kill(process.pid, signal.SIGTERM)
    assert finish(process) == 143
    assert is_whole(made) == [0]
    assert run(made) == 0


def test_workers_signals_are_not_the_runs(store_path: Path) -> None:
    """A forked child that gets a signal doesn't make its parent end by the deadline."""
    loop = Loop(str(store_path), deadline=0.2)
    with loop.ckpt as ckpt:
        ckpt.resume()
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGINT)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        time.sleep(0.5)
        assert loop.ckpt._signals.came is None
        loop.step()
    assert signal.set_wakeup_fd(-1) == -1


class Loop:
    """A run in this process, one step at a time."""

    def __init__(self, url: str = "memory://", **options: Any) -> None:
        self.model = torch.nn.Linear(2, 2)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        state = {"model": self.model, "optimizer": self.optimizer}
        self.ckpt = cs.Checkpointer(url, state, verbose=False, **options)

    def step(self, **metrics: Any) -> None:
        self.model(torch.ones(2)).sum().backward()
        self.optimizer.step()
        self.ckpt.step(**metrics)


def code_of(train: Callable[[], None]) -> object:
    """With what code it ends the process."""
    with pytest.raises(SystemExit) as stopped:
        train()
    return stopped.value.code


def test_save_and_go_on(store_path: Path) -> None:
    """SIGUSR1 saves at the end of the step, and training goes on."""
    loop = Loop(str(store_path), final=False)
    with loop.ckpt as ckpt:
        ckpt.resume()
        loop.step()
        os.kill(os.getpid(), signal.SIGUSR1)
        loop.step()
        loop.step()
    with cs.open(store_path) as store:
        assert [(c.step, list(c.reasons)) for c in store.checkpoints()] == [(2, ["SIGUSR1"])]


def test_asked_from_outside(store_path: Path) -> None:
    """What ``Store.signal`` asks for is done, and an earlier request isn't heeded."""
    with cs.open(store_path, shared=True) as store:
        store.save({"x": 1}, step=0)
        store.signal("stop")
        loop = Loop(str(store_path), poll=0.05, save="at(1)")
        asked = loop.ckpt._signals

        def train() -> None:
            with loop.ckpt as ckpt:
                ckpt.resume(False, new_line=True)
                wait_for(lambda: not store._storage.list("control/"))
                loop.step()
                assert store.signal("save", wait=30)
                wait_for(lambda: asked.save is not None)
                loop.step()
                assert store.signal("stop", wait=30)
                wait_for(lambda: asked.stop is not None)
                loop.step()

        assert code_of(train) == 143
        found = [(c.step, list(c.reasons)) for c in store.checkpoints()][1:]
    assert found == [(1, ["step 1"]), (2, ["ckptstore signal"]), (3, ["SIGTERM"])]


def test_handlers_are_chained_and_given_back(store_path: Path) -> None:
    """A handler that stood before is called, too, and stands again afterwards."""
    called = []
    before = signal.signal(signal.SIGTERM, lambda signum, frame: called.append(signum))
    try:
        mine = signal.getsignal(signal.SIGTERM)
        loop = Loop(str(store_path))
        assert signal.getsignal(signal.SIGTERM) is mine

        def train() -> None:
            with loop.ckpt as ckpt:
                ckpt.resume()
                os.kill(os.getpid(), signal.SIGTERM)
                assert called == [signal.SIGTERM]
                loop.step()

        assert code_of(train) == 143
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_while_the_end_is_saved(store_path: Path) -> None:
    """Is minded when that is done."""
    loop = Loop(str(store_path), on_saved=lambda event: os.kill(os.getpid(), signal.SIGTERM))

    def train() -> None:
        with loop.ckpt as ckpt:
            ckpt.resume()
            loop.step()

    assert code_of(train) == 143
    with cs.open(store_path) as store:
        assert [c.step for c in store.checkpoints()] == [1]


def test_what_was_ignored_stays_ignored() -> None:
    """As SIGINT of what a shell runs behind itself."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        signals = Signals()
        signals.install()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        signals.restore()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("stood", ["a function", "the default"])
def test_put_back_after_the_end(stood: str) -> None:
    """Whoever remembers handlers may put this one back later: it calls the one before."""
    called: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda signum, _: called.append(signum) if stood == "a function" else None)
    try:
        if stood == "the default":
            signal.signal(signal.SIGUSR1, signal.SIG_DFL)
        signals = Signals()
        signals.install()
        mine = signal.getsignal(signal.SIGUSR1)
        signals.restore()
        signal.signal(signal.SIGUSR1, mine)
        if stood == "a function":
            os.kill(os.getpid(), signal.SIGUSR1)
            assert called == [signal.SIGUSR1]
            assert signals.save is None
            return
        child = os.fork()
        if child == 0:
            signals._pid = os.getpid()
            os.kill(os.getpid(), signal.SIGUSR1)
            os._exit(0)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGUSR1
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_in_another_thread(store_path: Path) -> None:
    """Python lets only the main one have handlers: signals are not minded, all else works."""
    done: list[int] = []

    def train() -> None:
        loop = Loop(str(store_path))
        with loop.ckpt as ckpt:
            ckpt.resume()
            loop.step()
            done.append(ckpt.progress.step)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert done == [1]


def test_a_forked_worker_is_not_the_run(store_path: Path) -> None:
    """It dies of SIGTERM as any other process, and outlives a Ctrl-C that is meant for the run."""
    loop = Loop(str(store_path))
    with loop.ckpt as ckpt:
        ckpt.resume()
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGTERM
        loop.step()
