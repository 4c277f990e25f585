"""What a save in the background promises: its handle, its errors, its memory, and what else may happen meanwhile."""

from __future__ import annotations

import gc
import os
import random
import signal
import threading
import uuid
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import ckptstore as cs
from ckptstore.engine import buffers, committer
from ckptstore.engine.background import Background
from ckptstore.engine.claim import Claim
from ckptstore.engine.dispatcher import Dispatcher
from ckptstore.engine.plan import PlannedFile
from ckptstore.engine.saver import Saver, Tools
from ckptstore.engine.stage import Stage
from ckptstore.errors import StorageFullError
from ckptstore.storage.localio import FileWriter
from ckptstore.storage.memory import MemoryStorage, MemoryWriter
from tests.background.holding import BLOCK, HANG_S, Counted, Fault, Gate, Training, frozen, plain, small_blocks

pytestmark = pytest.mark.timeout(2 * HANG_S)

BEHIND = ["async", "overlapped"]
MODES = ["sync", *BEHIND]
FULL = StorageFullError("no space left on the device")


@pytest.fixture(autouse=True)
def _small() -> Iterator[None]:
    with small_blocks():
        yield


@pytest.fixture
def url() -> str:
    return f"memory://{uuid.uuid4().hex}"


@pytest.fixture
def store(url: str) -> Iterator[cs.Store]:
    with cs.open(url) as opened:
        yield opened


def holds(store: cs.Store, selector: str, expected: dict[str, Any]) -> bool:
    """Whether a checkpoint, read back from storage, is ``expected`` in every bit."""
    return plain(store.load(selector)) == expected


def finish(saved: Any) -> cs.Checkpoint:
    """The checkpoint, of whatever mode the save was."""
    return saved.result(HANG_S) if isinstance(saved, cs.SaveHandle) else saved


def objects(store: cs.Store) -> list[str]:
    """Every object that there is."""
    return [entry.key for entry in store._storage.list("")]


def before_reading() -> Gate:
    """Holds a save before anything of the state is read."""
    return Gate(Claim, "next_id")


def before_writing() -> Gate:
    """Holds the pipeline when it has read a first block."""
    return Gate(MemoryWriter, "write")


