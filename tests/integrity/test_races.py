"""Several processes and threads on one store: nothing acknowledged is lost, nothing is ever seen half."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from ckptstore.engine.commit import claim_writer, condemn
from ckptstore.errors import (
    CheckpointError,
    ExistsError,
    NotFoundError,
    SaveFailedError,
    StaleWriterError,
    StorageError,
)
from ckptstore.format.layout import parse_id
from ckptstore.store import Store
from tests.forked import CONTEXT, preload
from tests.integrity import processes
from tests.integrity.stores import GOOD, NEW, MemoryRaw, flat, opened, read, save, state

preload("tests.integrity.processes")


@pytest.fixture
def raw() -> MemoryRaw:
    return MemoryRaw(uuid4().hex)


def run(*works: tuple[Callable[..., None], tuple[Any, ...], dict[str, Any]]) -> list[Any]:
    """Each work in a process of its own, all at the same time; what they gave."""
    queues = [CONTEXT.Queue() for _ in works]
    started = [
        CONTEXT.Process(target=work, args=(args[0], queue, *args[1:]), kwargs=options)
        for (work, args, options), queue in zip(works, queues, strict=True)
    ]
    for process in started:
        process.start()
    results = [queue.get(timeout=120) for queue in queues]
    for process in started:
        process.join(60)
    failures = [text for outcome, text in results if outcome == "failed"]
    assert not failures, failures[0]
    return [result for _, result in results]


def test_two_exclusive_writers(store_path: Path, full: bool) -> None:
    """The newer takes over, the older is told at its next save, and every save acknowledged to either is there."""
    count = 60 if full else 15
    url = str(store_path)
    (one, one_stopped), (two, two_stopped) = run(
        (processes.write, (url, 0, count), {"shared": False}),
        (processes.write, (url, 100, count), {"shared": False}),
    )
    with opened(url) as store:
        found = {c.id: processes.number_of(read(store, c)) for c in store.checkpoints()}
        assert store.verify().ok
    assert found == one | two
    assert not (one_stopped and two_stopped)
    writers = [{parse_id(id).writer for id in ids} for ids in (one, two)]
    assert all(len(numbers) <= 1 for numbers in writers)


def test_several_shared_writers(store_path: Path, full: bool) -> None:
    """All save side by side, and all that was acknowledged is there."""
    count = 30 if full else 8
    url = str(store_path)
    results = run(*((processes.write, (url, 50 * n, count), {"shared": True}) for n in range(3)))
    with opened(url) as store:
        found = {c.id: processes.number_of(read(store, c)) for c in store.checkpoints()}
        assert store.verify().ok
    expected: dict[str, int] = {}
    for acknowledged, stopped in results:
        assert not stopped
        assert len(acknowledged) == count
        expected |= acknowledged
    assert found == expected
    assert {parse_id(id).writer for id in found} <= {1, 2, 3}


def test_readers_while_a_writer_saves_deletes_and_prunes(store_path: Path, full: bool) -> None:
    """No load fails, none gives a mixture, and ``latest`` never goes back."""
    count = 250 if full else 60
    url = str(store_path)
    with opened(url) as store:
        save(store, state(processes.tensors_of(0)), 0)
    # The readers have imported all they need when the writer begins.
    ready = {"ready": CONTEXT.Barrier(3)}
    written, *readers = run(
        (processes.churn, (url, count), ready),
        (processes.follow, (url, count), ready),
        (processes.follow, (url, count), ready),
    )
    assert written == count
    for loads, different in readers:
        assert loads >= different > 1


def test_fork(store_path: Path) -> None:
    """A child made by fork can read with the parent's store, and is told why it can't save."""
    with opened(str(store_path)) as store:
        save(store, state(processes.tensors_of(7)), 7)
        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        child = context.Process(target=processes.forked, args=(str(store_path), queue, store))
        child.start()
        outcome, result = queue.get(timeout=60)
        child.join(60)
        assert outcome == "ok", result
        number, message = result
        assert number == 7
        assert "fork" in message
        save(store, state(processes.tensors_of(8)), 8)
        assert [c.step for c in store.checkpoints()] == [7, 8]


# -- in one process, at chosen moments --------------------------------------------------------------------


def test_an_older_writer_stops_at_its_next_save(raw: MemoryRaw) -> None:
    old, new = opened(raw.url), opened(raw.url)
    save(old, state(GOOD), 1)
    latest = save(new, state(NEW), 2)
    with pytest.raises(StaleWriterError, match="writer 2"):
        save(old, state(GOOD), 3)
    assert [c.step for c in old.checkpoints()] == [1, 2]
    assert old.resolve("latest").id == latest.id
    assert new.verify().leftovers == []


def test_a_writer_fenced_off_in_the_middle_of_a_save(raw: MemoryRaw) -> None:
    """It never commits, and leaves nothing."""
    store, fired = opened(raw.url), []

    def fence() -> None:
        if not fired:
            fired.append(claim_writer(store._storage, "0" * 32, above=0))

    save(store, state(GOOD), 1)
    with pytest.raises(StaleWriterError):
        save(store, state(NEW, on_read=fence), 2)
    assert fired == [2]
    assert [c.step for c in store.checkpoints()] == [1]
    assert opened(raw.url).verify().leftovers == []


@pytest.mark.parametrize("collect", ["condemned", "condemned and removed", "pruned"])
def test_a_save_taken_for_dead(raw: MemoryRaw, collect: str) -> None:
    """A save condemned in its middle by a prune that took it for a leftover is not acknowledged."""
    writing, other, fired = opened(raw.url), opened(raw.url), []
    save(writing, state(GOOD), 1)

    def prune() -> None:
        folders = {key.split("/")[1] for key in raw.listing() if key.startswith("checkpoints/")}
        [unfinished] = folders - {c.id for c in other.checkpoints()} or {""}
        if fired or not unfinished:
            return
        fired.append(unfinished)
        if collect == "pruned":
            assert other.prune(grace_s=0).leftovers == [unfinished]
            return
        assert condemn(other._storage, parse_id(unfinished), writing.resolve("latest").record.store_id, "test")
        if collect == "condemned and removed":
            other._storage.delete([key for key in raw.listing() if key.startswith(f"checkpoints/{unfinished}/")])

    # The second file is taken when the first one is begun.
    with pytest.raises(SaveFailedError):
        save(writing, state({**NEW, "zz/last": b"z" * 10}, on_read=prune), 2)
    assert fired
    fresh = opened(raw.url)
    assert [c.step for c in fresh.checkpoints()] == [1]
    fresh.prune(grace_s=0)
    assert fresh.verify().leftovers == []
    assert save(writing, state(NEW), 3).step == 3
    assert read(fresh, fresh.resolve("latest")) == dict(NEW)


def between(store: Store, key_prefix: str, action: Callable[[], object], *, after: bool) -> list[str]:
    """Do ``action`` before or after the first object under ``key_prefix`` is created by ``store``."""
    create, fired = store._storage.create, []

    def creating(key: str, data: bytes) -> None:
        hit = key.startswith(key_prefix) and not fired
        if hit and not after:
            fired.append(key)
            action()
        create(key, data)
        if hit and after:
            fired.append(key)
            action()

    store._storage.create = creating  # type: ignore[method-assign]
    return fired


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("first", ["delete", "hold"])
def test_delete_against_hold(raw: MemoryRaw, first: str, after: bool) -> None:
    """Whichever comes between: the checkpoint is never held and deleted at the same time."""
    one, two = opened(raw.url), opened(raw.url)
    id = save(one, state(GOOD), 1).id
    outcomes: dict[str, str] = {}

    def attempt(name: str, store: Store) -> None:
        try:
            store.delete(id) if name == "delete" else store.hold(id, "paper")
            outcomes[name] = "done"
        except CheckpointError as error:
            outcomes[name] = type(error).__name__

    second = "hold" if first == "delete" else "delete"
    fired = between(one, "trash/" if first == "delete" else "holds/", lambda: attempt(second, two), after=after)
    attempt(first, one)
    assert fired
    fresh = opened(raw.url)
    held, buried = bool(fresh.holds()), bool(fresh.deleted())
    assert not (held and buried), outcomes
    assert held == (outcomes["hold"] == "done")
    assert buried == (outcomes["delete"] == "done")


def test_delete_against_hold_in_threads(raw: MemoryRaw, full: bool) -> None:
    """Any interleaving: what was acknowledged holds, and never both."""
    store = opened(raw.url)
    for step in range(400 if full else 60):
        id = save(store, state({}), step).id
        done: list[str] = []

        def attempt(action: Callable[[], object], name: str, done: list[str] = done) -> None:
            try:
                action()
                done.append(name)
            except (ExistsError, NotFoundError):
                pass

        threads = [
            threading.Thread(target=attempt, args=(lambda id=id: opened(raw.url).delete(id), "delete")),
            threading.Thread(target=attempt, args=(lambda id=id, n=step: opened(raw.url).hold(id, f"h{n}"), "hold")),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        held, buried = id in store.holds().values(), id in {c.id for c in store.deleted()}
        assert held == ("hold" in done)
        assert buried == ("delete" in done)
        assert not (held and buried)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("where", ["first block", "later block", "part", "manifest", "before commit", "after commit"])
def test_interrupted_saves(raw: MemoryRaw, where: str, threads: int) -> None:
    """Ctrl-C anywhere: the interrupt comes out, older checkpoints are there, and the same store saves again."""
    store, calls = opened(raw.url, threads=threads), []
    save(store, state(GOOD), 1)

    def interrupt() -> None:
        raise KeyboardInterrupt

    def on_read() -> None:
        calls.append(1)
        if len(calls) == {"first block": 1, "later block": 3}.get(where, 0):
            interrupt()

    create = store._storage.create
    folder = "checkpoints/0001-000002"
    names = {"part": "part-00000.json", "manifest": "manifest.json"}
    if where in names:

        def creating(key: str, data: bytes) -> None:
            if key.startswith(folder) and key.endswith(names[where]):
                store._storage.create = create  # type: ignore[method-assign]
                interrupt()
            create(key, data)

        store._storage.create = creating  # type: ignore[method-assign]
    elif "commit" in where:
        between(store, "commits/", interrupt, after=where == "after commit")
    with pytest.raises(KeyboardInterrupt) as caught:
        save(store, state(NEW, on_read=on_read), 2)
    assert caught.value.__cause__ is not caught.value
    store._storage.create = create  # type: ignore[method-assign]
    committed = where == "after commit"
    assert [c.step for c in store.checkpoints()] == ([1, 2] if committed else [1])
    again = save(store, state(NEW), 3)
    assert read(store, store.resolve("latest")) == dict(NEW)
    assert store.resolve("latest").id == again.id
    store.prune(grace_s=0)
    report = opened(raw.url).verify()
    assert report.ok
    assert report.leftovers == []


def test_an_error_of_the_state_leaves_nothing(raw: MemoryRaw) -> None:
    """What a live object raises while its bytes are taken is the cause of the failed save."""
    store = opened(raw.url)

    def broken() -> None:
        raise RuntimeError("CUDA error")

    with pytest.raises(SaveFailedError, match="CUDA error") as caught:
        save(store, state(NEW, on_read=broken), 1)
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert store.verify().leftovers == []
    assert save(store, state(NEW), 2).step == 2


def test_closing(store_path: Path) -> None:
    """Twice is once; afterwards every call says that the store was closed."""
    store = opened(str(store_path))
    save(store, state(GOOD), 1)
    store.close()
    store.close()
    for action in (store.checkpoints, lambda: store.load("latest"), lambda: save(store, state(GOOD), 2), store.verify):
        with pytest.raises(StorageError, match="closed"):
            action()
    with opened(str(store_path)) as again:
        assert [c.step for c in again.checkpoints()] == [1]


def test_pruning_against_bringing_back(raw: MemoryRaw) -> None:
    """An undelete that was acknowledged is not undone by a prune that listed the trash before."""
    store, other = opened(raw.url), opened(raw.url)
    id = save(store, state(GOOD), 1).id
    save(store, state(NEW), 2)
    store.delete(id)
    listing, fired = store._storage.list, []

    def listed(prefix: str) -> list[Any]:
        found = listing(prefix)
        if prefix == "" and not fired:
            fired.append(other.undelete(id).id)
        return found

    store._storage.list = listed  # type: ignore[method-assign]
    report = store.prune(grace_s=0)
    assert fired == [id]
    assert report.reclaimed == []
    assert read(other, other.resolve(id)) == dict(GOOD)


@pytest.mark.parametrize("listing", ["commits/", "trash/"])
def test_a_save_and_a_deletion_between_two_listings(raw: MemoryRaw, listing: str) -> None:
    """A reader never takes an older checkpoint for the newest, or the store for empty, by listing in between."""
    writer, reader, fired = opened(raw.url), opened(raw.url), []
    old = save(writer, state(GOOD), 1)
    before = save(writer, state(GOOD), 2)
    list_ = reader._storage.list

    def listed(prefix: str) -> list[Any]:
        found = list_(prefix)
        if prefix == listing and not fired:
            fired.append(save(writer, state(NEW), 3).id)
            writer.delete(before.id)
            writer.delete(old.id)
            writer.prune(grace_s=0)
        return found

    reader._storage.list = listed  # type: ignore[method-assign]
    found = flat(reader.load("latest"))
    assert fired
    assert found == dict(NEW)


@pytest.mark.parametrize("by", ["removing", "cutting"])
def test_files_lost_during_a_save(raw: MemoryRaw, by: str) -> None:
    """Somebody cleans up by hand, without asking the register: the save is not acknowledged."""
    store, fired = opened(raw.url), []
    save(store, state(GOOD), 1)
    create = store._storage.create

    def creating(key: str, data: bytes) -> None:
        create(key, data)
        if key.endswith("manifest.json"):
            lost = key.replace("manifest.json", "model.safetensors")
            fired.append(lost)
            raw.remove(lost) if by == "removing" else raw.put(lost, b"")

    store._storage.create = creating  # type: ignore[method-assign]
    with pytest.raises(SaveFailedError, match=r"model\.safetensors"):
        save(store, state(NEW), 2)
    assert fired
    assert [c.step for c in store.checkpoints()] == [1]
    assert store.verify().leftovers == []
