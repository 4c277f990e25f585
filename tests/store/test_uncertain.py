"""Changes without a save before them, where the storage doesn't refuse to create what exists."""

from __future__ import annotations

from dataclasses import replace
from uuid import uuid4

import pytest

import ckptstore
from ckptstore.errors import ExistsError
from ckptstore.storage.memory import MemoryStorage
from ckptstore.store import Store


class Ignoring(MemoryStorage):
    """Overwrites what exists, until it was tried out: from then on it looks first."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.probes = 0

    def create(self, key: str, data: bytes) -> None:
        if self.capabilities.exclusive_create:
            self.delete([key])
        super().create(key, data)

    def probe(self, key: str, data: bytes) -> None:
        self.probes += 1
        self.capabilities = replace(self.capabilities, exclusive_create=False)


@pytest.fixture
def name() -> str:
    return uuid4().hex


@pytest.fixture
def store(name: str, monkeypatch: pytest.MonkeyPatch) -> Store:
    """Of two checkpoints, the first one held; opened by a process that has not saved."""
    with ckptstore.open(f"memory://{name}") as first:
        for step in (1, 2):
            first.save({"x": step}, step=step)
        first.hold("step:1", "paper")
    monkeypatch.setattr("ckptstore.opening.open_storage", lambda url, **_: Ignoring(name))
    return ckptstore.open(f"memory://{name}")


def test_a_hold_is_not_overwritten(store: Store) -> None:
    with pytest.raises(ExistsError, match="pins"):
        store.hold("step:2", "paper")
    assert store.holds() == {"paper": store.resolve("step:1").id}


def test_what_may_still_run_is_spared_for_days(store: Store, name: str) -> None:
    """Whatever grace was asked for: nothing there decides between its commit and a condemnation."""
    newest = store.resolve("latest").id
    running = newest.replace("-000002-", "-000003-")
    MemoryStorage(name).create(f"checkpoints/{running}/model.safetensors", b"bytes")

    assert store.prune(grace_s=0).spared == [running]
    assert MemoryStorage(name).size(f"checkpoints/{running}/model.safetensors") == 5


def test_it_is_tried_out_once(store: Store) -> None:
    storage = store._storage
    assert isinstance(storage, Ignoring)
    store.delete("step:2")
    store.prune()
    store.hold("step:1", "demo")
    store.save({"x": 3}, step=3)

    assert storage.probes == 1


def test_who_only_looks_or_takes_away_tries_nothing(store: Store) -> None:
    storage = store._storage
    assert isinstance(storage, Ignoring)
    store.load("latest")
    store.verify()
    store.release("paper")

    assert storage.probes == 0