def in_thread(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


# --- the handle ---


@pytest.mark.parametrize("mode", BEHIND)
def test_a_handle_tells_while_it_runs_and_when_it_is_done(store: cs.Store, mode: Any) -> None:
    """Waiting for it ends after the timeout, without an error; asking for the checkpoint, with TimeoutError."""
    run = Training()
    with before_writing() as gate:
        handle = store.save(run.state, step=7, mode=mode)
        gate.wait()
        assert not handle.done()
        assert not handle.wait(0)
        assert not handle.wait(timeout=0.01)
        with pytest.raises(TimeoutError, match="the save of step 7 is still running"):
            handle.result(0.01)
        assert repr(handle) == f"<ckptstore.SaveHandle step 7 {mode} running>"
        assert not store.checkpoints()
        gate.open()
        checkpoint = handle.result(HANG_S)
    assert handle.done()
    assert handle.wait()
    assert handle.wait(0)
    assert handle.result(0) is checkpoint
    assert (handle.step, handle.mode, checkpoint.step) == (7, mode, 7)
    assert repr(handle) == f"<ckptstore.SaveHandle step 7 {mode} done>"
    assert store.resolve() == checkpoint


def test_figures_of_an_async_save(store: cs.Store) -> None:
    """All that the pipeline hadn't read was copied in the call; afterwards the figures stand still."""
    run = Training()
    with before_reading():
        handle = store.save(run.state, step=1, mode="async")
        assert handle.copied_bytes == handle.raw_bytes > 0
        assert (handle.stall_s, handle.fence_s) == (handle.call_s, 0)
        assert handle.seconds > handle.call_s > 0
        assert handle.bytes_per_second > 0
    checkpoint = handle.result(HANG_S)
    assert handle.raw_bytes == checkpoint.raw_bytes
    assert handle.seconds == handle.seconds >= handle.stall_s
    assert handle.bytes_per_second == handle.raw_bytes / handle.seconds


def test_figures_of_an_overlapped_save(store: cs.Store) -> None:
    """The call copies only what no optimizer owns; the rest is copied at the step, and counted as its time."""
    run = Training()
    with before_reading():
        handle = store.save(run.state, step=1, mode="overlapped")
        at_call = handle.copied_bytes
        assert 0 < at_call < handle.raw_bytes
        assert handle.fence_s == 0
        run.step()
        assert at_call < handle.copied_bytes <= handle.raw_bytes
        assert handle.fence_s > 0
        assert handle.stall_s == handle.call_s + handle.fence_s
    assert handle.result(HANG_S).raw_bytes == handle.raw_bytes


def test_nothing_to_read_in_place_is_saved_async(store: cs.Store) -> None:
    """An overlapped save of a state that no optimizer owns says that it is an async one, and is."""
    weights = torch.ones(BLOCK)
    with before_writing():
        handle = store.save({"w": weights}, step=1, mode="overlapped")
        assert handle.mode == "async"
        weights.zero_()
    handle.result(HANG_S)
    assert store.load()["w"].all()


@pytest.mark.parametrize("bad", [{"mode": "later"}, {"mode": "async", "when_busy": "fail"}, {"when_busy": None}])
def test_an_unknown_mode_is_refused(store: cs.Store, bad: dict[str, Any]) -> None:
    """Nothing is saved, and the error names the choices."""
    with pytest.raises(cs.StateError, match="mode is 'sync', 'async' or 'overlapped', when_busy 'wait' or 'skip'"):
        store.save({}, step=1, **bad)
    assert not objects(store)


@pytest.mark.parametrize("mode", BEHIND)
def test_a_state_that_cannot_be_stored_is_told_in_the_call(store: cs.Store, mode: Any) -> None:
    """No handle, no error left for later, nothing written."""
    with pytest.raises(cs.StateError):
        store.save({"w": torch.ones(3), "f": object()}, step=1, mode=mode)
    assert not objects(store)
    store.close()


@pytest.mark.parametrize("mode", BEHIND)
def test_progress_is_told_from_the_background(store: cs.Store, mode: Any) -> None:
    """It never goes back, ends at all bytes, and comes from threads that aren't the caller's."""
    told: list[tuple[int, int]] = []
    threads = set()

    def progress(done: int, total: int) -> None:
        told.append((done, total))
        threads.add(threading.get_ident())

    handle = store.save(Training().state, step=1, mode=mode, progress=progress)
    handle.result(HANG_S)
    assert told == sorted(told)
    assert {total for _, total in told} == {handle.raw_bytes} == {told[-1][0]}
    assert threading.get_ident() not in threads


# --- the caller is free ---


@pytest.mark.parametrize("compression", ["none", "zstd", "float-zstd", "auto"])
@pytest.mark.parametrize("held", [before_reading, before_writing])
def test_after_an_async_call_everything_may_change(url: str, held: Callable[[], Gate], compression: str) -> None:
    """Parameters, buffers, frozen ones, optimizer, views, arrays, lists: the checkpoint holds what they were."""
    run = Training()
    expected = run.snapshot()
    with cs.open(url, compression=compression) as store:
        with held() as gate:
            handle = store.save(run.state, step=1, mode="async")
            gate.wait()
            run.change_everything()
            assert not handle.done()
        handle.result(HANG_S)
        assert holds(store, "latest", expected)
        assert run.snapshot() != expected


@pytest.mark.parametrize("held", [before_reading, before_writing])
def test_after_wait_staged_everything_may_change(store: cs.Store, held: Callable[[], Gate]) -> None:
    """The same for an overlapped save, whose checkpoint is not durable by then."""
    run = Training()
    expected = run.snapshot()
    with held() as gate:
        handle = store.save(run.state, step=1, mode="overlapped")
        gate.wait()
        handle.wait_staged()
        assert not handle.done()
        run.change_everything()
    handle.result(HANG_S)
    assert holds(store, "latest", expected)
    handle.wait_staged()


@pytest.mark.parametrize("mode", BEHIND)
@pytest.mark.parametrize("change", [False, True])
def test_what_is_borrowed_is_that_of_the_call(store: cs.Store, mode: Any, change: bool) -> None:
    """Frozen weights that are compared behind the caller's back: it may change them as soon as it was told so."""
    run = Training()
    first = store.save(run.state, step=1, mode=mode).result(HANG_S)
    if change:
        run.base.weight.data.add_(1)
    expected = run.snapshot()
    with before_reading():
        handle = store.save(run.state, step=2, mode=mode)
        handle.wait_staged()
        run.change_everything()
    second = handle.result(HANG_S)
    assert (first.borrowed_bytes, bool(second.borrowed_bytes)) == (0, not change)
    assert holds(store, "latest", expected)
    assert store.verify().ok


@pytest.mark.parametrize("mode", BEHIND)
def test_dropping_state_and_handle_changes_nothing(store: cs.Store, mode: Any) -> None:
    """A save whose caller keeps nothing of what it saved is as good as any."""
    run = Training()
    expected = run.snapshot()
    with before_reading():
        handle = store.save(run.state, step=1, mode=mode)
        del handle, run
        gc.collect()
    store.close()
    with cs.open(store.url) as again:
        assert holds(again, "latest", expected)


@pytest.mark.parametrize("mode", BEHIND)
def test_a_finished_save_lets_go_of_the_state(store: cs.Store, mode: Any) -> None:
    """A handle that is kept keeps no tensor alive."""
    run = Training()
    tensors = [weakref.ref(run.average), weakref.ref(run.model[0].weight), weakref.ref(run.base.weight)]
    handle = store.save(run.state, step=1, mode=mode)
    handle.result(HANG_S)
    handle._thread.join()
    del run
    gc.collect()
    assert [tensor() for tensor in tensors] == [None] * 3


# --- one at a time ---


@pytest.mark.parametrize("second", MODES)
@pytest.mark.parametrize("first", BEHIND)
def test_the_next_save_waits_for_the_one_that_runs(store: cs.Store, first: Any, second: Any) -> None:
    """It looks at the state only when the one before has ended."""
    run = Training()
    with before_writing() as gate:
        handle = store.save(run.state, step=1, mode=first)
        gate.wait()
        timer = threading.Timer(0.1, gate.open)
        timer.start()
        later = store.save(run.state, step=2, mode=second)
        assert handle.done()
        timer.join()
    assert [handle.result(0).step, finish(later).step] == [1, 2]


@pytest.mark.parametrize("second", MODES)
@pytest.mark.parametrize("first", BEHIND)
def test_a_save_can_be_skipped_while_another_runs(store: cs.Store, first: Any, second: Any) -> None:
    """It gives None without a look at the state; when nothing runs it is a save like any other."""
    run = Training()
    with before_writing() as gate:
        handle = store.save(run.state, step=1, mode=first)
        gate.wait()
        assert store.save({"no": object()}, step=2, mode=second, when_busy="skip") is None
    handle.result(HANG_S)
    later = store.save(run.state, step=3, mode=second, when_busy="skip")
    assert later is not None
    finish(later)
    assert [checkpoint.step for checkpoint in store.checkpoints()] == [1, 3]


def test_threads_that_save_at_once_all_get_their_checkpoint(store: cs.Store) -> None:
    """Of saves that several threads begin in the same moment one runs at a time, and close waits for all of them."""
    runs = [Training(number) for number in range(4)]
    expected = [run.snapshot() for run in runs]
    together, active, most = threading.Barrier(len(runs)), [0], [0]
    real_settle, real_save = Background.settle, Saver.save

    def settle(self: Background) -> None:
        real_settle(self)
        if threading.current_thread() is not threading.main_thread():
            together.wait(HANG_S)

    def counted(self: Saver, *args: Any) -> Any:
        active[0] += 1
        most[0] = max(most[0], active[0])
        try:
            return real_save(self, *args)
        finally:
            active[0] -= 1

    def work(number: int) -> None:
        store.save(runs[number].state, step=number, mode=["sync", "async", "overlapped", "async"][number])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Background, "settle", settle)
        patch.setattr(Saver, "save", counted)
        threads = [in_thread(lambda n=n: work(n)) for n in range(len(runs))]
        for thread in threads:
            thread.join(HANG_S)
        store.close()
    assert most[0] == 1
    with cs.open(store.url) as again:
        assert len(again.checkpoints()) == len(runs)
        assert all(holds(again, f"step:{number}", wanted) for number, wanted in enumerate(expected))
        assert again.verify().ok


