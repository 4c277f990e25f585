"""Rolling back: the old state is the latest again, without its bytes, whatever happens meanwhile and afterwards."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch

import ckptstore as cs
from ckptstore.engine.catalogue import Checkpoint
from ckptstore.engine.facts import Facts
from ckptstore.engine.saver import Job
from ckptstore.errors import (
    ExistsError,
    IntegrityError,
    NoCheckpointError,
    NotFoundError,
    SaveFailedError,
    StaleWriterError,
    StorageError,
)
from ckptstore.storage.base import Storage
from ckptstore.store import Store
from tests.integrity.borrowing import interrupted
from tests.integrity.crash import Crash, CrashingStorage
from tests.integrity.processes import tuned, tuned_tensors
from tests.integrity.stores import FolderRaw, Forge, MemoryRaw, Raw, compact, flat, opened, read, save, state
from tests.tiers.scenes import objects, put_back, storage_of

SOURCE = Path(cs.__file__).parents[1]


def content(step: int) -> dict[str, bytes]:
    return {"model/w": bytes([step]) * 3000, "optimizer/m": bytes([step + 100]) * 500}


def fill(raw: Raw, count: int = 3, **options: Any) -> list[Checkpoint]:
    with opened(raw.url, **options) as store:
        return [save(store, state(content(step), n=step), step, loss=9.0 - step) for step in range(1, count + 1)]


def tidy(store: Store) -> None:
    """All is good, and nothing lies there that should not."""
    store.prune(grace_s=0)
    report = store.verify()
    assert report.ok, report.damages
    assert not report.leftovers
    assert not report.foreign


@pytest.fixture(params=["memory", "folder"])
def raw(request: pytest.FixtureRequest, tmp_path: Path) -> Raw:
    return MemoryRaw(uuid4().hex) if request.param == "memory" else FolderRaw(tmp_path / "store")


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_the_old_state_is_the_latest_again(raw: Raw, compression: str) -> None:
    """Told as the old one, but for why; no data file is written, and all before is still there."""
    saved = fill(raw, compression=compression)
    before = objects(raw)
    with opened(raw.url) as store:
        new = store.rollback("step:1")
        old = saved[0]
        assert [c.id for c in store.checkpoints()] == [*(c.id for c in saved), new.id]
        assert store.resolve("latest") == new
        assert (new.step, new.epoch, new.metrics, new.modes) == (old.step, old.epoch, old.metrics, old.modes)
        assert (new.tensors, new.parameters, new.files) == (old.tensors, old.parameters, old.files)
        assert (new.raw_bytes, new.stored_bytes) == (old.raw_bytes, old.stored_bytes)
        assert new.borrowed_bytes == new.stored_bytes > 0
        assert new.lenders == [old.id]
        assert new.reasons == (f"rollback to {old.id}",)
        loaded = store.load("latest")
        assert (flat(loaded), loaded["n"]) == (content(1), 1)
        tidy(store)
    after = objects(raw)
    assert {key: after[key] for key in before} == before
    written = {key.rpartition("/")[2] for key in after.keys() - before.keys() if new.id in key}
    assert written == {"manifest.json", "part-00000.json", f"{new.id}.json"}


def test_live_objects_come_back_bit_for_bit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    live = {"model": model, "optimizer": optimizer, "rng": cs.RNG()}

    def train() -> None:
        optimizer.zero_grad()
        model(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()

    with cs.open(tmp_path / "store") as store:
        for step in range(1, 4):
            train()
            store.save(live, step=step)
            if step == 2:
                wanted = [parameter.detach().clone() for parameter in model.parameters()]
        first = [parameter.detach().clone() for parameter in model.parameters()]
        store.rollback("step:2")
        store.load("latest", into=live)
        assert all(map(torch.equal, model.parameters(), wanted))
        # And from there on as before.
        train()
        assert all(map(torch.equal, model.parameters(), first))
        assert store.save(live, step=3).step == 3
        assert [c.step for c in store.checkpoints()] == [1, 2, 3, 2, 3]


def test_the_files_outlive_the_old_one(raw: Raw) -> None:
    """Deleted and reclaimed, it has lent them all the same; so has it where a roll-back is rolled back to."""
    fill(raw)
    with opened(raw.url) as store:
        new = store.rollback("step:1")
        save(store, state(content(4)), 4)
        again = store.rollback(new.id)
        assert again.lenders == new.lenders
        assert again.reasons == (f"rollback to {new.id}",)
        for checkpoint in store.checkpoints()[:-1]:
            store.delete(checkpoint.id)
        tidy(store)
        assert [c.id for c in store.checkpoints()] == [again.id]
        assert read(store, again) == content(1)
        store.delete(again.id)
        # Whatever could come after it.
        save(store, state(content(5)), 5)
        tidy(store)
        assert not [key for key in raw.listing() if key.endswith(".safetensors") and "-step1-" in key]


def test_a_hold_names_what_to_go_back_to(raw: Raw) -> None:
    saved = fill(raw)
    with opened(raw.url) as store:
        store.hold("best:loss", "good")
        assert store.rollback("step:1").step == 1
        assert store.rollback("good").reasons == (f"rollback to {saved[2].id}",)
        # Of equally good ones the newest is the best.
        assert store.resolve("best:loss") == store.resolve("latest")


def test_no_torch_is_needed(tmp_path: Path) -> None:
    raw = FolderRaw(tmp_path / "store")
    fill(raw)
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError('no torch here')")
    code = f"import ckptstore\nwith ckptstore.open({raw.url!r}) as store: print(store.rollback('step:1').id)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(SOURCE)])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    with opened(raw.url) as store:
        assert store.resolve("latest").id == done.stdout.strip()


# -- what is refused -----------------------------------------------------------------------------------------


def test_what_makes_no_sense(raw: Raw) -> None:
    with opened(raw.url) as store, pytest.raises(NoCheckpointError):
        store.rollback("latest")
    fill(raw)
    before = objects(raw)
    with opened(raw.url) as store:
        for selector in ("latest", "step:3"):
            with pytest.raises(ExistsError, match="is the latest already"):
                store.rollback(selector)
        with pytest.raises(NotFoundError, match="step:77"):
            store.rollback("step:77")
    with opened(raw.url, read_only=True) as store, pytest.raises(StorageError, match="read-only"):
        store.rollback("step:1")
    assert objects(raw) == before, "not even the right to save was taken"


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "part-00000.json", "manifest.json"])
@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
def test_damage_is_not_gone_back_to(raw: Raw, name: str, how: str) -> None:
    saved = fill(raw)
    key = f"checkpoints/{saved[0].id}/{name}"
    good = raw.get(key)
    middle = len(good) // 2
    if how == "gone":
        raw.remove(key)
    else:
        raw.put(key, good[:-1] if how == "cut" else good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :])
    before = objects(raw)
    with opened(raw.url) as store, pytest.raises(IntegrityError, match=f"{saved[0].id} is damaged.*{name}"):
        store.rollback("step:1")
    assert objects(raw) == before


def test_the_run_that_still_saves_is_told(raw: Raw) -> None:
    with opened(raw.url) as run, opened(raw.url) as other:
        for step in (1, 2):
            save(run, state(content(step)), step)
        other.rollback("step:1")
        with pytest.raises(StaleWriterError, match="writer 2 has opened this store after writer 1"):
            save(run, state(content(3)), 3)
        with pytest.raises(StaleWriterError):
            run.rollback("step:2")
        assert save(other, state(content(3)), 3).step == 3
        assert [c.step for c in other.checkpoints()] == [1, 2, 1, 3]


# -- with rules and backups ----------------------------------------------------------------------------------


def test_rules_are_applied_after_it(raw: Raw) -> None:
    """As after a save; what is lent stays."""
    fill(raw, 4)
    with opened(raw.url, keep=cs.last(2)) as store:
        store.rollback("step:1")
        assert [c.step for c in store.checkpoints()] == [1, 4, 1]
        save(store, state(content(5)), 5)
        save(store, state(content(6)), 6)
        assert [c.step for c in store.checkpoints()] == [5, 6]
        tidy(store)


def test_what_is_saved_next_borrows_from_it(raw: Raw) -> None:
    """The base model of a fine-tuning is never stored twice."""
    with opened(raw.url) as store:
        for step in (1, 2, 3):
            save(store, tuned(step), step)
        new = store.rollback("step:2")
        after = save(store, tuned(4), 4)
        assert new.borrowed_bytes == new.stored_bytes
        assert 0 < after.borrowed_bytes < after.stored_bytes
        assert read(store, after) == tuned_tensors(4)
        assert set(after.lenders) <= set(new.lenders)


def test_what_a_dead_process_may_have_lost_is_copied(raw: Raw) -> None:
    """The owner of the base is reclaimed: nobody borrows it by way of another process's checkpoint; see the format."""
    with opened(raw.url) as store:
        for step in (1, 2, 3):
            save(store, tuned(step), step)
        store.delete("step:1")
        tidy(store)
    with opened(raw.url) as store:
        old = store.resolve("step:2")
        new = store.rollback(old.id)
        assert new.lenders == [old.id]
        assert 0 < new.borrowed_bytes < new.stored_bytes
        assert read(store, new) == tuned_tensors(2)
        for checkpoint in store.checkpoints()[:-1]:
            store.delete(checkpoint.id)
        tidy(store)
        assert read(store, new) == tuned_tensors(2)


