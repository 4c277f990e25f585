"""Real saves that borrow a frozen model, while others delete and prune."""

from __future__ import annotations

import random
from collections import Counter
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import pytest

from ckptstore.engine.catalogue import Checkpoint
from ckptstore.errors import NotFoundError, SaveFailedError
from tests.integrity.borrowing import interrupted
from tests.integrity.processes import tuned, tuned_tensors
from tests.integrity.stores import FolderRaw, MemoryRaw, Raw, opened, read, save

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
