"""How long a save took, and how long training waited for it, as the commit record tells."""

from __future__ import annotations

from pathlib import Path

import torch

import ckptstore as cs
from ckptstore.engine.catalogue import Timing
from ckptstore.storage.localio import FileWriter
from tests.background.holding import Gate, Training, small_blocks


def told(checkpoint: cs.Checkpoint) -> tuple[float, float]:
    """Both times, which are known."""
    assert checkpoint.timing is not None
    assert checkpoint.timing.save_s is not None
    assert checkpoint.timing.stall_s is not None
    return checkpoint.timing.save_s, checkpoint.timing.stall_s


def test_training_waits_for_all_of_a_save_in_the_foreground(store_path: Path) -> None:
    with cs.open(store_path) as store:
        save_s, stall_s = told(store.save({"x": torch.ones(3)}, step=1))
        assert 0 < save_s == stall_s
        assert store.checkpoints()[0].timing == Timing(save_s, stall_s)


def test_training_waits_for_the_call_only_where_nothing_changes_in_time(store_path: Path) -> None:
    run = Training()
    with small_blocks(), cs.open(store_path) as store, Gate(FileWriter, "write") as gate:
        handle = store.save(run.state, step=1, mode="async")
        gate.wait()
        called_s = handle.call_s
        gate.open()
        save_s, stall_s = told(handle.result())
    assert stall_s == round(called_s, 6) < save_s < handle.seconds


def test_training_waits_for_the_call_and_the_fence(store_path: Path) -> None:
    run = Training()
    with small_blocks(), cs.open(store_path) as store, Gate(FileWriter, "write") as gate:
        handle = store.save(run.state, step=1, mode="overlapped")
        gate.wait()
        run.step()
        assert handle.fence_s > 0
        stopped_s = handle.stall_s
        gate.open()
        save_s, stall_s = told(handle.result())
    assert stall_s == round(stopped_s, 6) < save_s


def test_a_call_that_goes_on_is_waited_for(store_path: Path) -> None:
    """A save that ends before its call does, as one of few bytes may, kept training waiting all the time."""
    with cs.open(store_path) as store:
        with store._dispatcher.lock:
            # As in a signal handler that interrupts a save: it is made in the caller's thread.
            handle = store.save({"x": 1}, step=1, mode="async")
        save_s, stall_s = told(handle.result())
        assert save_s == stall_s <= handle.call_s


def test_a_rollback_keeps_no_training_waiting(store_path: Path) -> None:
    with cs.open(store_path) as store:
        for step in (1, 2):
            store.save({"x": torch.ones(3)}, step=step)
        timing = store.rollback("step:1").timing
        assert timing is not None
        assert timing.save_s
        assert timing.stall_s is None
