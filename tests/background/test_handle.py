"""What a handle promises its caller: the state at the call, one save at a time, and no error lost."""

from __future__ import annotations

import itertools
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import numpy as np
import pytest
import torch

import ckptstore as cs
from ckptstore.engine import buffers
from ckptstore.errors import StorageFullError
from ckptstore.storage.localio import FileWriter

MODES: list[Literal["async", "overlapped"]] = ["async", "overlapped"]


class Brake:
    """Holds every write of a data file back until it is let go; counts them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go = threading.Event()
        self.reached = threading.Event()
        self.error: Exception | None = None
        write = FileWriter.write

        def braked(*arguments: Any) -> None:
            self.reached.set()
            assert self.go.wait(60)
            if self.error is not None:
                raise self.error
            write(*arguments)

        monkeypatch.setattr(FileWriter, "write", braked)


@pytest.fixture
def brake(monkeypatch: pytest.MonkeyPatch) -> Brake:
    return Brake(monkeypatch)


@pytest.fixture
def store(store_path: Path) -> Iterator[cs.Store]:
    store = cs.open(store_path)
    yield store
    store.close()


def trained(size: int = 256) -> dict[str, Any]:
    model = torch.nn.Linear(size, size)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model.weight.grad, model.bias.grad = torch.randn_like(model.weight), torch.randn_like(model.bias)
    optimizer.step()
    return {"model": model, "optimizer": optimizer}


def weight(store: cs.Store, selector: str = "latest") -> torch.Tensor:
    found: torch.Tensor = store.load(selector, only=["model/*"])["model"]["weight"]
    return found


def test_the_life_of_a_handle(store: cs.Store, brake: Brake) -> None:
    """Running, then done, with its figures; waiting ends in time either way."""
    handle = store.save(trained(), step=3, mode="async")
    assert brake.reached.wait(60)
    assert not handle.done()
    assert not handle.wait(0.01)
    with pytest.raises(TimeoutError, match="step 3"):
        handle.result(0.01)
    assert "running" in repr(handle)
    brake.go.set()
    checkpoint = handle.result()
    assert handle.done()
    assert handle.wait()
    assert (checkpoint.step, handle.step, handle.mode) == (3, 3, "async")
    assert 0 < handle.call_s == handle.stall_s <= handle.seconds
    assert handle.raw_bytes == checkpoint.raw_bytes
    assert handle.bytes_per_second > 0
    assert handle.seconds == handle.seconds


def test_after_an_async_call_everything_may_change(store: cs.Store, brake: Brake) -> None:
    """Parameters through any door, buffers, arrays, lists, and what is not contiguous."""
    state = trained() | {"array": np.arange(100_000), "list": [1, 2], "wide": torch.randn(300, 400).t()}
    before = state["model"].weight.detach().clone(), state["array"].copy(), state["wide"].clone()
    handle = store.save(state, step=1, mode="async")
    state["model"].weight.data.numpy()[:] = 0
    state["array"][:] = 0
    state["list"].append(3)
    state["wide"].zero_()
    brake.go.set()
    handle.wait()
    loaded = store.load(only=["model/*", "array", "list", "wide"])
    assert torch.equal(loaded["model"]["weight"], before[0])
    assert np.array_equal(loaded["array"], before[1])
    assert loaded["list"] == [1, 2]
    assert torch.equal(loaded["wide"], before[2])


@pytest.mark.parametrize("mode", ["sync", *MODES])
def test_one_save_at_a_time(mode: Any, store: cs.Store, brake: Brake) -> None:
    """The next one waits, or is skipped if that is asked for."""
    state = trained()
    first = store.save(state, step=1, mode="async")
    assert brake.reached.wait(60)
    assert store.save(state, step=2, mode=mode, when_busy="skip") is None
    threading.Timer(0.1, brake.go.set).start()
    second = store.save(state, step=3, mode=mode)
    assert first.done()
    if not isinstance(second, cs.Checkpoint):
        second.wait()
    assert [c.step for c in store.checkpoints()] == [1, 3]
    assert store.save(state, step=4, mode="async", when_busy="skip") is not None


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("asked", ["wait", "result", "save", "close", "with"])
def test_an_error_is_raised_where_somebody_asks_next(mode: Any, asked: str, store_path: Path, brake: Brake) -> None:
    """By the handle, or by the store's next call; it costs no older checkpoint and leaves nothing behind."""
    store = cs.open(store_path)
    state = trained()
    brake.go.set()
    good = store.save(state, step=1)
    brake.error = StorageFullError("full", key="x")
    handle = store.save(state, step=2, mode=mode)
    while not handle.done():
        handle._thread.join(0.01)
    brake.error = None
    ask = {
        "wait": handle.wait,
        "result": handle.result,
        "save": lambda: store.save(state, step=3),
        "close": store.close,
        "with": lambda: store.__exit__(None, None, None),
    }[asked]
    with pytest.raises(cs.SaveFailedError, match="full") as raised:
        ask()
    assert isinstance(raised.value.__cause__, StorageFullError)
    with cs.open(store_path) as again:
        assert [c.id for c in again.checkpoints()] == [good.id]
        assert not again.verify().leftovers
    if asked in ("wait", "result", "save"):
        # Told once: the store goes on.
        assert store.save(state, step=4).step == 4
        store.close()