def test_close_waits_for_the_saves_of_all_threads(store: cs.Store) -> None:
    """Also for one that was begun first and runs last, when another thread began one beside it."""
    together, settle = threading.Barrier(2), Background.settle

    def settled(self: Background) -> None:
        settle(self)
        if threading.current_thread() is not threading.main_thread():
            together.wait(HANG_S)
            if threading.current_thread().name == "second":
                gate.wait()

    def work(step: int) -> None:
        threading.current_thread().name = "first" if step == 1 else "second"
        store.save({"w": torch.ones(step)}, step=step, mode="async")

    first = Gate(Dispatcher, "_save", only=lambda _, job, *__: job.facts.step == 1)
    with pytest.MonkeyPatch.context() as patch, first as gate:
        patch.setattr(Background, "settle", settled)
        for thread in [in_thread(lambda n=n: work(n)) for n in (1, 2)]:
            thread.join(HANG_S)
        gate.wait()
        threading.Timer(0.3, gate.open).start()
        store.close()
    with cs.open(store.url) as again:
        assert sorted(checkpoint.step for checkpoint in again.checkpoints()) == [1, 2]


def test_a_daemon_thread_may_save(store: cs.Store) -> None:
    """The save's own thread is none, whoever called: Python would drop it at its end."""
    handles: list[cs.SaveHandle] = []
    run = Training()
    with before_writing():
        caller = threading.Thread(
            target=lambda: handles.append(store.save(run.state, step=1, mode="async")), daemon=True
        )
        caller.start()
        caller.join(HANG_S)
        savers = [thread for thread in threading.enumerate() if thread.name == "ckptstore-save"]
        assert [thread.daemon for thread in savers] == [False]
    assert handles[0].result(HANG_S).step == 1


def test_without_room_for_a_thread_the_caller_waits(store: cs.Store) -> None:
    """Where the system starts no more threads, the save is done when the call returns."""
    run = Training()
    expected = run.snapshot()
    with Fault(threading.Thread, "start", RuntimeError("can't start new thread")):
        handle = store.save(run.state, step=1, mode="async")
    assert handle.done()
    assert handle.result().step == 1
    assert holds(store, "latest", expected)


# --- errors ---


def writing_fails() -> Fault:
    return Fault(MemoryWriter, "write", FULL)


def file_cannot_be_made() -> Fault:
    return Fault(MemoryStorage, "open_writer", FULL)


def manifest_fails() -> Fault:
    return Fault(MemoryStorage, "create", FULL, only=lambda _, key, *__: "manifest" in key)


def commit_fails() -> Fault:
    return Fault(MemoryStorage, "create", FULL, only=lambda _, key, *__: key.startswith("commits/"))


def claim_fails() -> Fault:
    return Fault(MemoryStorage, "list", cs.UnavailableError("the storage is away"))


def reading_fails() -> Fault:
    return Fault(PlannedFile, "fill", MemoryError("no memory for a host copy"))


FAULTS = [writing_fails, file_cannot_be_made, manifest_fails, commit_fails, claim_fails, reading_fails]


def failed(store: cs.Store, mode: Any, step: int, fault: Callable[[], Fault]) -> cs.SaveHandle:
    """A save in the background that has failed by ``fault``."""
    with fault() as broken:
        handle = store.save(Training(step).state, step=step, mode=mode)
        handle.join()
        assert broken.fired
    return handle


