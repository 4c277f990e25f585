"""Real saves that borrow a frozen model, while others delete and prune."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from ckptstore.engine import saver
from ckptstore.engine.catalogue import Checkpoint
from ckptstore.errors import CommitUnknownError, NotFoundError, SaveFailedError, StorageError
from tests.forked import CONTEXT
from tests.integrity.borrowing import interrupted
from tests.integrity.crash import Crash
from tests.integrity.processes import reap, tune, tuned, tuned_tensors
from tests.integrity.stores import FolderRaw, MemoryRaw, Raw, opened, read, save
from tests.integrity.test_races import run

GRACE_S = 3600.0
"""Tombstones are made older here, unfinished saves are younger."""


def base_files(raw: Raw) -> list[str]:
    return [key for key in raw.listing() if key.startswith("checkpoints/") and raw.get(key).count(b"frozen" * 5000)]


@pytest.mark.parametrize("kind", ["memory", "folder"])
@pytest.mark.parametrize("seed", range(2))
def test_a_long_run(kind: str, seed: int, store_path: Path, full: bool) -> None:
    """Thirty generations with restarts, deletions and prunes: all that is live is whole, the base is stored once."""
    raw = MemoryRaw(uuid4().hex) if kind == "memory" else FolderRaw(store_path)
    choose, live = random.Random(seed), dict[str, Checkpoint]()
    store, borrowed = opened(raw.url), 0
    for step in range(1, 300 if full else 31):
        saved = save(store, tuned(step), step)
        live[saved.id] = saved
        borrowed += bool(saved.record.lenders)
        for id in choose.sample(sorted(live)[:-1], choose.randint(0, min(2, len(live) - 1))):
            store.delete(id)
            del live[id]
        if choose.random() < 0.4:
            opened(raw.url).prune(grace_s=0) if choose.random() < 0.5 else store.prune(grace_s=0)
        if choose.random() < 0.2:
            store = opened(raw.url)
        assert [c.id for c in store.checkpoints()] == sorted(live)
        for checkpoint in live.values():
            assert read(store, checkpoint) == tuned_tensors(checkpoint.step)
    store.prune(grace_s=0)
    report = store.verify()
    assert report.ok
    assert report.leftovers == report.foreign == []
    assert borrowed > 20
    owners = {file.entry.owner for c in live.values() for file in store.contents(c).files if "base" in file.name(0)}
    assert len(base_files(raw)) == len(owners)
    for id in live:
        store.delete(id)
    store.prune(grace_s=0)
    assert not [key for key in raw.listing() if key.startswith("checkpoints/")]


class Scene:
    """A chain of saves by one store, and another store that deletes all of it and reclaims it at once."""

    def __init__(self, chain: int) -> None:
        self.raw = MemoryRaw(uuid4().hex)
        self.store, self.storage = interrupted(self.raw.url, {})
        self.chain = [save(self.store, tuned(step), step) for step in range(1, chain + 1)]
        self.fired = 0

    def delete(self, count: int) -> None:
        """The first ``count``, oldest first."""
        with opened(self.raw.url) as other:
            for checkpoint in self.chain[:count]:
                other.delete(checkpoint.id)
                key = f"trash/{checkpoint.id}.json"
                self.raw.objects[key] = self.raw.objects[key]._replace(modified=0.0)
            other.prune(grace_s=GRACE_S)
        self.fired += 1

    def undelete(self) -> None:
        with opened(self.raw.url) as other, suppress(NotFoundError):
            other.undelete(self.chain[-1].id)

    def save(self, step: int) -> Checkpoint | None:
        """The next save; None where it says that it failed."""
        try:
            return save(self.store, tuned(step), step)
        except SaveFailedError:
            return None

    def whole(self) -> list[int]:
        """The steps that are there, each of them whole."""
        with opened(self.raw.url) as store:
            for checkpoint in store.checkpoints():
                assert read(store, checkpoint) == tuned_tensors(checkpoint.step)
            return [checkpoint.step for checkpoint in store.checkpoints()]


@pytest.mark.parametrize("chain", [1, 3])
def test_all_before_is_deleted_during_a_save(chain: int) -> None:
    """Before any one call of the save: it is acknowledged and whole, or has failed; and the next one succeeds."""
    outcomes: Counter[str] = Counter()
    at, fired = 0, True
    while fired:
        at += 1
        scene = Scene(chain)
        scene.storage.actions = {scene.storage.calls + at: lambda scene=scene: scene.delete(chain)}
        saved = scene.save(10)
        fired = bool(scene.fired)
        if not fired:
            scene.delete(chain)
        assert scene.whole() == [10] * (saved is not None)
        scene.storage.actions = {}
        assert scene.save(11) is not None, f"at call {at}"
        with opened(scene.raw.url) as store:
            store.prune(grace_s=0)
        assert scene.whole() == [10] * (saved is not None) + [11]
        outcomes["failed" if saved is None else "borrowed" if saved.record.lenders else "in full"] += 1
    assert set(outcomes) >= {"borrowed", "in full"}, outcomes


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("how", ["removed", "cut"])
def test_a_lender_that_has_lost_its_file(how: str, restart: bool) -> None:
    """Nobody borrows what isn't there: the next save writes it, and goes on from there."""
    scene = Scene(2)
    [key] = base_files(scene.raw)
    good = scene.raw.get(key)
    scene.raw.remove(key) if how == "removed" else scene.raw.put(key, good[:-1])
    if restart:
        scene.store = opened(scene.raw.url)
    saved = scene.save(10)
    assert saved is not None
    assert saved.record.lenders == []
    assert save(scene.store, tuned(11), 11).record.lenders == [saved.id]
    with opened(scene.raw.url) as store:
        assert read(store, saved) == tuned_tensors(10)