def test_backups_get_it(tmp_path: Path) -> None:
    primary, backup = FolderRaw(tmp_path / "primary"), FolderRaw(tmp_path / "backup")
    with opened(primary.url, backup=backup.url, durable="backup") as store:
        for step in (1, 2):
            save(store, state(content(step)), step)
        new = store.rollback("step:1")
    for place in (primary, backup):
        with opened(place.url) as store:
            assert store.resolve("latest").id == new.id
            assert read(store, store.resolve("latest")) == content(1)
            tidy(store)


def test_what_only_a_backup_has_is_brought_from_there(tmp_path: Path) -> None:
    primary, backup = FolderRaw(tmp_path / "primary"), FolderRaw(tmp_path / "backup")
    options = {"backup": backup.url, "durable": "backup", "keep": cs.last(1)}
    with opened(primary.url, **options) as store:
        saved = [store._dispatcher.save(Job(state(content(step)), Facts.of(step), "backup")) for step in (1, 2, 3)]
    with opened(primary.url) as store:
        assert [c.id for c in store.checkpoints()] == [saved[2].id]
    with opened(primary.url, **options) as store:
        new = store.rollback("step:1")
        assert (new.borrowed_bytes, new.lenders) == (0, [])
    for place, ids in ((primary, [new.id]), (backup, [*(c.id for c in saved), new.id])):
        with opened(place.url) as store:
            assert [c.id for c in store.checkpoints()] == ids
            assert read(store, store.resolve("latest")) == content(1)
            tidy(store)


