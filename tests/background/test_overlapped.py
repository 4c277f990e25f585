"""Overlapped saves hold the state of one moment, whatever a run does to its state meanwhile."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch

import ckptstore as cs
from tests.background.rig import Digests, Run, digests, loaded_digests, slow_reads, small_blocks

DEEDS = """forward backward step step step_all step_all average load_model load_part load_optimizer add_group new_memory
    nap nap""".split()


@pytest.fixture(autouse=True)
def small() -> Iterator[None]:
    with small_blocks():
        yield


class Saved:
    """A save and the states that it may hold.

    The one at the call; or, begun again after a write that the fence didn't see, that of one later moment in all that
    is trained, frozen or large; what else is small was copied at the call. Moments are those of the memory that was
    there at the call: an optimizer that loads gets other tensors, and a parameter may be given other memory.
    """

    def __init__(self, handle: cs.SaveHandle, tensors: dict[str, torch.Tensor], at_call: Digests, closed: bool) -> None:
        self.handle = handle
        self.moments = [at_call]
        self.closed = closed
        self._tensors = tensors

    def note(self) -> None:
        if not self.closed:
            self.moments.append(digests(self._tensors))

    def checkpoint(self) -> cs.Checkpoint | None:
        """None where the save failed, as it may where a tensor is written to after the next step, or all the time."""
        try:
            return self.handle.result()
        except cs.SaveFailedError as error:
            if "the frozen" in str(error) or "all the time" in str(error):
                return None
            raise

    def check(self, store: cs.Store, small: set[str]) -> bool:
        """Whether it holds the state at the call; anything but one of the moments is a torn checkpoint."""
        checkpoint = self.checkpoint()
        if checkpoint is None:
            return False
        found = loaded_digests(store.load(checkpoint.id))
        assert found.keys() == self.moments[0].keys()
        assert all(found[name] == self.moments[0][name] for name in small & found.keys())
        large = found.keys() - small
        matching = [i for i, moment in enumerate(self.moments) if all(found[n] == moment.get(n) for n in large)]
        assert matching, f"torn: {[n for n in found if found[n] != self.moments[0][n]]}"
        return matching[0] == 0


def lively(chance: random.Random, store: cs.Store, deeds: int) -> tuple[int, int]:
    """One run of ``deeds`` random deeds, with saves and writes by hand in between: saves, and those begun again."""
    run = Run(chance)
    copied = ("ema/", "spare", "model/norm.running", "model/norm.num", "model/average")
    small = {name for name, tensor in run.tensors().items() if tensor.nbytes < 1024 and name.startswith(copied)}
    saves: list[Saved] = []
    current: Saved | None = None

    def note() -> None:
        if current is not None:
            current.note()

    run.told = note
    for number in range(deeds):
        deed = chance.choice([*DEEDS, *["save"] * 4, *["write_by_hand", "unseen", "load"]])
        if deed == "save":
            tensors = {name: value.detach() for name, value in run.tensors().items()}
            before = digests(tensors)
            mode = chance.choice(["overlapped", "overlapped", "overlapped", "async"])
            when = chance.choice(["wait", "wait", "skip"])
            if current is not None and (when == "wait" or current.handle.done()):
                current.checkpoint()
            handle = store.save(run.state, step=number, mode=mode, when_busy=when)  # type: ignore[call-overload]
            if handle is not None:
                current = Saved(handle, tensors, before, closed=handle.mode == "async")
                saves.append(current)
        elif deed == "unseen":
            if current is not None:
                current.handle.wait_staged()
                current.closed = True
            run.write_unseen()
        elif deed == "load":
            first = saves[0].checkpoint() if saves else None
            if first is not None:
                store.load(first.id, into={"model": run.model}, only=["model/*"])
        else:
            getattr(run, deed)()
            note()
        if current is not None and current.handle.done():
            current.closed = True
    return len(saves), sum(not saved.check(store, small) for saved in saves)


@pytest.mark.filterwarnings("ignore::ckptstore.TornReadWarning")
@pytest.mark.parametrize("compression", ["none", "float-zstd"])
@pytest.mark.parametrize("max_staging", [None, 40 << 20])
def test_no_schedule_tears_a_checkpoint(compression: str, max_staging: int | None, full: bool) -> None:
    """Random runs: each checkpoint, loaded from storage, is the state at the call, or later at one single moment."""
    saves = again = 0
    for seed in range(500 if full else 2):
        chance = random.Random(seed)
        name = f"memory://lively-{compression}-{max_staging}-{seed}"
        with (
            slow_reads(random.Random(seed)) as read,
            cs.open(name, compression=compression, max_staging=max_staging) as store,
        ):
            one, other = lively(chance, store, 40)
            assert store.verify().ok
        saves, again = saves + one, again + other
        assert read[0]
        for key in list(store._storage._objects):  # type: ignore[attr-defined]
            store._storage._objects.pop(key)  # type: ignore[attr-defined]
    # Both happened: saves that hold the state at the call, and some that were begun again after a write by hand.
    assert saves > 2 * again
    assert again or not full