class HeldUp:
    """A prune, in a thread, that stops before it removes ``key`` until it is told to go on."""

    def __init__(self, raw: Raw, key: str) -> None:
        self.store = opened(raw.url)
        self.key, self.stopped, self.go_on = key, threading.Event(), threading.Event()
        self._delete = self.store._storage.delete
        self.store._storage.delete = self._wait  # type: ignore[method-assign]
        self.thread = threading.Thread(target=lambda: self.store.prune(grace_s=GRACE_S))

    def _wait(self, keys: Iterable[str]) -> None:
        keys = list(keys)
        if self.key in keys:
            self.stopped.set()
            assert self.go_on.wait(60)
        self._delete(keys)

    def start(self) -> None:
        self.thread.start()
        assert self.stopped.wait(60)

    def end(self) -> None:
        self.go_on.set()
        self.thread.join()


def test_a_borrower_that_was_never_acknowledged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process died between commit and second look, so a prune may not know of it: nobody borrows by way of it.

    That prune has listed the commits before, and is held up until the next process has saved.
    """
    scene = Scene(1)
    [key] = base_files(scene.raw)
    with opened(scene.raw.url) as other:
        other.delete(scene.chain[0].id)
    tombstone = f"trash/{scene.chain[0].id}.json"
    prune = HeldUp(scene.raw, key)
    create, look = scene.storage.inner.create, saver.is_safe

    def creating(name: str, data: bytes) -> None:
        if name.startswith("commits/"):
            scene.raw.objects[tombstone] = scene.raw.objects[tombstone]._replace(modified=0.0)
            prune.start()
            create(name, data)
            raise Crash
        create(name, data)

    # Not seen by the first look, as if it had been deleted right after it.
    monkeypatch.setattr(saver, "is_safe", lambda *_: True)
    scene.storage.inner.create = creating  # type: ignore[method-assign]
    with pytest.raises(Crash):
        save(scene.store, tuned(10), 10)
    scene.storage.inner.create = create  # type: ignore[method-assign]
    monkeypatch.setattr(saver, "is_safe", look)
    with opened(scene.raw.url) as store:
        saved = save(store, tuned(11), 11)
    prune.end()
    assert key not in scene.raw.listing()
    with opened(scene.raw.url) as store:
        assert read(store, saved) == tuned_tensors(11)


def test_a_look_after_the_commit_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """The storage goes away between commit and second look: the error says what is known, nothing is removed."""
    scene, looks = Scene(1), list[bool]()

    def look(*arguments: Any) -> bool:
        looks.append(True)
        if len(looks) > 1:
            raise StorageError("the line is dead", transient=True)
        return real(*arguments)

    real = saver.is_safe
    monkeypatch.setattr(saver, "is_safe", look)
    with pytest.raises(CommitUnknownError, match=r"was committed.*line is dead.*store\.verify") as caught:
        save(scene.store, tuned(10), 10)
    assert len(looks) == 2
    assert read(scene.store, scene.store.resolve(caught.value.id)) == tuned_tensors(10)
    assert scene.store.verify().ok


def test_processes_that_save_delete_and_prune(store_path: Path, full: bool) -> None:
    """One saves what is mostly frozen, two delete at random and reclaim at once: what was acknowledged is whole."""
    count, url, ready = (400 if full else 60), str(store_path), {"ready": CONTEXT.Barrier(3), "done": CONTEXT.Event()}
    (acknowledged, borrowed, failed), *reaped = run(
        (tune, (url, count), ready), (reap, (url, 1), ready), (reap, (url, 2), ready)
    )
    deleted = {id for ids in reaped for id in ids}
    with opened(url) as store:
        live = store.checkpoints()
        for checkpoint in live:
            assert read(store, checkpoint) == tuned_tensors(checkpoint.step)
        assert {c.id for c in live} == set(acknowledged) - deleted
        store.prune(grace_s=0)
        report = store.verify()
    assert report.ok
    assert report.leftovers == report.foreign == []
    assert len(acknowledged) + failed == count + 1
    assert borrowed > 0
    assert len(deleted) > count // 4