@pytest.mark.parametrize("mode", BEHIND)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_failure_is_told_to_whoever_waits(store: cs.Store, mode: Any, fault: Callable[[], Fault]) -> None:
    """At every wait and result, with its cause; then the next save and close have nothing more to tell."""
    handle = failed(store, mode, 1, fault)
    assert handle.done()
    assert repr(handle).endswith("failed>")
    for ask in (handle.wait, handle.result, handle.wait):
        with pytest.raises(cs.SaveFailedError, match=r"step 1|step1") as told:
            ask()
        assert told.value.step == 1
        assert told.value.__cause__ is not None
    assert store.save(Training().state, step=2).step == 2
    store.close()


@pytest.mark.parametrize("asked", [*MODES, "skip"])
@pytest.mark.parametrize("mode", BEHIND)
def test_a_failure_nobody_asked_about_is_told_by_the_next_save(store: cs.Store, mode: Any, asked: str) -> None:
    """That one isn't begun; the one after it is, as the error is told once."""
    failed(store, mode, 1, writing_fails)
    before = objects(store)
    how: dict[str, Any] = {"mode": "async", "when_busy": "skip"} if asked == "skip" else {"mode": asked}
    with pytest.raises(cs.SaveFailedError, match="no space left"):
        store.save(Training().state, step=2, **how)
    assert objects(store) == before
    assert finish(store.save(Training().state, step=3, **how)).step == 3
    store.close()
    assert [checkpoint.step for checkpoint in cs.open(store.url).checkpoints()] == [3]


@pytest.mark.parametrize("mode", BEHIND)
def test_a_failure_nobody_asked_about_is_told_by_close(store: cs.Store, mode: Any) -> None:
    """Once; the store is closed all the same."""
    failed(store, mode, 1, commit_fails)
    with pytest.raises(cs.SaveFailedError, match="no space left"):
        store.close()
    store.close()
    with pytest.raises(cs.StorageError, match="was closed"):
        store.save({}, step=2)


@pytest.mark.parametrize("mode", BEHIND)
def test_close_waits_for_the_failure_of_a_save_that_runs(store: cs.Store, mode: Any) -> None:
    """It isn't missed because the save was still running when close was called."""
    with writing_fails(), before_reading() as gate:
        store.save(Training().state, step=1, mode=mode)
        gate.wait()
        timer = threading.Timer(0.1, gate.open)
        timer.start()
        with pytest.raises(cs.SaveFailedError, match="no space left"):
            store.close()
        timer.join()


def test_a_block_without_an_error_raises_the_saves(url: str) -> None:
    """Leaving ``with`` is closing."""
    with pytest.raises(cs.SaveFailedError, match="no space left"), cs.open(url) as store:
        failed(store, "async", 1, writing_fails)


@pytest.mark.parametrize("told", [False, True])
def test_a_block_that_ends_in_an_error_keeps_it(url: str, told: bool) -> None:
    """The failed save is noted at it, if nobody was told of it before."""

    def crash() -> None:
        with cs.open(url) as store:
            handle = failed(store, "async", 1, writing_fails)
            with suppress(cs.SaveFailedError):
                _ = told and handle.wait()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as raised:
        crash()
    notes = getattr(raised.value, "__notes__", [])
    assert ["besides, a save in the background failed" in note for note in notes] == [True] * (not told)


def test_a_block_that_ends_in_an_error_waits_for_the_save(url: str) -> None:
    """A crash of the training step costs no checkpoint that was begun before it."""
    run = Training()
    expected = run.snapshot()

    def crash(gate: Gate) -> None:
        with cs.open(url) as store:
            store.save(run.state, step=1, mode="async")
            gate.wait()
            threading.Timer(3, gate.open).start()
            raise ZeroDivisionError

    with before_writing() as gate, pytest.raises(ZeroDivisionError) as raised:
        crash(gate)
    assert not getattr(raised.value, "__notes__", [])
    assert holds(cs.open(url), "latest", expected)


@pytest.mark.parametrize("mode", BEHIND)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_failed_save_costs_nothing_older(store: cs.Store, mode: Any, fault: Callable[[], Fault]) -> None:
    """What was there is there, nothing is left of the failed one, no memory stays taken, and the next one works."""
    run = Training()
    expected = run.snapshot()
    store.save(run.state, step=1)
    before = objects(store)
    with Counted().counting(), pytest.raises(cs.SaveFailedError):
        failed(store, mode, 2, fault).wait()
    assert objects(store) == before
    assert len(store._tools.pool._free) + store._tools.pool._unallocated == store._tools.pool.buffers
    report = store.verify()
    assert report.ok
    assert not report.leftovers
    assert holds(store, "latest", expected)
    assert store.save(run.state, step=3, mode=mode).result(HANG_S).step == 3
    assert holds(store, "latest", expected)


@pytest.mark.parametrize("mode", BEHIND)
def test_a_full_disk(tmp_path: Path, mode: Any) -> None:
    """The same on a local folder, where the half-written files are removed."""
    run = Training()
    with cs.open(tmp_path / "store") as store:
        store.save(run.state, step=1)
        before = objects(store)
        with Fault(FileWriter, "write", FULL), pytest.raises(cs.SaveFailedError, match="no space left"):
            store.save(run.state, step=2, mode=mode).wait()
        assert objects(store) == before
        assert store.save(run.state, step=2, mode=mode).result(HANG_S).step == 2
        assert store.verify().ok


