"""What is found, restored and kept: latest, parts that are there or not, damage, data, and the best of a run."""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ckptstore as cs
from ckptstore.storage import memory
from tests.trainer.loops import Loop, listed, run, steps, url, warned


def damage(place: str, step: int, how: str) -> None:
    """Of the data files of a checkpoint: empty, cut off, another bit, or gone."""
    space = memory._spaces[place.removeprefix("memory://")]
    with cs.open(place) as store:
        id = store.resolve(f"step:{step}").id
    for key in [key for key in space if key.startswith(f"checkpoints/{id}/") and "model" in key]:
        stored = space.pop(key)
        cut = {"empty": b"", "cut": stored.data[:-7], "bit": stored.data[:-1] + bytes([stored.data[-1] ^ 1])}
        if how != "gone":
            space[key] = stored._replace(data=cut[how])


def test_D02_latest_is_the_one_saved_last() -> None:
    """After going back from 30 to 10 and on to 12, the newest is 12, whatever the steps of the others are."""
    place = url()
    run(place, 30, save="every(steps=10)")
    run(place, 12, resume="step:10", save="at(12)")
    assert steps(place) == [10, 20, 30, 12]
    with Loop(place, final=False).ckpt as ckpt:
        assert ckpt.resume().checkpoint.step == 12  # type: ignore[union-attr]


def test_D04_what_resume_takes(tmp_path: Path) -> None:
    """True, a path, one that isn't there, and False where some exist: that is refused, as it would mix two runs."""
    place = str(tmp_path / "store")
    run(place, 20, save="every(steps=10)")
    with cs.open(place) as store:
        folder = tmp_path / "store" / "checkpoints" / store.resolve("step:10").id
    places: list[tuple[Any, int]] = [(str(folder), 10), (folder, 10), (place, 20), (f"file://{place}", 20)]
    cases = [(place, True, 20), (place, "latest", 20), *((here, *case) for case in places for here in (place, url()))]
    for here, select, step in cases:
        with Loop(here, final=False).ckpt as ckpt:
            assert ckpt.resume(select).checkpoint.step == step  # type: ignore[union-attr]
            assert ckpt.progress.step == step
    for missing in ("step:11", "best:loss2", str(folder)[:-1] + "x", str(tmp_path / "nothing"), "latest"):
        with Loop(url(), final=False).ckpt as ckpt, pytest.raises(FileNotFoundError):
            ckpt.resume(missing)
    with Loop(place, final=False).ckpt as ckpt:
        with pytest.raises(FileExistsError, match="has 2 checkpoints, the newest of step 20"):
            ckpt.resume(False)
        assert not ckpt.resume(False, new_line=True)
        assert ckpt.progress.step == 0


def saved_with_rate(parts: str = "model optimizer scheduler") -> str:
    """A store that has one checkpoint after one step, with a learning rate of 0.005."""
    place = url()
    loop = Loop(place, parts=parts, save="at(1)", final=False)
    with loop.ckpt as ckpt:
        ckpt.resume()
        loop.optimizer.param_groups[0]["lr"] = 0.005
        loop.step()
    assert steps(place) == [1]
    return place


def test_D05_rate_and_scheduler_are_restored() -> None:
    loop = Loop(saved_with_rate(), parts="model optimizer scheduler", final=False)
    assert (loop.optimizer.param_groups[0]["lr"], loop.scheduler.last_epoch) == (0.01, 0)
    with loop.ckpt as ckpt:
        ckpt.resume()
    assert (loop.optimizer.param_groups[0]["lr"], loop.scheduler.last_epoch) == (0.005, 1)


@pytest.mark.parametrize(
    ("saved", "missing", "rate", "epoch"),
    [
        ("model", ["optimizer", "scheduler"], 0.01, 0),
        ("model scheduler", ["optimizer"], 0.01, 1),
        ("model optimizer", ["scheduler"], 0.005, 0),
    ],
)
def test_D06_what_is_missing_keeps_its_value(saved: str, missing: list[str], rate: float, epoch: int) -> None:
    """With a warning that names it; all else is restored."""
    loop = Loop(saved_with_rate(saved), parts="model optimizer scheduler", final=False)
    with loop.ckpt as ckpt, warned() as said:
        resumed = ckpt.resume()
    assert resumed.kept == missing
    assert said == [f"the checkpoint has no {name!r}: it keeps the value that it has" for name in missing]
    assert (loop.optimizer.param_groups[0]["lr"], loop.scheduler.last_epoch) == (rate, epoch)