def test_parts_of_several_ranks_are_kept_apart(raw: Raw) -> None:
    """As a distributed run will write them."""
    saved = fill(raw)
    forge = Forge(raw, saved[0].id)
    model, optimizer = forge.part["files"]
    parts = [compact({**forge.part, "rank": rank, "files": [file]}) for rank, file in enumerate((model, optimizer))]
    for rank, data in enumerate(parts):
        raw.put(f"{forge.folder}/part-{rank:05d}.json", data)
        forge.manifest["parts"][rank:] = [{**sized(data), "rank": rank}]
    forge.manifest["world_size"] = forge.commit["world_size"] = 2
    forge.write(part=parts[0])
    with opened(raw.url) as store:
        new = store.rollback("step:1")
        assert new.world_size == 2
        assert [[file.name for file in part.files] for part in store.contents(new).parts] == [
            ["model.safetensors"],
            ["optimizer.safetensors"],
        ]
        assert read(store, new) == content(1)
        tidy(store)


def sized(data: bytes) -> dict[str, Any]:
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


# -- killed, and disturbed -----------------------------------------------------------------------------------


def on(storage: Storage, raw: Raw) -> Store:
    """A store opened anew whose every access goes through ``storage``."""
    store = opened(raw.url)
    store._storage = store._finder._storage = store._tools.storage = store._dispatcher.claim._storage = storage
    return store


def tune(raw: Raw, *, reclaimed: bool) -> list[int]:
    """Three steps of a fine-tuning, of which the first owns the base of all; or two, as it was reclaimed."""
    with opened(raw.url) as store:
        for step in (1, 2, 3):
            save(store, tuned(step), step)
        if reclaimed:
            store.delete("step:1")
            tidy(store)
        return [c.step for c in store.checkpoints()]


