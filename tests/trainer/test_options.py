"""What is saved and brought back, where from, and what is said where the run here is not the one that was saved."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, ReduceLROnPlateau, StepLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

import ckptstore as cs
from tests.trainer.loops import Loop, listed, run, steps, url, warned


def differs(loop: Loop, whole: Loop) -> set[str]:
    """Which parts are not as in ``whole`` after step 12 of both, the first six of them made by another process."""
    found = set()
    if loop.seen != {step: batch for step, batch in whole.seen.items() if step > 6}:
        found.add("data")
    if loop.losses != {step: loss for step, loss in whole.losses.items() if step > 6}:
        found.add("losses")
    if loop.optimizer.state[loop.model.get_parameter("0.weight")]["step"] != 12:
        found.add("optimizer")
    if loop.scheduler.last_epoch != 12:
        found.add("scheduler")
    return found


@pytest.mark.parametrize(
    ("part", "lost"),
    [
        ("optimizer", {"optimizer", "losses"}),
        # The rates that it has set are the optimizer's, and so restored with it.
        ("scheduler", {"scheduler"}),
        ("rng", {"losses"}),
        ("data", {"data", "losses"}),
    ],
)
@pytest.mark.parametrize("when", ["saving", "resuming"])
def test_each_part_can_be_left_out(part: str, lost: set[str], when: str) -> None:
    """When it is saved, or when it is restored; all else is as it was. What was to be restored and isn't there is told.

    Without its random state a run draws other numbers; the order of its data is a matter of its position there.
    """
    place = url()
    without = cs.Parts(**{part: False})
    run(place, 6, save="at(6)", include=without if when == "saving" else cs.Parts())
    whole = run(url(), 12)
    loop = Loop(place, seed=9, final=False)
    with warned() as said, loop.ckpt as ckpt:
        ckpt.resume(restore=without if when == "resuming" else cs.Parts())
        loop.until(12)
    named = when == "saving" and part in ("optimizer", "scheduler")
    assert said == ([f"the checkpoint has no {part!r}: it keeps the value that it has"] if named else [])
    assert differs(loop, whole) == lost


def test_random_state_is_left_alone() -> None:
    """Python's, NumPy's and torch's generators stand after the resume where they stood before."""
    place = url()
    run(place, 6, save="at(6)")
    loop = Loop(place, seed=9, final=False)
    before = random.getstate(), torch.get_rng_state()
    with loop.ckpt as ckpt:
        ckpt.resume(restore=cs.Parts(rng=False))
        assert random.getstate() == before[0]
        assert torch.equal(torch.get_rng_state(), before[1])
    with Loop(place, seed=9, final=False).ckpt as ckpt:
        ckpt.resume()
        assert not torch.equal(torch.get_rng_state(), before[1])


class Stubborn:
    """Saves itself, and refuses to be loaded."""

    def __init__(self, value: float = 0.0) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise ValueError("this value can't be")


