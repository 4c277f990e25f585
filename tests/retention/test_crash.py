"""Killed at every change of letting go: what stays is whole, and the next round and a prune end it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import ckptstore as cs
from ckptstore.policy.retention import Keep
from ckptstore.storage.base import Storage
from ckptstore.store import Store
from tests.integrity.crash import Crash, CrashingStorage
from tests.integrity.stores import FolderRaw, MemoryRaw, Raw, flat, opened, save, silence, state
from tests.tiers.scenes import memory, objects, put_back, storage_of

RULES: list[tuple[Keep, str]] = [(cs.last(2), ""), (cs.last(1) | cs.every_kept(steps=4), ""), (cs.last(2), "1h")]


def content(step: int) -> dict[str, bytes]:
    return {"model/w": bytes([step]) * 3000, "optimizer/m": bytes([step + 100]) * 500}


def fill(raw: Raw) -> dict[str, dict[str, bytes]]:
    with opened(raw.url) as store:
        return {save(store, state(content(step)), step).id: content(step) for step in range(5)}


@contextmanager
def on(storage: Storage, raw: Raw, keep: Keep, trash: str) -> Iterator[Store]:
    """A store whose every access goes through ``storage``, the right to save taken already."""
    store = opened(raw.url, keep=keep, **({"trash": trash} if trash else {}))
    with store._dispatcher.lock:
        store._dispatcher.claim.next_id(9, store._finder.view)
    assert store._retainer is not None
    for holder in (store._retainer, store._finder, store._dispatcher.claim):
        holder._storage = storage
    yield store


def let_go(storage: Storage, raw: Raw, keep: Keep, trash: str) -> None:
    with on(storage, raw, keep, trash) as store:
        assert store._retainer is not None
        store._retainer.saved()


@pytest.fixture(params=["memory", "folder"])
def raw(request: pytest.FixtureRequest, tmp_path: Path) -> Raw:
    return memory() if request.param == "memory" else FolderRaw(tmp_path / "store")


def _sound(raw: Raw, wanted: dict[str, dict[str, bytes]], staying: set[str]) -> set[str]:
    """All that is listed is whole, and all that stays is listed; what is."""
    with opened(raw.url, read_only=True) as store, silence():
        report = store.verify()
        assert report.ok, report.damages
        listed = {checkpoint.id for checkpoint in store.checkpoints()}
        assert staying <= listed
        for id in listed:
            assert flat(store.load(id)) == wanted[id]
    return listed


@pytest.mark.parametrize(("keep", "trash"), RULES, ids=["last", "union", "trash"])
def test_letting_go(raw: Raw, keep: Keep, trash: str, full: bool, caplog: pytest.LogCaptureFixture) -> None:
    wanted = fill(raw)
    with opened(raw.url) as store:
        staying = {verdict.id for verdict in store.judge(keep).verdicts if verdict.stays}
        assert len(staying) < len(wanted)
    before = objects(raw)
    counting = CrashingStorage(storage_of(raw), 1 << 40, after=False)
    let_go(counting, raw, keep, trash)
    count = (1 << 40) - counting.left
    assert count >= (3 if trash else 9)
    every = 1 if full or isinstance(raw, MemoryRaw) else 3

    for at, after in [(at, after) for at in range(1, count + 1, every) for after in (False, True)]:
        put_back(raw, before)
        storage = CrashingStorage(storage_of(raw), at, after=after)
        with pytest.raises(Crash):
            let_go(storage, raw, keep, trash)
        assert storage.dead
        _sound(raw, wanted, staying)
        with caplog.at_level(logging.ERROR):
            let_go(storage_of(raw), raw, keep, trash)
        assert _sound(raw, wanted, staying) == staying, f"{'after' if after else 'before'} change {at} of {count}"
        with opened(raw.url) as store:
            store.prune(grace_s=0)
            store.prune(grace_s=0)
            report = store.verify()
            assert report.ok
            assert not report.leftovers
        assert _sound(raw, wanted, staying) == staying