def sound(raw: Raw) -> list[int]:
    """The steps that are there, each of them whole; nothing is damaged."""
    with opened(raw.url, read_only=True) as store:
        report = store.verify()
        assert report.ok, report.damages
        for checkpoint in store.checkpoints():
            assert read(store, checkpoint) == tuned_tensors(checkpoint.step)
        return [checkpoint.step for checkpoint in store.checkpoints()]


@pytest.mark.parametrize("reclaimed", [False, True], ids=["all is borrowed", "the base is copied"])
def test_killed_at_any_change(raw: Raw, reclaimed: bool) -> None:
    """Before or after it: the new one is there and whole, or it isn't; the next roll-back and a prune end it."""
    steps = tune(raw, reclaimed=reclaimed)
    before = objects(raw)
    counting = CrashingStorage(storage_of(raw), 1 << 40, after=False)
    on(counting, raw).rollback("step:2")
    count = (1 << 40) - counting.left
    # The right to save, part, manifest and commit record; and a file that is begun, written and finished.
    assert count == (7 if reclaimed else 4)
    outcomes = Counter[int]()

    for at, after in [(at, after) for at in range(1, count + 1) for after in (False, True)]:
        put_back(raw, before)
        storage = CrashingStorage(storage_of(raw), at, after=after)
        with pytest.raises(Crash):
            on(storage, raw).rollback("step:2")
        assert storage.dead
        found = sound(raw)
        assert found in (steps, [*steps, 2])
        outcomes[len(found)] += 1
        with opened(raw.url) as store:
            new = store.rollback("step:3") if found[-1] == 2 else store.rollback("step:2")
            tidy(store)
            assert store.resolve("latest") == new
        assert sound(raw) == [*found, new.step]
    assert len(outcomes) == 2, "it was never committed, or always"


@pytest.mark.parametrize("reclaimed", [False, True], ids=["all is borrowed", "the base is copied"])
@pytest.mark.parametrize("how", ["deleted", "reclaimed"])
def test_the_old_one_is_deleted_meanwhile(reclaimed: bool, how: str) -> None:
    """Before any one call: the roll-back is acknowledged and whole for good, or it has failed and left nothing."""
    outcomes: Counter[str] = Counter()
    at, fired = 0, [True]
    while fired:
        at += 1
        raw, fired = MemoryRaw(uuid4().hex), []
        tune(raw, reclaimed=reclaimed)
        with opened(raw.url) as other:
            old = other.resolve("step:2").id

        def delete(raw: MemoryRaw = raw, id: str = old, fired: list[bool] = fired) -> None:
            with opened(raw.url) as other:
                other.delete(id)
                if how == "reclaimed":
                    key = f"trash/{id}.json"
                    raw.objects[key] = raw.objects[key]._replace(modified=0.0)
                    # Of what is younger the save may be running.
                    other.prune(grace_s=3600.0)
            fired.append(True)

        store, _ = interrupted(raw.url, {at: delete})
        try:
            new: Checkpoint | None = store.rollback("step:2")
        except (SaveFailedError, NotFoundError) as error:
            outcomes[type(error).__name__] += 1
            new = None
        if not fired:
            break
        outcomes["done"] += new is not None
        with opened(raw.url) as other:
            tidy(other)
            assert [c.id for c in other.checkpoints()][-1:] == [new.id] if new else other.resolve("latest").step == 3
        sound(raw)
        # The store goes on.
        assert save(store, tuned(4), 4).step == 4
        sound(raw)
    assert outcomes["done"] > 0
    assert outcomes["SaveFailedError"] > 0
    assert how == "deleted" or outcomes["NotFoundError"] > 0


def test_another_run_that_begins_meanwhile_wins(raw: Raw) -> None:
    """Right before the commit record: then nothing is committed, and nothing left."""
    fill(raw)
    store, storage = interrupted(raw.url, {})
    create, fired = storage.inner.create, []

    def creating(key: str, data: bytes) -> None:
        if key.endswith("manifest.json") and not fired:
            fired.append(key)
            with opened(raw.url) as other:
                save(other, state(content(4)), 4)
        create(key, data)

    storage.inner.create = creating  # type: ignore[method-assign]
    with pytest.raises(StaleWriterError):
        store.rollback("step:1")
    assert fired
    with opened(raw.url) as other:
        assert [c.step for c in other.checkpoints()] == [1, 2, 3, 4]
        tidy(other)