def test_the_error_inside_a_block_comes_first(store_path: Path, brake: Brake) -> None:
    """Leaving a block with an exception keeps it, and notes that the save failed, too."""
    brake.go.set()
    brake.error = StorageFullError("full", key="x")

    def block() -> None:
        with cs.open(store_path) as store:
            store.save(trained(), step=1, mode="async")
            _ = 1 / 0

    with pytest.raises(ZeroDivisionError) as raised:
        block()
    assert "full" in raised.value.__notes__[0]


@pytest.mark.parametrize("mode", MODES)
def test_a_newer_writer_is_told_of(mode: Any, store_path: Path) -> None:
    """A run that was replaced learns it from its handle."""
    state = trained()
    with cs.open(store_path) as old, cs.open(store_path) as new:
        old.save(state, step=1)
        new.save(state, step=2)
        with pytest.raises(cs.StaleWriterError):
            old.save(state, step=3, mode=mode).result()
        assert new.resolve().step == 2


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("compression", ["none", "float-zstd"])
@pytest.mark.parametrize("threads", [1, 3])
def test_max_staging_bounds_the_copies(mode: Any, compression: str, threads: int, store_path: Path) -> None:
    """A state of four blocks with room for one: callers wait, nothing is lost, and never is more in use."""
    model = torch.nn.Linear(2048, 2 * 2048)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model.weight.grad, model.bias.grad = torch.randn_like(model.weight), torch.randn_like(model.bias)
    optimizer.step()
    before = model.weight.detach().clone()
    taken = []
    original = buffers.StagingArea.try_take

    def counted(area: buffers.StagingArea) -> buffers.Buffer | None:
        buffer = original(area)
        taken.append(area._taken)
        return buffer

    options: dict[str, Any] = {"compression": compression, "threads": threads, "max_staging": "20MB", "pool_bytes": 1}
    with mock.patch.object(buffers.StagingArea, "try_take", counted), cs.open(store_path, **options) as store:
        handle = store.save({"model": model, "optimizer": optimizer}, step=1, mode=mode)
        optimizer.step()
        assert not torch.equal(model.weight, before)
        handle.wait()
        assert torch.equal(weight(store), before)
    assert max(taken, default=0) <= 1


