"""The last verifications are remembered where they can be, and nothing depends on that."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import ckptstore as cs
from ckptstore.errors import UnavailableError
from ckptstore.format import layout
from ckptstore.maintenance import verifications
from ckptstore.storage.local import LocalStorage
from tests.background.holding import Fault


@pytest.fixture
def store(store_path: Path) -> Any:
    """With two checkpoints."""
    with cs.open(store_path) as store:
        for step in (1, 2):
            store.save({"x": torch.full((3,), float(step))}, step=step)
        yield store


def records(place: Path) -> list[Path]:
    return sorted((place / "verifications").glob("*"))


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"sample"', b'"simple"'))


def test_what_was_found_is_remembered(store: cs.Store, store_path: Path) -> None:
    """The newest first; writers are none, and prune and verify know the folder."""
    assert store.verifications() == []
    first, second = store.checkpoints()
    store.verify()
    store.verify("step:1", sample=0.5)
    file = next((store_path / "checkpoints" / second.id).glob("*.safetensors"))
    file.write_bytes(b"\0" * file.stat().st_size)
    report = store.verify()

    found = cs.open(store_path, read_only=True).verifications()
    assert found == store.verifications()
    told = [(v.by, v.ok, v.id, v.newest, v.sample, v.checkpoints, v.damages) for v in found]
    assert told == [
        ("verify", False, None, second.id, 1.0, 2, 1),
        ("verify", True, first.id, first.id, 0.5, 1, 0),
        ("verify", True, None, second.id, 1.0, 2, 0),
    ]
    assert (found[0].read_bytes, found[0].repaired) == (report.read_bytes, 0)
    assert found[0].created > found[1].created > found[2].created
    assert (report.foreign, report.leftovers) == ([], [])
    assert len(list((store_path / "writers").iterdir())) == 1
    store.prune(grace_s=0)
    assert store.verifications() == found


def test_whoever_only_looks_puts_nothing_down(store: cs.Store, store_path: Path) -> None:
    store.verify(record=False)
    with cs.open(store_path, read_only=True) as looking:
        looking.verify()
    assert not (store_path / "verifications").exists()


def test_a_repair_is_remembered(store: cs.Store, store_path: Path, tmp_path: Path) -> None:
    """In the place that was read; the backup has none of it."""
    store.verify()
    backup = tmp_path / "backup"
    store.copy(backup)
    file = next((store_path / "checkpoints" / store.resolve().id).glob("*.safetensors"))
    file.write_bytes(b"\0" * file.stat().st_size)
    with cs.open(store_path, backup=backup) as healed:
        assert healed.verify(repair=True).ok
        last = healed.verifications()[0]
    assert (last.ok, last.damages, last.repaired) == (True, 0, 1)
    assert not (backup / "verifications").exists()


def test_the_last_twenty_stay(store: cs.Store, store_path: Path) -> None:
    store.verify("step:1")
    oldest = records(store_path)
    for _ in range(verifications.KEPT):
        store.verify("step:2")
    assert len(records(store_path)) == verifications.KEPT
    assert not set(oldest) & set(records(store_path))
    assert {v.newest for v in store.verifications()} == {store.resolve("step:2").id}


@pytest.mark.parametrize("content", ["flipped", "torn", "of nobody's time", "a hold's"])
def test_damaged_ones_are_told_and_disturb_nobody(store: cs.Store, store_path: Path, content: str) -> None:
    store.verify()
    good = store.verifications()
    store.verify("step:1")
    bad = records(store_path)[-1]
    if content == "flipped":
        damage(bad)
    elif content == "torn":
        bad.write_bytes(bad.read_bytes()[:50])
    elif content == "a hold's":
        store.hold("step:1", "paper")
        bad.write_bytes((store_path / layout.hold_key("paper")).read_bytes())
    else:
        record = verifications.unseal(bad.read_bytes(), "key", [verifications.VerificationRecord])
        bad.write_bytes(verifications.seal(record.model_copy(update={"created": "yesterday"})))

    with pytest.warns(cs.DamageWarning, match=bad.name):
        assert store.verifications() == good
    assert [c.step for c in store.checkpoints()] == [1, 2]
    report = store.verify()
    if content != "of nobody's time":
        assert [d.key for d in report.records] == [f"verifications/{bad.name}"]
        assert "nothing depends on it" in report.records[0].problem
        bad.unlink()
        assert store.verify().ok
    store.save({"x": 3}, step=3)


@pytest.mark.parametrize("step", ["create", "list", "delete"])
def test_where_nothing_can_be_written_it_is_verified_all_the_same(
    store: cs.Store, store_path: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verifications, "KEPT", 1)
    store.verify()
    about = lambda _, what, *__: layout.VERIFICATIONS in (what if isinstance(what, str) else "".join(what))  # noqa: E731
    with Fault(LocalStorage, step, UnavailableError("no answer"), only=about):
        assert store.verify().ok


def test_several_at_once(store: cs.Store, store_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has a record of its own, and no one trips over what another has just removed."""
    monkeypatch.setattr(verifications, "KEPT", 2)
    reports: list[bool] = []

    def verify() -> None:
        for _ in range(5):
            reports.append(store.verify().ok)
            store.verifications()

    threads = [threading.Thread(target=verify) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert reports == [True] * 20
    assert len(records(store_path)) == 2
    assert len(store.verifications()) == 2


def test_what_is_put_down_without_a_checkpoint(store_path: Path) -> None:
    """An empty store is verified, too; none is not, and none is made."""
    with cs.open(store_path) as store:
        with pytest.raises(cs.NotFoundError):
            store.verify()
        assert os.listdir(store_path.parent) == []
        store.save({"x": 1}, step=1)
        store.delete("step:1", reclaim=True)
        store.verify()
        (found,) = store.verifications()
    assert (found.ok, found.checkpoints, found.newest) == (True, 0, None)