@pytest.mark.parametrize(
    ("include", "there"),
    [
        (cs.Parts(scheduler=False), {"model", "optimizer", "trainer"}),
        (cs.Parts(optimizer=False), {"model", "scheduler", "trainer"}),
        (cs.Parts(False, False, False, False), {"model", "trainer"}),
    ],
    ids=["no scheduler", "no optimizer", "none"],
)
def test_D07_what_is_not_to_be_saved(include: cs.Parts, there: set[str]) -> None:
    """Where all is left out, the run's own entry still has step and metrics, but neither random state nor positions."""
    place = url()
    run(place, 3, save="at(3)", include=include)
    with cs.open(place) as store:
        state = store.load()
    assert state.keys() == there
    assert ("rng" in state["trainer"], "data" in state["trainer"]) == (include.rng, include.data)


def test_D08_the_scheduler_is_not_restored() -> None:
    loop = Loop(saved_with_rate(), parts="model optimizer scheduler", final=False)
    with loop.ckpt as ckpt, warnings.catch_warnings():
        warnings.simplefilter("error")
        ckpt.resume(restore=cs.Parts(scheduler=False))
    assert (loop.optimizer.param_groups[0]["lr"], loop.scheduler.last_epoch) == (0.005, 0)


def test_D17_what_is_touched_later_is_not_newer(store_path: Path) -> None:
    """Neither new times of files nor a copy with times of its own change what is the latest."""
    run(str(store_path), 30, save="every(steps=10)")
    with cs.open(store_path) as store:
        old = store.resolve("step:10").id
    for file in store_path.rglob("*"):
        if old in str(file):
            os.utime(file, (2**32 - 1, 2**32 - 1))
    copied = store_path.with_name("copy")
    shutil.copytree(store_path, copied, copy_function=shutil.copyfile)
    for place in (store_path, copied):
        with Loop(str(place), final=False).ckpt as ckpt:
            assert ckpt.resume().checkpoint.step == 30  # type: ignore[union-attr]


@pytest.mark.parametrize("factory", [False, True])
@pytest.mark.parametrize("how", ["empty", "cut", "bit", "gone"])
def test_D21_the_newest_is_damaged(how: str, factory: bool) -> None:
    """The one before is taken, with a warning that says so; where all are damaged it is never a fresh start."""
    place = url()
    expected = run(place, 20, save="every(steps=10)")
    damage(place, 20, how)

    def resumed() -> Loop:
        loop = Loop(place, seed=4, final=False)
        state = loop.ckpt.state
        if factory:
            options: dict[str, Any] = {"verbose": False, "signals": False, "poll": None, "final": False}
            loop.ckpt = cs.Checkpointer(place, lambda extra: state, **options)
        return loop

    loop = resumed()
    with loop.ckpt as ckpt:
        with pytest.warns(cs.FallbackWarning, match="is damaged, trying the one before"):
            ckpt.resume()
        assert ckpt.progress.step == 10
        loop.until(20)
    assert loop.losses == {step: loss for step, loss in expected.losses.items() if step > 10}
    damage(place, 10, how)
    loop = resumed()
    with loop.ckpt as ckpt, warned(), pytest.raises(cs.IntegrityError):
        ckpt.resume()
    assert steps(place) == [10, 20]


@pytest.mark.parametrize("factory", [False, True])
def test_D21_no_record_can_be_read(factory: bool) -> None:
    """A store whose commit records are all damaged is not taken for an empty one."""
    place = url()
    run(place, 10, save="at(10)")
    space = memory._spaces[place.removeprefix("memory://")]
    for key in [key for key in space if key.startswith("commits/")]:
        space[key] = space[key]._replace(data=space[key].data[:20])
    state = Loop(url()).ckpt.state
    ckpt = cs.Checkpointer(place, (lambda extra: state) if factory else state, verbose=False, signals=False)
    with ckpt, warned(), pytest.raises(cs.IntegrityError):
        ckpt.resume()


