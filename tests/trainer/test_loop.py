"""When what is saved, in one process: epochs, reports, evaluations that are due, and loops of people's own."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import ckptstore as cs
from ckptstore.errors import FormatError, StateError


class Loop:
    """A model of two numbers, and batches of two of ten samples."""

    def __init__(self, url: str, **options: Any) -> None:
        self.url = url
        self.model = torch.nn.Linear(2, 2)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.loader = DataLoader(TensorDataset(torch.randn(10, 2)), batch_size=2, shuffle=True)
        state = {"model": self.model, "optimizer": self.optimizer, "data": self.loader}
        self.ckpt = cs.Checkpointer(url, state, verbose=False, **options)

    def step(self, **metrics: Any) -> None:
        self.model(torch.ones(2)).sum().backward()
        self.optimizer.step()
        self.ckpt.step(**metrics)

    def saved(self) -> list[tuple[int, int | None, list[str]]]:
        with cs.open(self.url) as store:
            return [(c.step, c.epoch, list(c.reasons)) for c in store.checkpoints()]


@pytest.fixture
def url() -> str:
    return f"memory://{uuid4().hex}"


def test_one_checkpoint_for_all_that_is_due_at_an_epochs_end(url: str) -> None:
    """The interval, the epoch and the best by the evaluation after it, with its metrics."""
    loop = Loop(url, save=cs.every(steps=5) | cs.every(epochs=1) | cs.on_best("val_loss"))
    with loop.ckpt as ckpt:
        ckpt.resume()
        for epoch in ckpt.epochs(3):
            for _ in ckpt.batches(loop.loader):
                loop.step()
            ckpt.report(val_loss=[3.0, 2.0, 4.0][epoch])
    assert loop.saved() == [
        (5, 1, ["every 5 steps", "epoch 1", "best val_loss"]),
        (10, 2, ["every 5 steps", "epoch 2", "best val_loss"]),
        (15, 3, ["every 5 steps", "epoch 3"]),
    ]
    with cs.open(url) as store:
        assert [c.metrics["val_loss"] for c in store.checkpoints()] == [3.0, 2.0, 4.0]
        assert store.resolve("best:val_loss").step == 10


def test_what_is_due_at_a_step_has_what_is_reported_after_it(url: str) -> None:
    """Where the batches come from the run: the evaluation of that very state stands in its checkpoint."""
    loop = Loop(url, save=cs.every(steps=2), final=False)
    with loop.ckpt as ckpt:
        ckpt.resume()
        for _ in ckpt.batches(loop.loader):
            loop.step()
            ckpt.report(val_loss=float(ckpt.progress.step))
    with cs.open(url) as store:
        assert [(c.step, c.metrics["val_loss"]) for c in store.checkpoints()] == [(2, 2.0), (4, 4.0)]


def test_a_loop_of_ones_own(url: str) -> None:
    """Without epochs and batches: what is due is saved in step(), and a new best where it is reported."""
    loop = Loop(url, save=cs.at(0, 1, 4) | cs.on_best("acc") | cs.every(epochs=1))
    with loop.ckpt as ckpt:
        assert not ckpt.resume()
        loop.step()
        ckpt.report(acc=0.5)
        loop.step()
        ckpt.report(acc=0.4)
        loop.step()
        ckpt.end_epoch()
        ckpt.save("a look", wait=True)
        loop.step()
    assert loop.saved() == [
        (0, 0, ["step 0"]),
        (1, 0, ["step 1"]),
        (1, 0, ["best acc"]),
        (3, 1, ["epoch 1"]),
        (3, 1, ["a look"]),
        (4, 1, ["step 4"]),
    ]


def test_nothing_is_decided_in_the_midst_of_a_step(url: str) -> None:
    """What is reported between the optimizer's step and ckpt.step() is of neither state: it waits."""
    loop = Loop(url, save=cs.on_best("acc"), final=False)
    with loop.ckpt as ckpt:
        ckpt.resume()
        loop.step()
        loop.model(torch.ones(2)).sum().backward()
        loop.optimizer.step()
        ckpt.report(acc=0.5)
        assert loop.saved() == []
        ckpt.step()
    assert loop.saved() == [(2, 0, ["best acc"])]