@pytest.mark.parametrize("mode", BEHIND)
def test_an_unknown_commit_is_told_as_such(store: cs.Store, mode: Any) -> None:
    """The id comes with it, and nothing is removed that may have been committed."""
    unknown = cs.StorageError("the answer was lost", outcome="unknown")
    with Fault(MemoryStorage, "create", unknown, only=lambda _, key, *__: key.startswith("commits/")):
        handle = store.save(Training().state, step=1, mode=mode)
        with pytest.raises(cs.CommitUnknownError) as told:
            handle.result(HANG_S)
    assert any(key.startswith(f"checkpoints/{told.value.id}/") for key in objects(store))
    store.prune(grace_s=0)
    assert not store.verify().leftovers


@pytest.mark.parametrize("mode", BEHIND)
def test_a_newer_run_is_told_of_in_the_background(store: cs.Store, mode: Any) -> None:
    """The save that finds out fails with StaleWriterError, before it writes or before it commits."""
    run = Training()
    store.save(run.state, step=1)
    with cs.open(store.url) as newer:
        newer.save(run.state, step=2)
    with pytest.raises(cs.StaleWriterError):
        store.save(run.state, step=3, mode=mode).result(HANG_S)
    with before_writing() as gate, cs.open(store.url) as mine:
        with pytest.raises(cs.StaleWriterError):
            store.save(run.state, step=4)
        gate.open()
        mine.save(run.state, step=5)
    assert [checkpoint.step for checkpoint in store.checkpoints()] == [1, 2, 5]


@pytest.mark.parametrize("mode", BEHIND)
def test_a_newer_run_that_comes_during_the_save(store: cs.Store, mode: Any) -> None:
    """Nothing is committed after another run has taken the store over, and nothing is left of it."""
    run = Training()
    store.save({"w": 1}, step=1)
    with before_writing() as gate:
        handle = store.save(run.state, step=2, mode=mode)
        gate.wait()
        with cs.open(store.url) as newer:
            newer.save({"w": 3}, step=3)
    with pytest.raises(cs.StaleWriterError):
        handle.wait()
    assert [checkpoint.step for checkpoint in store.checkpoints()] == [1, 3]
    assert not store.verify().leftovers


@pytest.mark.parametrize("mode", BEHIND)
def test_progress_that_raises_fails_the_save(store: cs.Store, mode: Any) -> None:
    """Its error is the cause."""
    told = []

    def progress(done: int, total: int) -> None:
        told.append(done)
        raise ZeroDivisionError

    with pytest.raises(cs.SaveFailedError) as raised:
        store.save(Training().state, step=1, mode=mode, progress=progress).wait()
    assert told
    assert isinstance(raised.value.__cause__, ZeroDivisionError)
    assert not store.verify().leftovers


@pytest.mark.parametrize("mode", BEHIND)
def test_a_copy_that_fails_stops_no_training(store: cs.Store, mode: Any) -> None:
    """Neither the call nor the step raises what went wrong in copying; the handle does, once it is asked."""
    run = Training()
    with before_reading() as gate, reading_fails() as fault:
        handle = store.save(run.state, step=1, mode=mode)
        run.step()
        assert fault.fired
        gate.open()
        with pytest.raises(cs.SaveFailedError) as raised:
            handle.wait()
    assert isinstance(raised.value.__cause__, MemoryError)
    assert finish(store.save(run.state, step=2, mode=mode)).step == 2


@pytest.mark.filterwarnings("ignore::ckptstore.TornReadWarning")
@pytest.mark.parametrize("mode", BEHIND)
def test_an_interrupted_call_commits_no_mixture(store: cs.Store, mode: Any) -> None:
    """Ctrl-C in the midst of the call, after which the state changes: not saved, or saved as it was at the call."""
    run = Training()
    expected = run.snapshot()
    with before_reading() as gate, Interrupt(PlannedFile, "fill", raises=KeyboardInterrupt) as interrupt:
        with pytest.raises(KeyboardInterrupt):
            store.save(run.state, step=1, mode=mode)
        run.change_everything()
        gate.open()
        with suppress(cs.SaveFailedError):
            store.close()
    assert interrupt.fired
    with cs.open(store.url) as again:
        assert all(holds(again, checkpoint.id, expected) for checkpoint in again.checkpoints())
        again.save({}, step=2)
        assert again.verify().ok


# --- memory ---


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("compression", ["none", "zstd", "float-zstd"])
@pytest.mark.parametrize("options", [{}, {"threads": 1, "pool_bytes": 1}], ids=["plenty", "scarce"])
@pytest.mark.parametrize("mode", BEHIND)
def test_max_staging_bounds_the_copies(
    url: str, mode: Any, compression: str, options: dict[str, Any], blocks: int
) -> None:
    """So many blocks are in use at the most, whatever the state takes; the call or the step waits, and none hangs."""
    run, count = Training(), Counted()
    with cs.open(url, compression=compression, max_staging=blocks * BLOCK, **options) as store, count.counting():
        for step in range(2):
            expected = run.snapshot()
            with before_reading() as gate:
                # Nothing is read in place before there was no room for one more copy.
                count.when_full = gate.open
                handle = store.save(run.state, step=step, mode=mode)
                run.step()
                handle.wait_staged()
                run.change_everything()
            handle.result(HANG_S)
            assert holds(store, "latest", expected)
        assert handle.raw_bytes > 4 * blocks * BLOCK
    assert count.most == blocks
    assert len(count.seen) == blocks or mode == "overlapped"