Make = Callable[[Loop], Any]
MISFITS: dict[str, tuple[str, Make, Make]] = {
    "fewer parameters": (
        "optimizer",
        lambda x: x.optimizer,
        lambda x: torch.optim.AdamW([nn.Parameter(torch.ones(1))]),
    ),
    "another optimizer": (
        "optimizer",
        lambda x: x.optimizer,
        lambda x: torch.optim.SGD(x.model.parameters(), lr=0.1, momentum=0.9),
    ),
    "another scheduler": ("scheduler", lambda x: x.scheduler, lambda x: CosineAnnealingLR(x.optimizer, 9)),
    "another thing": ("optimizer", lambda x: x.optimizer, lambda x: {"a": 1}),
    "refused": ("more", lambda x: Stubborn(), lambda x: Stubborn()),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_a_part_that_fails_to_load_is_fatal(misfit: str) -> None:
    """Nothing has changed then, and nothing is saved."""
    name, saved, here = MISFITS[misfit]
    place = url()
    loop = Loop(place, save="at(2)", final=False)
    with loop.ckpt as ckpt:
        ckpt.state[name] = saved(loop)
        ckpt.resume()
        loop.until(2)
    other = Loop(place, seed=2)
    other.ckpt.state[name] = here(other)
    before = other.weights, other.optimizer.state_dict(), other.scheduler.state_dict(), torch.get_rng_state()
    with other.ckpt as ckpt:
        with pytest.raises(cs.StateError) as refused:
            ckpt.resume()
        assert name in str(refused.value)
        with pytest.raises(cs.StateError, match="call resume"):
            ckpt.step()
    if misfit != "refused":
        assert (other.weights, other.optimizer.state_dict(), other.scheduler.state_dict()) == before[:3]
        assert torch.equal(torch.get_rng_state(), before[3])
    assert steps(place) == [2]


def test_in_which_order_it_is_called() -> None:
    """``resume`` once, and before all else."""
    loop = Loop(url())
    uses: list[Callable[[], object]] = [
        loop.step,
        lambda: loop.ckpt.report(val_loss=1.0),
        loop.ckpt.save,
        loop.ckpt.end_epoch,
        lambda: next(loop.ckpt.epochs(1)),
        lambda: next(loop.ckpt.batches(loop.data)),
    ]
    for use in uses:
        with pytest.raises(cs.StateError, match=r"call resume\(\) before the first step"):
            use()
    loop.ckpt.resume()
    with pytest.raises(cs.StateError, match="was called already"):
        loop.ckpt.resume()
    loop.ckpt.close()


def test_from_another_store() -> None:
    """By its URL: the run goes on in its own store, which must be empty or be told of a new line."""
    base, place = url(), url()
    run(base, 6, save="at(4, 6)")
    loop = Loop(place, save="at(8)", final=False)
    with loop.ckpt as ckpt:
        resumed = ckpt.resume(base)
        assert (resumed.url, ckpt.progress.step) == (base, 6)
        loop.until(8)
    assert (steps(base), steps(place)) == ([4, 6], [8])
    with Loop(place).ckpt as ckpt, pytest.raises(cs.ExistsError, match="would begin anew"):
        ckpt.resume(base)
    with Loop(place).ckpt as ckpt:
        ckpt.resume(base, new_line=True)
    # The end is saved here, as it lies only there.
    assert listed(place) == [(8, ["step 8"]), (6, ["final"])]


def test_a_new_line_in_the_same_store() -> None:
    """Begins at step 0 and is the latest as soon as it is saved; the old one stays."""
    place = url()
    run(place, 6, save="at(3, 6)")
    run2 = Loop(place, save="at(2)", final=False)
    with run2.ckpt as ckpt:
        assert not ckpt.resume(False, new_line=True)
        run2.until(2)
    assert steps(place) == [3, 6, 2]
    with Loop(place, final=False).ckpt as ckpt:
        ckpt.resume()
        assert ckpt.progress.step == 2


def test_what_differs_is_told() -> None:
    """Rates and other settings, hyper-parameters, and the batch size; which value is used stands there, too."""
    place = url()
    saved: dict[str, Any] = {"layers": 2, "betas": (0.9, 0.95), "name": "a", "limit": float("nan"), "only": 1}
    run(place, 3, save="at(3)", hyperparameters=saved)
    here = {**saved, "layers": 3, "betas": [0.9, 0.95], "added": 1}
    del here["only"]
    loop = Loop(place, hyperparameters=here, final=False)
    loop.optimizer = torch.optim.AdamW(loop.model.parameters(), lr=0.02, weight_decay=0.5)
    loop.scheduler = StepLR(loop.optimizer, 3)
    loop.data = DataLoader(loop.data.dataset, batch_size=4, shuffle=True)
    loop.ckpt.state.update(optimizer=loop.optimizer, scheduler=loop.scheduler, data=loop.data)
    with warned() as said, loop.ckpt as ckpt:
        resumed = ckpt.resume()
        loop.until(5)
    assert said == [
        *resumed.differences,
        "the source 'data' had 2 samples a batch when it was saved and has 4 now; its pass is continued after the 6 "
        "samples that were used",
    ]
    assert sorted(text.partition(";")[0] for text in resumed.differences) == [
        "added is 1 here and wasn't set when it was saved",
        "layers is 3 here and was 2 when it was saved",
        "only was 1 when it was saved and isn't set here",
        "optimizer: lr is 0.02 here and was 0.01 when it was saved",
        "optimizer: weight_decay is 0.5 here and was 0.01 when it was saved",
    ]
    assert loop.optimizer.param_groups[0]["weight_decay"] == 0.01
    # What is left of the batch of four that was half used, and then a whole one.
    assert [len(batch) for batch in loop.seen.values()] == [2, 4]


def test_what_is_not_wanted_here() -> None:
    """Parts that the checkpoint has and the state has not are named."""
    place = url()
    run(place, 3, save="at(3)")
    with Loop(place, parts="model", final=False).ckpt as ckpt, warned() as said:
        resumed = ckpt.resume()
    assert resumed.unused == ["optimizer", "scheduler"]
    assert said == [f"the checkpoint has {name!r}, which nothing here takes" for name in resumed.unused]


class Team:
    """Two models, each with an optimizer and a scheduler, a scaler, an average and whatever else."""

    def __init__(self, place: str, kind: str, seed: int) -> None:
        torch.manual_seed(seed)
        self.models = [nn.Linear(4, 4), nn.Linear(4, 4)]
        self.optimizers = [torch.optim.AdamW(m.parameters(), lr=0.05) for m in self.models]
        self.schedulers = [StepLR(self.optimizers[0], 2), ExponentialLR(self.optimizers[1], 0.9)]
        self.plateau = ReduceLROnPlateau(self.optimizers[1], patience=1)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=3)
        self.average = AveragedModel(self.models[0], multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
        named = {"list": lambda x: x, "dict": lambda x: dict(zip("ab", x, strict=True)), "tuple": tuple}[kind]
        state = {
            "models": named(self.models),
            "optimizer": named(self.optimizers),
            "scheduler": named(self.schedulers),
            "plateau": self.plateau,
            "scaler": self.scaler,
            "average": self.average,
        }
        options: dict[str, Any] = {"verbose": False, "signals": False, "final": False}
        self.ckpt = cs.Checkpointer(place, state, save=cs.at(3), **options)

    def step(self) -> list[float]:
        losses = []
        for model, optimizer in zip(self.models, self.optimizers, strict=True):
            loss = model(torch.rand(4)).square().sum()
            losses.append(loss.item())
            self.scaler.scale(loss).backward()
            self.scaler.step(optimizer)
            optimizer.zero_grad()
        self.scaler.update()
        for scheduler in self.schedulers:
            scheduler.step()
        self.plateau.step(losses[1])
        self.average.update_parameters(self.models[0])
        self.ckpt.step()
        losses += [self.scaler.get_scale(), self.average.module.weight.sum().item()]
        return losses + [group["lr"] for optimizer in self.optimizers for group in optimizer.param_groups]


@pytest.mark.parametrize("kind", ["list", "dict", "tuple"])
def test_several_of_each(kind: str) -> None:
    """Optimizers, schedulers, a gradient scaler and averaged weights all go on where they were."""
    place = url()
    team = Team(place, kind, seed=1)
    with team.ckpt as ckpt:
        ckpt.resume()
        for _ in range(3):
            team.step()
        expected = [team.step() for _ in range(3)]
    team = Team(place, kind, seed=2)
    with team.ckpt as ckpt:
        resumed = ckpt.resume(check=True)
        assert (resumed.kept, resumed.unused, resumed.differences) == ([], [], [])
        assert [team.step() for _ in range(3)] == expected
    with Team(place, kind, seed=2).ckpt as ckpt:
        ckpt.resume(restore=cs.Parts(optimizer=False, scheduler=False))
        assert len(ckpt.state["optimizer"]["a" if kind == "dict" else 0].state) == 0


@pytest.mark.parametrize(("saved", "here"), [(False, False), (True, True), (True, False), (False, True)])
def test_a_scaler_that_is_not_used(saved: bool, here: bool) -> None:
    """One that is disabled has no state: it takes none, and one that is enabled can't do with it, which is said."""
    place = url()

    def begun(enabled: bool) -> Loop:
        loop = Loop(place, save="at(1)", final=False)
        loop.ckpt.state["scaler"] = torch.amp.GradScaler("cpu", init_scale=16.0, enabled=enabled)
        return loop

    loop = begun(saved)
    with loop.ckpt as ckpt:
        ckpt.resume()
        loop.step()
    with begun(here).ckpt as ckpt:
        if here and not saved:
            with pytest.raises(cs.StateError, match="scaler"):
                ckpt.resume()
        else:
            ckpt.resume(check=saved == here)
            assert ckpt.progress.step == 1


@pytest.mark.parametrize(("first", "second"), [(True, False), (False, True), (True, True)])
@pytest.mark.filterwarnings("ignore")
def test_compiled_and_plain(first: bool, second: bool) -> None:
    """A compiled run reads a plain one's checkpoint, and the other way round, and goes on as if it were the same."""
    place = url()
    whole = run(url(), 16)
    for number, compiled in enumerate((first, second)):
        loop = Loop(place, seed=1 + number, save="at(8)", final=False)
        if compiled:
            loop.model = torch.compile(loop.model, backend="eager")  # type: ignore[assignment]
            loop.ckpt.state["model"] = loop.model
        with loop.ckpt as ckpt:
            resumed = ckpt.resume(check=True)
            assert not resumed.kept
            assert not resumed.unused
            loop.until(8 * (number + 1))
    assert loop.losses == {step: loss for step, loss in whole.losses.items() if step > 8}
    with cs.open(place) as store:
        assert sorted(store.load()["model"]) == ["0.bias", "0.weight", "2.bias", "2.weight"]