def test_async_uses_its_memory_again(store: cs.Store) -> None:
    """The second save's copies lie where the first's did."""
    allocated = []
    original = buffers._allocated

    def counted(**how: bool) -> buffers.Buffer:
        allocated.append(1)
        return original(**how)

    with mock.patch.object(buffers, "_allocated", counted):
        for step in range(3):
            handle = store.save(trained(3000), step=step, mode="async")
            handle.wait()
            if not step:
                first = len(allocated)
    # The pipeline may read a block itself, so that a later save needs a buffer that the first one didn't.
    blocks = -(-handle.raw_bytes // (16 << 20)) + 1
    assert 0 < first <= len(allocated) <= blocks + store._tools.pool.buffers


def test_lacking_memory_makes_the_caller_wait(store: cs.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no copy can be made, the pipeline reads everything, and then the call returns."""
    state = trained(3000)
    before = state["model"].weight.detach().clone()
    refused = []
    monkeypatch.setattr(store._tools.area, "try_take", lambda: refused.append(1))
    handle = store.save(state, step=1, mode="async")
    state["model"].weight.data.zero_()
    assert refused
    assert handle.copied_bytes == 0
    handle.wait()
    assert torch.equal(weight(store), before)


def test_other_calls_while_a_save_runs(store: cs.Store, brake: Brake) -> None:
    """Looking, loading, verifying, holding and deleting don't wait; prune spares what is running."""
    state = trained()
    brake.go.set()
    for step in (1, 2):
        store.save(state, step=step)
    brake.go.clear()
    brake.reached.clear()
    handle = store.save(state, step=3, mode="async")
    assert brake.reached.wait(60)
    assert [c.step for c in store.checkpoints()] == [1, 2]
    assert torch.equal(weight(store), state["model"].weight)
    assert store.verify().ok
    store.hold("step:2", "mine")
    store.delete("step:1")
    with cs.open(store.url) as other:
        assert other.prune().spared
    threading.Timer(0.1, brake.go.set).start()
    store.prune()
    assert handle.result().step == 3
    assert store.verify().ok


def test_two_threads_save_into_one_store(store: cs.Store) -> None:
    """All saves are there, one after the other."""
    numbers = itertools.count(1)
    lock = threading.Lock()

    def work() -> None:
        for _ in range(5):
            with lock:
                step = next(numbers)
            store.save(trained(), step=step, mode="async")

    threads = [threading.Thread(target=work, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    store.close()
    with cs.open(store.url, read_only=True) as again:
        assert sorted(c.step for c in again.checkpoints()) == list(range(1, 11))
        assert again.verify().ok


@pytest.mark.parametrize("mode", ["sync", *MODES])
def test_a_signal_handler_saves_while_its_thread_waits(mode: Any, store: cs.Store, brake: Brake) -> None:
    """A handler that runs in the midst of waiting for a save may save itself."""
    state = trained()
    saved = []

    def handler(*_: object) -> None:
        brake.go.set()
        found = store.save(state, step=2, mode=mode)
        saved.append(found if isinstance(found, cs.Checkpoint) else found.result())

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        handle = store.save(state, step=1, mode="async")
        assert brake.reached.wait(60)
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        handle.wait()
        while not saved:
            threading.Event().wait(0.01)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert [c.step for c in store.checkpoints()] == [1, 2]


def test_progress_and_borrowing_behind_training(store: cs.Store) -> None:
    """Progress is told to the end, also for what is borrowed."""
    seen: list[tuple[int, int]] = []
    model = torch.nn.Linear(1000, 1000).requires_grad_(False)
    for step in (1, 2):
        seen.clear()
        handle = store.save({"model": model}, step=step, mode="async", progress=lambda *it: seen.append(it))
        checkpoint = handle.result()
    assert seen[-1] == (checkpoint.raw_bytes, checkpoint.raw_bytes)
    assert checkpoint.borrowed_bytes == checkpoint.stored_bytes
    assert checkpoint.record.lenders


def test_wrong_options_are_named_at_once(store: cs.Store) -> None:
    """Before anything is captured or written."""
    with pytest.raises(cs.StateError, match="overlapped"):
        store.save({}, step=1, mode="later")  # type: ignore[call-overload]
    with pytest.raises(cs.StateError, match="skip"):
        store.save({}, step=1, mode="async", when_busy="fail")  # type: ignore[call-overload]
    with pytest.raises(cs.FormatError, match="max_staging"):
        cs.open("memory://x", max_staging="much")
    assert not store.checkpoints()
