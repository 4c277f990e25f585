"""A store in a place that only fsspec knows: the whole life of checkpoints, and writes that break."""

from __future__ import annotations

from collections.abc import Callable
from uuid import uuid4

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

import ckptstore as cs
from ckptstore.storage.generic import GenericStorage
from tests.storage.generic.rig import FragileFileSystem, MemoryRaw, patience, register


@pytest.fixture
def name(monkeypatch: pytest.MonkeyPatch) -> str:
    """A place at ``fragile://``; nothing breaks unless a test says so, and then it is not tried again for long."""
    register("fragile", FragileFileSystem)
    patience(monkeypatch, 0.5)
    monkeypatch.setattr(FragileFileSystem, "breaking", None)
    monkeypatch.setattr(FragileFileSystem, "fired", [])
    return uuid4().hex


def test_the_life_of_a_store(name: str) -> None:
    torch.manual_seed(1)
    model = torch.nn.Linear(300, 300)
    weight = model.weight.detach().clone()
    with cs.open(f"fragile://{name}") as store:
        for step in (1, 2, 3):
            store.save({"model": model}, step=step)
        assert store.verify().ok
        with torch.no_grad():
            model.weight.zero_()
        store.load("step:2", into={"model": model})
        assert torch.equal(model.weight, weight)
        store.delete("step:1")
        report = store.prune(grace_s=0)
        assert len(report.reclaimed) == 1

    reader = cs.open(f"fragile://{name}", read_only=True)
    assert [checkpoint.step for checkpoint in reader.checkpoints()] == [2, 3]
    assert reader.verify().ok
    assert temporary(name) == []


@pytest.mark.parametrize("breaking", ["checkpoints/", "commits/"])
def test_a_write_that_breaks_publishes_nothing(name: str, monkeypatch: pytest.MonkeyPatch, breaking: str) -> None:
    raw = MemoryRaw(name)
    store = cs.open(f"fragile://{name}")
    store.save({"a": torch.arange(1000)}, step=1)
    before = dict(zip(raw.keys(), map(raw.get, raw.keys()), strict=True))
    monkeypatch.setattr(FragileFileSystem, "breaking", breaking)

    with pytest.raises((cs.SaveFailedError, cs.CommitUnknownError)):
        store.save({"a": torch.arange(2000)}, step=2)

    assert FragileFileSystem.fired
    assert all("/tmp-" in path for path in FragileFileSystem.fired)
    monkeypatch.setattr(FragileFileSystem, "breaking", None)
    assert {key: raw.get(key) for key in before} == before
    assert [checkpoint.step for checkpoint in store.checkpoints()] == [1]
    assert store.verify().ok
    store.save({"a": torch.arange(3000)}, step=3)
    assert [checkpoint.step for checkpoint in store.checkpoints()] == [1, 3]


def test_what_breaks_for_a_while_is_written_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FragileFileSystem, "breaking", "a/tmp-")
    real: Callable[..., object] = FragileFileSystem._open

    def heal(self: FragileFileSystem, path: str, mode: str = "rb", **how: object) -> object:
        if len(self.fired) == 2:
            FragileFileSystem.breaking = None
        return real(self, path, mode, **how)

    monkeypatch.setattr(FragileFileSystem, "_open", heal)
    patience(monkeypatch, 60)

    storage = GenericStorage("fragile", name, {})
    storage.create("a/b", b"all of it")

    assert len(FragileFileSystem.fired) == 2
    assert storage.read("a/b", limit=100) == b"all of it"
    assert MemoryRaw(name).keys() == ["a/b"]


@pytest.mark.parametrize("way", ["finish", "create"])
def test_leftovers_of_a_killed_write_are_temporary(name: str, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """As after SIGKILL: nobody cleans up. Prune collects what is left by its name."""
    store = cs.open(f"fragile://{name}")
    store.save({"a": torch.arange(1000)}, step=1)
    storage = GenericStorage("fragile", name, {})
    writer = storage.open_writer("checkpoints/x")
    writer.write(writer.reserve(100), memoryview(b"x" * 100))
    monkeypatch.setattr(FragileFileSystem, "breaking", "tmp-")
    monkeypatch.setattr(FragileFileSystem, "rm_file", lambda self, path: None)

    with pytest.raises(cs.UnavailableError) as caught:
        _ = writer.finish() if way == "finish" else storage.create("checkpoints/x", b"x" * 100)

    writer.abort()
    assert caught.value.transient
    assert FragileFileSystem.fired
    assert temporary(name)
    assert not MemoryFileSystem().exists(f"/{name}/checkpoints/x")
    monkeypatch.undo()
    store.prune(grace_s=0)
    assert temporary(name) == []


def temporary(name: str) -> list[str]:
    """Keys of temporary objects."""
    keys = MemoryRaw(name).keys()
    return [key for key in keys if key.rpartition("/")[2].startswith("tmp-")]