def test_max_staging_in_whole_blocks_of_16_mib(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Less than a block means one; text is understood."""
    monkeypatch.setattr(buffers, "BLOCK_BYTES", 16 << 20)
    for size, blocks in (("1MB", 1), ("16MiB", 1), (33 << 20, 2)):
        area = cs.open(url, max_staging=size)._tools.area
        assert len([buffer for _ in range(4) if (buffer := area.try_take()) is not None]) == blocks


@pytest.mark.filterwarnings("ignore::ckptstore.TornReadWarning")
@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("by", ["hand", "step", "both"])
def test_a_save_begun_again_keeps_within_max_staging(url: str, blocks: int, by: str) -> None:
    """A write by hand begins it again, also where there is hardly room for copies at the next step."""
    run = Training()
    state = {"model": run.model, "optimizer": run.optimizer}
    with cs.open(url, max_staging=blocks * BLOCK) as store, before_writing() as gate:
        moments = [run.snapshot()["model"]]
        handle = store.save(state, step=1, mode="overlapped")
        gate.wait()
        if by != "step":
            with torch.no_grad():
                run.model[0].weight.add_(1)
            moments.append(run.snapshot()["model"])
        threading.Timer(0.1, gate.open).start()
        if by != "hand":
            run.step()
        handle.result(HANG_S)
        assert frozen(store.load()["model"]) == moments[-1]


def test_memory_of_copies_is_used_again(store: cs.Store) -> None:
    """From one save to the next, as much as the last one needed; close gives all of it back."""
    run, count = Training(), Counted()
    area = store._tools.area
    with count.counting():
        for step in range(3):
            with before_reading():
                handle = store.save(run.state, step=step, mode="async")
            handle.result(HANG_S)
            if step == 0:
                first, taken = set(count.seen), count.taken
                assert len(first) == taken == len(area._free) > 1
        assert count.seen == first
        assert count.taken == 3 * taken
        with before_reading():
            handle = store.save(run.state, step=4, mode="overlapped")
            run.step()
        handle.result(HANG_S)
        needed = len(area._free)
        # This one is durable before the next step comes: only what nobody owns is copied.
        store.save(run.state, step=5, mode="overlapped").result(HANG_S)
        assert 0 < len(area._free) < needed <= taken
        store.save(run.state, step=6, mode="async")
        store.close()
    assert not area._free


@pytest.mark.parametrize("room", [0, 1, 3])
@pytest.mark.parametrize("mode", BEHIND)
def test_without_memory_for_copies_the_caller_waits(store: cs.Store, mode: Any, room: int) -> None:
    """With memory for ``room`` blocks only, the call or the step waits until the rest was read; nothing fails."""
    run = Training()
    expected = run.snapshot()
    with store._tools.pool.lease(store._tools.pool.buffers):
        pass
    left = [room]

    def none_left() -> bool:
        left[0] -= 1
        return left[0] < 0

    no_memory = Fault(buffers, "_allocated", cs.StorageError("no memory"), only=none_left)
    with no_memory, Counted().counting(), before_writing() as gate:
        threading.Timer(0.1, gate.open).start()
        handle = store.save(run.state, step=1, mode=mode)
        handle.wait_staged()
        run.change_everything()
        handle.result(HANG_S)
    assert holds(store, "latest", expected)


@pytest.mark.parametrize("step", ["wait", "next save", "close", "nothing"])
@pytest.mark.parametrize("threads", [1, 3])
def test_the_smallest_pool_is_shared_by_saving_and_loading(url: str, threads: int, step: str) -> None:
    """Loads while a save holds buffers of a pool of two."""
    run = Training()
    expected = run.snapshot()
    with cs.open(url, threads=threads, pool_bytes=1) as store:
        store.save(run.state, step=1)
        for number in range(2, 6):
            handle = store.save(run.state, step=number, mode="async")
            assert holds(store, "step:1", expected)
            if step == "wait":
                handle.result(HANG_S)
        if step == "close":
            store.close()
    with cs.open(url) as again:
        assert holds(again, "latest", expected)
        assert again.resolve().step == 5


# --- meanwhile ---


@pytest.mark.parametrize("mode", BEHIND)
def test_everything_but_saving_goes_on_meanwhile(store: cs.Store, mode: Any) -> None:
    """Looking, loading, verifying, deleting, holding: none waits for the save, and none disturbs it."""
    run = Training()
    old = run.snapshot()
    for step in (1, 2, 3):
        store.save(run.state, step=step)
    run.change_everything()
    expected = run.snapshot()
    with before_writing() as gate:
        handle = store.save(run.state, step=4, mode=mode)
        gate.wait()
        assert [checkpoint.step for checkpoint in store.checkpoints()] == [1, 2, 3]
        assert holds(store, "latest", old)
        assert store.verify().ok
        assert store.contents(store.resolve()).parts
        store.hold("step:2", "best-so-far")
        gone = store.delete("step:1")
        assert store.undelete(gone.id).id == gone.id
        store.delete("step:1")
        assert not handle.done()
    handle.result(HANG_S)
    assert [checkpoint.step for checkpoint in store.checkpoints()] == [2, 3, 4]
    assert holds(store, "latest", expected)
    assert store.verify().ok


@pytest.mark.parametrize("mode", BEHIND)
def test_pruning_meanwhile_takes_nothing_of_the_save(store: cs.Store, mode: Any) -> None:
    """The store's own prune waits for its save; that of another process spares what is younger than the grace."""
    run = Training()
    expected = run.snapshot()
    store.save({"w": 1}, step=1)
    with before_writing() as gate:
        handle = store.save(run.state, step=2, mode=mode)
        gate.wait()
        with cs.open(store.url) as other:
            assert len(other.prune().spared) == 1
        threading.Timer(0.1, gate.open).start()
        report = store.prune(grace_s=0)
        assert not report.leftovers
        assert not report.spared
    handle.result(HANG_S)
    assert holds(store, "latest", expected)


@pytest.mark.parametrize("mode", BEHIND)
def test_a_save_that_somebody_takes_for_dead_fails(store: cs.Store, mode: Any) -> None:
    """Pruned with no grace by another process: it is not acknowledged, and the next one works."""
    run = Training()
    expected = run.snapshot()
    store.save({"w": 1}, step=1)
    with before_writing() as gate:
        handle = store.save(run.state, step=2, mode=mode)
        gate.wait()
        with cs.open(store.url) as other:
            assert other.prune(grace_s=0).leftovers
    with pytest.raises(cs.SaveFailedError):
        handle.result(HANG_S)
    assert [checkpoint.step for checkpoint in store.checkpoints()] == [1]
    store.save(run.state, step=3, mode=mode).result(HANG_S)
    store.prune(grace_s=0)
    assert holds(store, "latest", expected)
    assert store.verify().ok


@pytest.mark.parametrize("mode", BEHIND)
def test_the_lender_is_deleted_meanwhile(store: cs.Store, mode: Any) -> None:
    """What the save borrowed is written after all."""
    run = Training()
    expected = run.snapshot()
    store.save(run.state, step=1)
    with Gate(committer, "commit") as gate:
        handle = store.save(run.state, step=2, mode=mode)
        gate.wait()
        store.delete("step:1")
    assert handle.result(HANG_S).borrowed_bytes == 0 or store.verify().ok
    store.prune(grace_s=0)
    assert [checkpoint.step for checkpoint in store.checkpoints()] == [2]
    assert holds(store, "latest", expected)
    assert store.verify().ok


@pytest.mark.parametrize("mode", BEHIND)
def test_loading_into_the_state_that_is_saved(store: cs.Store, mode: Any) -> None:
    """Going back to an older checkpoint while the newer is saved: both hold what they should."""
    run = Training()
    old = run.snapshot()
    store.save(run.state, step=1)
    run.change_everything()
    run.history[:] = [0, {"loss": 1.5}]
    expected = run.snapshot()
    with before_reading() as gate:
        handle = store.save(run.state, step=2, mode=mode)
        gate.wait()
        store.load("step:1", into={"model": run.model, "optimizer": run.optimizer}, only=["model/*", "optimizer/*"])
        assert run.snapshot()["model"] == old["model"]
    handle.result(HANG_S)
    assert holds(store, "step:1", old)
    assert holds(store, "latest", expected)


def test_compression_in_the_background_says_so(url: str) -> None:
    """The codec is the store's, and it pays."""
    for codec in ("zstd", "float-zstd"):
        with cs.open(f"{url}{codec}", compression=codec) as store:
            checkpoint = store.save({"w": torch.zeros(1 << 16)}, step=1, mode="async").result(HANG_S)
            assert checkpoint.stored_bytes < checkpoint.raw_bytes / 10
            assert store.verify().ok


# --- signals ---


class Interrupt:
    """A real signal to this process at a call of ``owner.name``, which goes on when the handler has begun.

    The handler, which Python runs in its main thread, does ``act`` or raises ``raises``. Once.
    """

    def __init__(
        self,
        owner: Any,
        name: str,
        *,
        act: Callable[[], object] = lambda: None,
        raises: type[BaseException] | None = None,
    ) -> None:
        self.fired = False
        self._act, self._raises = act, raises
        self._begun = threading.Event()
        real = getattr(owner, name)

        def call(*args: Any, **options: Any) -> Any:
            self._strike()
            return real(*args, **options)

        self._patches = ExitStack()
        patch = self._patches.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(owner, name, call)

    def __enter__(self) -> Interrupt:
        before = signal.signal(signal.SIGUSR1, self._handle)
        self._patches.callback(signal.signal, signal.SIGUSR1, before)
        return self

    def __exit__(self, *_: object) -> None:
        self._patches.close()

    def _strike(self) -> None:
        if self.fired:
            return
        self.fired = True
        os.kill(os.getpid(), signal.SIGUSR1)
        if threading.current_thread() is not threading.main_thread():
            # Again: one that comes just before the main thread begins to wait for a lock is seen after that only.
            while not self._begun.wait(0.05):
                os.kill(os.getpid(), signal.SIGUSR1)

    def _handle(self, *_: object) -> None:
        if self._begun.is_set():
            return
        self._begun.set()
        if self._raises is not None:
            raise self._raises
        self._act()


IN_THE_CALLER = {
    "planning": (Tools, "plan"),
    "starting a thread": (threading.Thread, "start"),
    "copying": (PlannedFile, "fill"),
    "taking a buffer": (buffers.StagingArea, "try_take"),
    "the lock held": (Stage, "_drop_taken"),
    "looking for changes": (Stage, "_find_moved"),
}
IN_THE_PIPELINE = {
    "planning": (Tools, "plan"),
    "reading": (PlannedFile, "fill"),
    "claiming": (Claim, "next_id"),
    "writing": (MemoryWriter, "write"),
    "looking for changes": (Stage, "_find_moved"),
    "committing": (committer, "commit"),
}
OPTIONS = {"plenty": {}, "scarce": {"max_staging": 1, "threads": 1}}


def strike(store: cs.Store, place: Any, outer: Any, inner: Any, gate: Gate | None) -> None:
    """A save, a step and a wait, with a handler that saves in one of them; all checkpoints are as they should be."""
    run, other = Training(1), Training(2)
    expected, others = run.snapshot(), other.snapshot()
    inside: list[Any] = []

    def act() -> None:
        if gate is not None:
            gate.open()
        inside.append(store.save(other.state, step=2, mode=inner))

    with Interrupt(*place, act=act) as struck:
        saved = store.save(run.state, step=1, mode=outer)
        run.step()
        finish(saved)
    assert struck.fired
    finish(inside[0])
    assert holds(store, "step:1", expected)
    assert holds(store, "step:2", others)
    assert store.verify().ok


def sampled_modes(full: bool, place: str, outers: list[str]) -> list[tuple[str, str]]:
    """Pairs of modes: all, or two that differ from place to place."""
    pairs = [(outer, inner) for outer in outers for inner in MODES]
    return pairs if full else random.Random(place).sample(pairs, 2)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("place", IN_THE_CALLER)
def test_a_signal_handler_saves_while_its_thread_copies(
    url: str, place: str, options: str, full: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the call and at the fence, wherever that is: nothing waits for itself, and every checkpoint is good."""
    if options == "scarce":
        monkeypatch.setattr("ckptstore.engine.background.cores", lambda: 1)
    for number, (outer, inner) in enumerate(sampled_modes(full, place + options, BEHIND)):
        # Held, so that there is something to copy.
        with cs.open(f"{url}-{number}", **OPTIONS[options]) as store, before_reading() as gate:
            threading.Timer(3, gate.open).start()
            strike(store, IN_THE_CALLER[place], outer, inner, gate)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("place", IN_THE_PIPELINE)
def test_a_signal_handler_saves_while_the_pipeline_runs(url: str, place: str, options: str, full: bool) -> None:
    """In the caller's own thread or behind it."""
    for number, (outer, inner) in enumerate(sampled_modes(full, place + options, MODES)):
        with cs.open(f"{url}-{number}", **OPTIONS[options]) as store:
            strike(store, IN_THE_PIPELINE[place], outer, inner, None)


@pytest.mark.parametrize("ask", ["wait", "result", "wait_staged", "next save", "close"])
@pytest.mark.parametrize("inner", MODES)
def test_a_signal_handler_waits_in_the_midst_of_waiting(store: cs.Store, ask: str, inner: Any) -> None:
    """Whatever a thread waits for, its signal handler may save, and wait for both."""
    run, other = Training(1), Training(2)
    expected, others = run.snapshot(), other.snapshot()

    def act() -> None:
        handle.wait(HANG_S)
        finish(store.save(other.state, step=2, mode=inner))

    with before_writing() as gate, Interrupt(gate, "wait", act=act) as struck:
        handle = store.save(run.state, step=1, mode="overlapped")
        gate.reached.wait(HANG_S)
        pressing = in_thread(lambda: (gate.wait(), gate.open()))
        if ask == "next save":
            store.save({"w": 1}, step=3)
        elif ask == "close":
            handle.wait(HANG_S)
        else:
            getattr(handle, ask)()
        pressing.join(HANG_S)
        handle.wait(HANG_S)
    assert struck.fired
    store.close()
    with cs.open(store.url) as again:
        assert holds(again, "step:1", expected)
        assert holds(again, "step:2", others)


def bombarded(url: str, inner: Any) -> int:
    """Saves and steps while a timer's signals come, whose handler saves: how many of those there were."""
    run, busy, count = Training(), [False], [1000]
    wanted: dict[int, dict[str, Any]] = {}

    def handler(*_: object) -> None:
        if not busy[0]:
            busy[0] = True
            count[0] += 1
            store.save({"w": torch.arange(BLOCK)}, step=count[0], mode=inner)
            busy[0] = False

    before = signal.signal(signal.SIGALRM, handler)
    # One thread: where its main thread joins others, Python itself can't always begin a thread in a handler.
    with cs.open(url, max_staging=3 * BLOCK, threads=1) as store:
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.003, 0.007)
            for step in range(30):
                wanted[step] = run.snapshot()
                store.save(run.state, step=step, mode=MODES[step % 3])
                run.step()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
    with cs.open(url) as again:
        assert {checkpoint.step for checkpoint in again.checkpoints()} == {*wanted, *range(1001, count[0] + 1)}
        assert all(holds(again, f"step:{step}", state) for step, state in wanted.items())
        assert again.verify().ok
    return count[0] - 1000


@pytest.mark.parametrize("inner", MODES)
def test_signals_at_any_time(url: str, inner: Any, full: bool) -> None:
    """A timer's signals hit saves wherever they are; what their handler saved is there, and so is all the rest."""
    assert all(bombarded(f"{url}-{number}", inner) for number in range(8 if full else 1))