def test_D23_parts_that_do_not_fit() -> None:
    """Missing ones are told, a model of another shape is fatal and nothing is changed, a name of the run's refused."""
    place = url()
    run(place, 3, save="at(3)")
    other = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.1), nn.Linear(5, 1))
    optimizer = torch.optim.AdamW(other.parameters(), lr=0.5)
    before = [p.clone() for p in other.parameters()]
    with cs.Checkpointer(place, {"model": other, "optimizer": optimizer}, verbose=False, signals=False) as ckpt:
        with pytest.raises(TypeError, match=r"model/0\.weight") as refused:
            ckpt.resume()
        assert isinstance(refused.value, cs.StateError)
    assert all(map(torch.equal, before, other.parameters()))
    assert (optimizer.param_groups[0]["lr"], len(optimizer.state)) == (0.5, 0)
    assert steps(place) == [3]
    with pytest.raises(cs.StateError, match="'trainer' is where the run itself stands"):
        cs.Checkpointer(place, {"trainer": other})
    with pytest.raises(cs.StateError, match="give a dict of names"):
        cs.Checkpointer(place, [other])  # type: ignore[arg-type]


def test_D26_a_run_without_a_model() -> None:
    """Decided: what the state has is all that is needed; nothing has to be declared."""
    place = url()
    loop = Loop(place, parts="optimizer", save="at(2)", final=False)
    with loop.ckpt as ckpt:
        ckpt.resume()
        loop.step()
        loop.step()
    again = Loop(place, parts="optimizer", final=False)
    with again.ckpt as ckpt:
        assert ckpt.resume().kept == []
    assert len(again.optimizer.state) == 4


class Stream:
    """Items that count themselves, as a loader with a state of its own does."""

    def __init__(self, count: int) -> None:
        self.count, self.at = count, 0

    def __iter__(self) -> Any:
        while self.at < self.count:
            self.at += 1
            yield self.at - 1
        self.at = 0

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


@pytest.mark.parametrize("own", [True, False], ids=["with a state", "without"])
@pytest.mark.parametrize(("count", "used", "following"), [(20, 2, [2, 3, 4]), (5, 3, [3, 4])])
def test_D27_the_loader_goes_on(count: int, used: int, following: list[int], own: bool) -> None:
    """At the first item that no step used; a loader without a state is read again up to there."""
    place = url()
    model = nn.Linear(1, 1)

    def begun() -> tuple[cs.Checkpointer, Any]:
        loader: Any = Stream(count) if own else list(range(count))
        state = {"model": model, "data": loader} if own else {"model": model}
        options: dict[str, Any] = {"verbose": False, "signals": False, "final": False}
        return cs.Checkpointer(place, state, save=cs.at(used), **options), loader

    ckpt, loader = begun()
    with ckpt:
        ckpt.resume()
        for item in ckpt.batches(loader):
            if item == used:
                break
            ckpt.step()
    with cs.open(place) as store:
        assert ("data" in store.load()) is False
    ckpt, loader = begun()
    with ckpt:
        assert ckpt.resume().kept == []
        found = []
        for item in ckpt.batches(loader):
            found.append(item)
            ckpt.step()
    assert found[: len(following)] == following
    assert found[-1] == count - 1


def test_D28_a_new_trainer_resumes() -> None:
    """Saved at step 50 with a rate of 0.003, of which the scheduler has made one step."""
    place = url()

    def begun() -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler, cs.Checkpointer]:
        model = nn.Linear(2, 2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1000)
        state = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
        return optimizer, scheduler, cs.Checkpointer(place, state, save=cs.at(50), verbose=False, signals=False)

    optimizer, scheduler, ckpt = begun()
    with ckpt:
        ckpt.resume()
        optimizer.param_groups[0]["lr"] = 0.003
        optimizer.step()
        scheduler.step()
        for _ in range(50):
            ckpt.step()
    optimizer, scheduler, ckpt = begun()
    with ckpt:
        assert ckpt.resume(True).checkpoint.step == 50  # type: ignore[union-attr]
        assert (optimizer.param_groups[0]["lr"], scheduler.last_epoch) == (0.003, 1)


