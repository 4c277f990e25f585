"""A run whose loss goes astray ends, names the last good checkpoint, and goes on from it."""

from __future__ import annotations

import math
import threading
from typing import Any

import pytest
import torch

import ckptstore as cs
from ckptstore.policy.guard import Divergence
from ckptstore.storage.memory import MemoryStorage
from tests.background.holding import Gate
from tests.trainer.loops import Loop, failing, listed, settle, steps, url, warned

GUARD = cs.diverged("loss")


def poison(loop: Loop) -> None:
    with torch.no_grad():
        loop.model[0].weight[0, 0] = math.nan  # type: ignore[index]


def train(loop: Loop, until: int, poisoned_after: int | None = None) -> Loop:
    """``poisoned_after``: that many steps, the weights are no numbers any more."""
    with loop.ckpt as ckpt:
        ckpt.resume()
        for _ in ckpt.epochs(9):
            for (batch,) in ckpt.batches(loop.data):
                loss = loop.learn(batch)
                ckpt.step(loss=loss)
                loop.losses[ckpt.progress.step] = loss.item()
                if ckpt.progress.step == poisoned_after:
                    poison(loop)
                if ckpt.progress.step == until:
                    return loop
    raise AssertionError


@pytest.mark.parametrize("mode", ["sync", "async", "overlapped"])
@pytest.mark.parametrize("every", [1, 5])
def test_nan_in_the_midst(every: int, mode: Any) -> None:
    """The loss of step 13 is nan, as the weights were after step 12: the last good checkpoint is of 11 or before.

    It is named, nothing is saved of what came after, and after a rollback the run goes on and comes out as if nothing
    had happened.
    """
    place, found = url(), []

    class Told(cs.Listener):
        def on_diverged(self, event: Divergence) -> None:
            found.append((event.step, event.since, math.isnan(event.value)))

    save = cs.every(steps=every)
    loop = Loop(place, save=save, mode=mode, stop_on=GUARD, listeners=[Told()])
    with pytest.raises(cs.DivergedError, match="loss is nan") as ended:
        train(loop, 40, poisoned_after=12)
    good = 11 if every == 1 else 10
    assert found == [(12, 11, True)]
    assert (ended.value.step, loop.ckpt.progress.step) == (good, 13)
    assert steps(place) == list(range(every, 13, every))
    with cs.open(place) as store:
        assert store.resolve(f"step:{good}").id == ended.value.id
        if every == 1:
            assert ended.value.id != store.resolve().id
            store.rollback(ended.value.id or "")
        assert store.resolve().step == good
    again = train(Loop(place, seed=3, stop_on=GUARD, final=False), 30)
    whole = train(Loop(url(), final=False), 30)
    assert again.losses == {step: loss for step, loss in whole.losses.items() if step > good}


def test_the_good_one_is_still_being_saved() -> None:
    """Then it is waited for: it is the one to be named."""
    place = url()
    loop = Loop(place, save="at(2, 6)", mode="async", stop_on=GUARD)
    loop.ckpt.resume()
    for _ in range(5):
        loop.step()
    settle(loop.ckpt)
    with Gate(MemoryStorage, "open_writer") as gate:
        loop.step()
        gate.wait()
        loop.step()
        poison(loop)
        # Whether it is opened before or after somebody waits makes no difference, if somebody waits.
        threading.Timer(0.2, gate.open).start()
        with pytest.raises(cs.DivergedError) as ended:
            loop.step()
    assert ended.value.step == 6
    loop.ckpt.close()
    assert steps(place) == [2, 6]


@pytest.mark.parametrize("final", [True, False])
def test_whoever_catches_it_saves_nothing_by_chance(final: bool) -> None:
    """Neither the end nor what failed before is saved of a state that is lost."""
    place = url()
    loop = Loop(place, save="milestones('3', of='steps')", stop_on=GUARD, final=final)
    with loop.ckpt as ckpt:
        ckpt.resume()
        with failing():
            loop.step()
            loop.step()
            loop.step()
            settle(ckpt)
        with warned():
            loop.step()
        poison(loop)
        with pytest.raises(cs.DivergedError, match="No checkpoint is that old"):
            loop.step()
    assert listed(place) == []


def test_before_the_first_checkpoint() -> None:
    """There is none to go on from, and that is said."""
    place = url()
    loop = Loop(place, save="at(9)", stop_on=GUARD)
    with pytest.raises(cs.DivergedError, match="No checkpoint is that old") as ended:
        train(loop, 40, poisoned_after=2)
    assert (ended.value.id, listed(place)) == (None, [])


def test_a_reported_metric() -> None:
    """An evaluation speaks for the state as it is: what was due at that very step isn't saved."""
    place = url()
    loop = Loop(place, save="every(steps=3)", stop_on=cs.diverged("val_loss"))

    def evaluated() -> None:
        with loop.ckpt as ckpt:
            ckpt.resume()
            for (batch,) in ckpt.batches(loop.data):
                ckpt.step(loss=loop.learn(batch))
                ckpt.report(val_loss=math.inf if ckpt.progress.step == 6 else 1.0)

    with pytest.raises(cs.DivergedError, match="val_loss is inf") as ended:
        evaluated()
    assert (ended.value.step, steps(place)) == (3, [3])


def test_what_the_guard_has_learnt_is_restored() -> None:
    """A run that resumes finds a loss that is far from the usual one as soon as one that never stopped."""

    def found(place: str, parts: list[int]) -> int:
        """At which step, in a run that is made of processes with these many steps."""
        for number, until in enumerate(parts):
            loop = Loop(place, parts="model optimizer scheduler", stop_on=cs.diverged("loss", after=20))
            loop.ckpt.resume()
            try:
                while loop.ckpt.progress.step < until:
                    step = loop.ckpt.progress.step
                    loop.ckpt.step(loss=1.0 + 0.01 * (step % 3) if step < 60 else 5.0)
            except cs.DivergedError:
                assert number == len(parts) - 1
                return loop.ckpt.progress.step
            finally:
                loop.ckpt.close()
        raise AssertionError

    assert found(url(), [200]) == found(url(), [50, 62, 200])


def test_a_saved_guard_and_none_here() -> None:
    """And none saved, and one here: both are no error."""
    place = url()
    train(Loop(place, stop_on=GUARD), 3)
    train(Loop(place), 5)
    train(Loop(place, stop_on=GUARD), 7)
    assert steps(place) == [3, 5, 7]