def test_the_end_of_a_run(url: str) -> None:
    """Is saved once, and not again where a run does nothing; final=False leaves it out."""
    for steps, final in ((3, True), (0, True), (2, False), (0, True)):
        loop = Loop(url, final=final)
        with loop.ckpt as ckpt:
            ckpt.resume()
            for _ in range(steps):
                loop.step()
    assert loop.saved() == [(3, 0, ["final"])]


def test_best_by_what_steps_give(url: str) -> None:
    """A schedule that goes by a step's value gets each of them."""
    loop = Loop(url, save=cs.on_best("loss"), final=False)
    with loop.ckpt as ckpt:
        ckpt.resume()
        for value in (3.0, 4.0, 2.0, 2.5):
            loop.step(loss=torch.tensor(value))
    assert [step for step, _, _ in loop.saved()] == [1, 3]


def test_values_of_steps_are_read_only_when_saved(url: str) -> None:
    """Not even asked for in between: on a GPU each would make the processor wait."""
    asked: list[int] = []

    class Value(torch.Tensor):
        def __float__(self) -> float:
            asked.append(1)
            return 1.5

    loop = Loop(url, save=cs.at(3), final=False)
    with loop.ckpt as ckpt:
        ckpt.resume()
        for _ in range(5):
            loop.step(loss=torch.Tensor([1.5]).as_subclass(Value))
    assert len(asked) == 1
    with cs.open(url) as store:
        assert store.resolve("latest").metrics == {"loss": 1.5}


def test_evaluations_that_are_due(url: str) -> None:
    """Asked once for each time, at epochs' ends before they are counted, and not again after a resume."""

    def train(epochs: int) -> Iterator[int]:
        loop = Loop(url, evaluate=cs.every(steps=3) | cs.every(epochs=1))
        with loop.ckpt as ckpt:
            ckpt.resume()
            for _ in ckpt.epochs(epochs):
                for _ in ckpt.batches(loop.loader):
                    loop.step()
                    if ckpt.due("eval"):
                        yield ckpt.progress.step
                    assert not ckpt.due("eval")
                if ckpt.due("eval"):
                    yield -ckpt.progress.step
            with pytest.raises(FormatError, match="only due\\('eval'\\)"):
                ckpt.due("save")  # type: ignore[arg-type]

    assert list(train(2)) == [3, -5, 6, 9, -10]
    assert list(train(3)) == [12, 15, -15]


def test_progress(url: str) -> None:
    """Step, epoch, batch and tokens go on; extra values and best values come back."""
    loop = Loop(url)
    with loop.ckpt as ckpt:
        ckpt.resume()
        ckpt.extra["layers"] = [1, 2]
        ckpt.report(acc=0.5, val_loss=3)
        for _ in itertools.islice(ckpt.batches(loop.loader), 3):
            loop.step(tokens=100)
        ckpt.report(acc=0.4, val_loss=2)
    loop = Loop(url)
    with loop.ckpt as ckpt:
        assert ckpt.resume()
        now = ckpt.progress
        assert (now.step, now.epoch, now.batch, now.tokens) == (3, 0, 3, 300)
        assert ckpt.extra == {"layers": [1, 2]}
        assert ckpt.best == {"acc": 0.5, "val_loss": 2}
        assert len(list(ckpt.batches(loop.loader))) == 2