def test_D29_a_run_with_a_limit_and_the_two_best(tmp_path: Path) -> None:
    """100 steps, saved each 25, the last three and the two best stay, in the order of their saves."""
    place = str(tmp_path / "store")
    losses = {25: 0.1, 50: 0.2, 75: 0.4, 100: 0.3}
    loop = Loop(place, save="every(steps=25)", keep=cs.last(3) | cs.best("val_loss", n=2), final=False)
    with loop.ckpt as ckpt:
        ckpt.resume()
        loop.until(100, evaluate=losses)
    assert steps(place) == [25, 50, 75, 100]
    loop = Loop(place, save="every(steps=25)", keep=cs.last(3) | cs.best("val_loss", n=2), final=False)
    with loop.ckpt as ckpt:
        ckpt.resume()
        loop.until(150, epochs=13, evaluate={125: 0.5, 150: 0.6})
    assert steps(place) == [25, 50, 100, 125, 150]
    with cs.open(place) as store:
        assert store.resolve("best:val_loss").step == 25
        assert store.verify().ok
    assert len(list((tmp_path / "store" / "checkpoints").iterdir())) == 5


def test_D30_the_best_after_the_store_has_moved(tmp_path: Path) -> None:
    """Nothing in it names a place: moved, and with a checkpoint gone, the rest is found and the best still compared."""
    place, moved = tmp_path / "store", tmp_path / "elsewhere" / "store"
    run_best(str(place), 10, {2: 0.5, 4: 0.3, 6: 0.4})
    assert listed(str(place)) == [(2, ["best val_loss"]), (4, ["best val_loss"])]
    moved.parent.mkdir()
    place.rename(moved)
    with cs.open(moved) as store:
        assert store.resolve("best:val_loss").step == 4
        store.delete("step:2")
    # 0.35 is no best: 0.3 was saved before.
    run_best(str(moved), 20, {12: 0.35, 14: 0.2})
    assert steps(str(moved)) == [4, 14]


def run_best(place: str, until: int, losses: dict[int, float]) -> None:
    loop = Loop(place, save="on_best(val_loss)", final=False)
    with loop.ckpt as ckpt:
        ckpt.resume()
        loop.until(until, evaluate=losses)


class Tied(nn.Module):
    """An embedding whose weight is the head's."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 4)
        self.head = nn.Linear(4, 8, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.embedding(tokens))
        return out


def test_D31_tied_weights() -> None:
    """Stay tied, are stored once, and are read by single names; as plain data they fit a module's ``load_state_dict``.

    Decided: what was saved as a module is restored into one, not into a raw dict of its tensors.
    """
    place = url()

    def begun(save: str = "at(1)") -> tuple[Tied, torch.optim.Optimizer, cs.Checkpointer]:
        model = Tied()
        optimizer = torch.optim.AdamW(model.parameters())
        state = {"model": model, "optimizer": optimizer}
        return model, optimizer, cs.Checkpointer(place, state, save=save, verbose=False, signals=False, final=False)

    model, optimizer, ckpt = begun()
    with ckpt:
        ckpt.resume()
        model(torch.arange(8)).sum().backward()
        optimizer.step()
        ckpt.step()
    again, _, ckpt = begun()
    with ckpt:
        ckpt.resume(check=True)
        assert again.head.weight is again.embedding.weight
        assert torch.equal(again.head.weight, model.head.weight)
    with cs.open(place) as store:
        assert [name for name in store.contents(store.resolve()).tensors if name.startswith("model/")] == [
            "model/embedding.weight"
        ]
        again = Tied()
        again.load_state_dict(store.load()["model"])
        assert torch.equal(again.head.weight, model.head.weight)
        assert store.load(only=["model/embedding.weight"]).keys() == {"model"}