def test_stats(url: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    """A line for each save, and a summary; to a logger where there is one that wants them."""
    loop = Loop(url, save=cs.every(steps=2))
    loop.ckpt._verbose = True
    with loop.ckpt as ckpt:
        ckpt.resume()
        for _ in range(5):
            loop.step()
    stats = ckpt.stats()
    assert (stats.saves, stats.failed) == (3, 0)
    assert stats.written_bytes > 0
    assert 0 < stats.share <= 1
    told = capsys.readouterr().err
    assert told.count(" saved (") == 3
    assert "3 checkpoints saved: training waited" in told
    with caplog.at_level(logging.INFO, "ckptstore.trainer"):
        loop = Loop(url)
        loop.ckpt._verbose = True
        with loop.ckpt as ckpt:
            ckpt.resume()
    assert capsys.readouterr().err == ""
    assert "resumed from step 5" in caplog.text


WRONG: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "state": (lambda: cs.Checkpointer("memory://x", [1]), StateError, "give a dict of names"),  # type: ignore[arg-type]
    "name": (lambda: cs.Checkpointer("memory://x", {"trainer": 1}), StateError, "take another name"),
    "schedule": (lambda: cs.Checkpointer("memory://x", {}, save="evry(steps=1)"), FormatError, "every"),
    "length": (lambda: cs.Checkpointer("memory://x", {}, save=cs.every(fraction=0.1)), FormatError, "total_steps"),
    "beyond": (
        lambda: cs.Checkpointer("memory://x", {}, save=cs.at(9), length=cs.Length.of(5)),
        FormatError,
        "would never come",
    ),
    "failures": (lambda: cs.Checkpointer("memory://x", {}, max_failures=0), FormatError, "at least 1"),
    "deadline": (lambda: cs.Checkpointer("memory://x", {}, deadline="soon"), FormatError, "deadline"),
    "busy": (lambda: cs.Checkpointer("memory://x", {}, when_busy="drop"), FormatError, "'wait' or 'skip'"),  # type: ignore[arg-type]
    "hyper": (lambda: cs.Checkpointer("memory://x", {}, hyperparameters={"f": object()}), StateError, "'f'"),
    "option": (lambda: cs.Checkpointer("memory://x", {}, keeep=cs.last(3)), TypeError, "keeep"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_said_before_training(what: str) -> None:
    """By the constructor, with the way out."""
    make, kind, text = WRONG[what]
    with pytest.raises(kind, match=text):
        make()


def test_an_open_store_stays_open(store_path: Path) -> None:
    """And takes no options."""
    with cs.open(store_path) as store:
        model = torch.nn.Linear(2, 2)
        with pytest.raises(FormatError, match="keep: the store is open already"):
            cs.Checkpointer(store, {"model": model}, keep=cs.last(1))
        with cs.Checkpointer(store, {"model": model}, verbose=False) as ckpt:
            ckpt.resume()
            ckpt.step()
        assert [c.step for c in store.checkpoints()] == [1]


def test_from_a_config(tmp_path: Path) -> None:
    """All that a config says: where, when, what stays, what is restored, from where."""
    config = tmp_path / "config.yaml"
    config.write_text(
        f"storage: {tmp_path}/store\nsave: every(steps=2)\nkeep: last(1)\nfinal: false\nresume: latest\n"
        "restore: {optimizer: false}\nrun: {total_steps: 4}\n"
    )
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.5)
    state = {"model": model, "optimizer": optimizer}
    with pytest.raises(cs.NoCheckpointError), cs.Checkpointer.from_config(config, state, verbose=False) as ckpt:
        ckpt.resume()
    for resumed in (False, True):
        with cs.Checkpointer.from_config(str(config), state, verbose=False) as ckpt:
            assert bool(ckpt.resume(True)) == resumed
            optimizer.param_groups[0]["lr"] = 0.25
            for _ in range(2):
                model(torch.ones(2)).sum().backward()
                optimizer.step()
                ckpt.step()
        optimizer.param_groups[0]["lr"] = 0.125
    with cs.open(tmp_path / "store") as store:
        assert [c.step for c in store.checkpoints()] == [4]
