"""The store as a user sees it: save, load, find, keep, on local disk and in memory."""

from __future__ import annotations

import errno
import math
import os
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

import ckptstore as cs

STATE = {"model": {"w": torch.arange(12.0).reshape(3, 4), "b": torch.ones(3, dtype=torch.bfloat16)}, "epoch": 3}


@pytest.fixture(params=["local", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "store") if request.param == "local" else f"memory://{uuid.uuid4().hex}"


def tensors(step: int) -> dict[str, Any]:
    return {"model": {"w": torch.full((5,), float(step))}, "step": step}


def test_round_trip(url: str) -> None:
    """What was saved comes back, as plain data and in place, in another store object too."""
    with cs.open(url) as store:
        saved = store.save(STATE, step=7, epoch=2, metrics={"val_loss": 1.5}, reasons=["every 7 steps"])
    with cs.open(url, read_only=True) as store:
        [found] = store.checkpoints()
        assert found == saved
        assert (found.step, found.epoch, found.metrics, found.reasons) == (7, 2, {"val_loss": 1.5}, ("every 7 steps",))
        assert (found.tensors, found.files, found.world_size) == (2, 1, 1)
        plain = store.load()
        assert plain["epoch"] == 3
        assert torch.equal(plain["model"]["w"], STATE["model"]["w"])  # type: ignore[index]
        target = {"model": {"w": torch.zeros(3, 4), "b": torch.zeros(3, dtype=torch.bfloat16)}, "epoch": 0}
        pointer = target["model"]["w"].data_ptr()  # type: ignore[index]
        loaded = store.load("step:7", into=target)
        assert target["model"]["w"].data_ptr() == pointer  # type: ignore[index]
        assert torch.equal(target["model"]["w"], STATE["model"]["w"])  # type: ignore[index]
        assert target["epoch"] == 3
        assert loaded.checkpoint == saved
        assert not any([loaded.missing, loaded.unexpected, loaded.mismatched, loaded.cast, loaded.skipped])


def test_order_is_by_writer_and_sequence(url: str) -> None:
    """After a roll-back the newer save is latest, though its step is smaller."""
    with cs.open(url) as first:
        first.save(tensors(500), step=500)
        first.save(tensors(1000), step=1000)
    with cs.open(url) as second:
        second.save(tensors(600), step=600)
        assert [c.step for c in second.checkpoints()] == [500, 1000, 600]
        assert second.resolve().step == 600
        assert [c.order.writer for c in second.checkpoints()] == [1, 1, 2]
        assert [c.order.seq for c in second.checkpoints()] == [1, 2, 3]


def test_looking_claims_nothing(store_path: Path) -> None:
    """Opening, listing and loading leave the store as it is; only a save makes a writer."""
    cs.open(store_path).close()
    assert not store_path.exists()
    with cs.open(store_path) as store:
        store.save(tensors(1), step=1)
    before = sorted(p.relative_to(store_path).as_posix() for p in store_path.rglob("*"))
    with cs.open(store_path) as store:
        store.load()
        store.verify(record=False)
        store.resolve("step:1")
    assert sorted(p.relative_to(store_path).as_posix() for p in store_path.rglob("*")) == before
    assert [p.name for p in (store_path / "writers").iterdir()] == ["0001.json"]


def test_a_newer_writer_fences_the_older(url: str) -> None:
    """The run that was replaced finds out at its next save, and its checkpoints stay."""
    older, newer = cs.open(url), cs.open(url)
    older.save(tensors(1), step=1)
    newer.save(tensors(2), step=2)
    with pytest.raises(cs.StaleWriterError, match="writer 2 has opened"):
        older.save(tensors(3), step=3)
    assert [c.step for c in newer.checkpoints()] == [1, 2]


def test_shared_writers_save_side_by_side(url: str) -> None:
    """shared=True lets several save under one number, in turn."""
    one, two = cs.open(url, shared=True), cs.open(url, shared=True)
    for step, store in enumerate([one, two, one, two]):
        store.save(tensors(step), step=step)
    assert [c.step for c in one.checkpoints()] == [0, 1, 2, 3]
    assert {c.order.writer for c in one.checkpoints()} == {1}


def test_empty_missing_and_wrong_are_different(url: str, store_path: Path) -> None:
    """Only a store that answers and is empty means a fresh start."""
    with pytest.raises(cs.NoCheckpointError):
        cs.open(url).load("latest")
    with pytest.raises(cs.NotFoundError) as caught:
        cs.open(str(store_path) + "-typo", read_only=True).load("latest")
    assert not isinstance(caught.value, cs.NoCheckpointError)
    with pytest.raises(cs.StorageError, match="nothing:// is not supported"):
        cs.open("nothing://here")
    store = cs.open(url)
    store.save(tensors(1), step=1)
    with pytest.raises(cs.NotFoundError, match="there is step 1"):
        store.load("step:2")


def test_read_only_refuses_changes(url: str) -> None:
    """Whoever only looks can't change anything."""
    cs.open(url).save(tensors(1), step=1)
    store = cs.open(url, read_only=True)
    for change in (
        lambda: store.save(tensors(2), step=2),
        lambda: store.delete("latest"),
        lambda: store.undelete("0001"),
        lambda: store.hold("latest", "mine"),
        lambda: store.release("mine"),
        store.prune,
    ):
        with pytest.raises(cs.StorageError, match="read-only"):
            change()
    assert "read-only" in repr(store)


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"step": -1}, "step"),
        ({"step": 1.5}, "step"),
        ({"step": True}, "step"),
        ({"step": 10**15}, "step"),
        ({"step": 1, "epoch": "3"}, "epoch"),
        ({"step": 1, "metrics": {"loss": "low"}}, "metrics/loss"),
        ({"step": 1, "metrics": {"acc": 1.0}, "modes": {"acc": "best"}}, "modes"),
        ({"step": 1, "modes": {"acc": "max"}}, "modes"),
        ({"step": 1, "reasons": "text"}, "reasons"),
    ],
)
def test_wrong_facts_are_refused_before_anything_is_written(url: str, fields: dict[str, Any], path: str) -> None:
    """A wrong step, metric or mode names itself, and nothing lies on storage."""
    store = cs.open(url)
    with pytest.raises(cs.StateError) as caught:
        store.save(tensors(1), **fields)
    assert caught.value.path == path
    assert store.checkpoints() == []


def test_numbers_of_other_types_are_taken(url: str) -> None:
    """Steps and metrics may be NumPy's or torch's numbers."""
    saved = cs.open(url).save(
        {}, step=np.int64(4), metrics={"a_loss": torch.tensor(2.5), "b": np.float32(0.5), "c": math.nan, "d": -math.inf}
    )
    assert saved.step == 4
    assert saved.metrics["a_loss"] == 2.5
    assert math.isnan(cs.open(url).resolve().metrics["c"])
    assert cs.open(url).resolve().metrics["d"] == -math.inf


def test_too_much_in_the_record_is_refused_early(url: str) -> None:
    """A commit record has 16 KiB; more is an error before the data are written."""
    store = cs.open(url)
    with pytest.raises(cs.FormatError, match="fewer or shorter metrics"):
        store.save(tensors(1), step=1, metrics={f"metric-{n:04d}": n for n in range(1000)})
    assert store.verify().leftovers == []


def test_only_reads_a_part(url: str) -> None:
    """``only`` gives the matching sub-tree; a pattern that matches nothing is an error."""
    store = cs.open(url)
    store.save({"model": {"a": torch.ones(2), "b": torch.zeros(2)}, "optimizer": {"m": torch.ones(3)}}, step=1)
    part = store.load(only=["model/a"])
    assert list(part) == ["model"]
    assert list(part["model"]) == ["a"]
    target = {"model": {"a": torch.zeros(2), "b": torch.full((2,), 9.0)}}
    store.load(into=target, only=["model/a"])
    assert target["model"]["a"].tolist() == [1, 1]
    assert target["model"]["b"].tolist() == [9, 9]
    with pytest.raises(cs.StateError, match="modle"):
        store.load(only=["modle/*"])


def test_misfits_are_all_listed_and_change_nothing(url: str) -> None:
    """Missing, unexpected and mis-shaped entries are one error that lists them; strict=False reports them."""
    store = cs.open(url)
    store.save({"a": torch.ones(2), "b": torch.ones(3), "c": torch.ones(4)}, step=1)
    target = {"a": torch.zeros(2), "b": torch.zeros(5), "d": torch.zeros(1)}
    with pytest.raises(cs.StateError) as caught:
        store.load(into=target)
    assert all(name in str(caught.value) for name in ("b", "c", "d"))
    assert target["a"].tolist() == [0, 0]
    loaded = store.load(into=target, strict=False)
    assert target["a"].tolist() == [1, 1]
    assert (list(loaded.missing), list(loaded.unexpected)) == (["d"], ["c"])
    assert len(loaded.mismatched) == 1


def test_any_safetensors_reader_opens_the_files(store_path: Path) -> None:
    """A model's file has the module's own names and opens without ckptstore."""
    model = torch.nn.Linear(3, 2)
    saved = cs.open(store_path).save({"model": model}, step=1)
    found = safetensors.torch.load_file(store_path / "checkpoints" / saved.id / "model.safetensors")
    torch.nn.Linear(3, 2).load_state_dict(found)
    assert torch.equal(found["weight"], model.weight)


@pytest.mark.parametrize("threads", [1, 3])
def test_compression_is_transparent(url: str, threads: int) -> None:
    """Encoded blocks load, partly too, verify, and take less room; blocks that don't shrink stay as they are."""
    state = {"zeros": torch.zeros(9_000_000), "noise": torch.randn(3_000_000), "short": torch.ones(3)}
    store = cs.open(url, compression="zstd:1", threads=threads)
    saved = store.save(state, step=1)
    assert saved.stored_bytes < saved.raw_bytes / 2
    loaded = cs.open(url, threads=threads).load()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    assert torch.equal(store.load(only=["noise"])["noise"], state["noise"])
    assert store.verify().ok


@pytest.mark.parametrize("text", ["lz4", "zstd:99", "zstd:", "none:1", ""])
def test_unknown_compression_is_refused_at_open(text: str) -> None:
    """A wrong setting fails before training starts."""
    with pytest.raises(cs.FormatError, match="compression"):
        cs.open("memory://x", compression=text)


def test_delete_undelete_and_prune(url: str) -> None:
    """Deleted is gone at once, comes back by undelete, and is reclaimed by prune after its time."""
    store = cs.open(url)
    first, second = store.save(tensors(1), step=1), store.save(tensors(2), step=2)
    assert store.delete("latest") == second
    assert store.checkpoints() == [first]
    assert store.deleted() == [second]
    with pytest.raises(cs.NotFoundError):
        store.load("step:2")
    assert store.undelete(second.id[:11]) == second
    assert store.load()["step"] == 2
    store.delete(first.id)
    assert store.prune().reclaimed == []
    assert store.undelete("step:1") == first
    store.delete(first.id)
    lies_there = sum(entry.size for entry in store._storage.list(f"checkpoints/{first.id}/"))
    report = store.prune(grace_s=0)
    assert (report.reclaimed, report.freed_bytes) == ([first.id], lies_there)
    assert lies_there > first.stored_bytes
    with pytest.raises(cs.NotFoundError, match="nothing"):
        store.undelete(first.id)
    assert [c.step for c in store.checkpoints()] == [2]
    assert store.verify().ok
    assert store.verify().foreign == []


def test_holds_pin_and_name(url: str) -> None:
    """A held checkpoint can't be deleted; its name selects it; released it can."""
    store = cs.open(url)
    saved = store.save(tensors(1), step=1)
    store.save(tensors(2), step=2)
    store.hold("step:1", "release-1")
    assert store.holds() == {"release-1": saved.id}
    assert store.load("release-1")["step"] == 1
    with pytest.raises(cs.ExistsError, match="held by 'release-1'; release that hold"):
        store.delete("step:1")
    with pytest.raises(cs.ExistsError, match="pins"):
        store.hold("step:2", "release-1")
    for name in ("latest", "step:1", "best", "a/b", "", "0001-000001"):
        with pytest.raises(cs.FormatError):
            store.hold("step:1", name)
    store.release("release-1")
    with pytest.raises(cs.NotFoundError, match="none"):
        store.release("release-1")
    store.delete("step:1")


def test_fallback_names_what_it_skips(store_path: Path) -> None:
    """latest goes back past damaged checkpoints and says so; an explicit selector never does."""
    store = cs.open(store_path)
    store.save(tensors(1), step=1)
    bad = store.save(tensors(2), step=2)
    data = store_path / "checkpoints" / bad.id / "model.safetensors"
    content = bytearray(data.read_bytes())
    content[-1] ^= 1
    data.write_bytes(content)
    target = tensors(0)
    with pytest.warns(cs.FallbackWarning, match=bad.id):
        loaded = store.load("latest", into=target)
    assert loaded.checkpoint.step == 1
    assert list(loaded.skipped) == [bad.id]
    assert target["model"]["w"].tolist() == [1.0] * 5
    with pytest.raises(cs.IntegrityError) as caught:
        store.load("step:2")
    assert (caught.value.id, caught.value.block) == (bad.id, 0)
    report = store.verify()
    assert not report.ok
    [damage] = report.damages
    assert (damage.id, damage.block, list(damage.tensors)) == (bad.id, 0, ["model/w"])


def test_all_damaged_is_not_empty(store_path: Path) -> None:
    """Where every checkpoint is damaged the answer is IntegrityError: training must not start afresh."""
    store = cs.open(store_path)
    saved = store.save(tensors(1), step=1)
    (store_path / "checkpoints" / saved.id / "manifest.json").unlink()
    with (
        pytest.warns(cs.FallbackWarning),
        pytest.raises(cs.IntegrityError, match=r"every checkpoint is damaged \(1 in all\)"),
    ):
        store.load()
    commit = store_path / "commits" / f"{saved.id}.json"
    commit.write_bytes(commit.read_bytes()[:-20])
    with pytest.warns(cs.DamageWarning), pytest.raises(cs.IntegrityError, match="damaged"):
        cs.open(store_path).load()


def test_lost_store_record_is_rewritten(store_path: Path) -> None:
    """store.json may be lost: loads go on, verify tells, and the next save writes it with the same id."""
    saved = cs.open(store_path).save(tensors(1), step=1)
    (store_path / "store.json").unlink()
    store = cs.open(store_path)
    assert store.load()["step"] == 1
    assert [d.key for d in store.verify().damages] == ["store.json"]
    again = store.save(tensors(2), step=2)
    assert again.record.store_id == saved.record.store_id
    assert store.verify().ok


def test_saves_go_on_beside_a_damaged_store_record(store_path: Path) -> None:
    """A flip in store.json stops neither loads nor saves; it is warned of, and verify names the way out."""
    saved = cs.open(store_path).save(tensors(1), step=1)
    record = store_path / "store.json"
    record.write_bytes(record.read_bytes().replace(b"store_id", b"store_ie"))
    store = cs.open(store_path)
    with pytest.warns(cs.DamageWarning, match=r"store\.json"):
        again = store.save(tensors(2), step=2)
    assert again.record.store_id == saved.record.store_id
    assert store.load()["step"] == 2
    [damage] = store.verify().damages
    assert damage.key == "store.json"
    assert "remove it" in damage.problem


def test_a_disk_that_cant_read_is_damage(store_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bad sector costs one checkpoint, not the run."""
    store = cs.open(store_path)
    good, bad = store.save(tensors(1), step=1), store.save(tensors(2), step=2)
    real, fired = os.preadv, []
    sector = os.stat(store_path / "checkpoints" / bad.id / "model.safetensors").st_ino

    def preadv(fd: int, buffers: Any, offset: int) -> int:
        if os.fstat(fd).st_ino == sector:
            fired.append(offset)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.warns(cs.FallbackWarning, match=bad.id):
        assert store.load()["step"] == 1
    assert fired
    with pytest.raises(cs.IntegrityError, match="dmesg"):
        store.load(bad.id)
    assert [d.id for d in store.verify().damages] == [bad.id]
    assert store.verify(good.id).ok


def test_progress_counts_all_bytes(url: str) -> None:
    """Save, load and verify report every byte, ending at the total."""
    store = cs.open(url, threads=2)
    seen: list[tuple[int, int]] = []
    state = {"w": torch.zeros(10_000_000)}
    saved = store.save(state, step=1, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (saved.raw_bytes, saved.raw_bytes)
    for action in (store.verify, store.load):
        seen.clear()
        action(progress=lambda done, total: seen.append((done, total)))
        assert len(seen) == 3
        assert seen[-1] == (saved.stored_bytes, saved.stored_bytes)


def test_sampled_verification(url: str) -> None:
    """A sample reads a share of the blocks, and every record."""
    store = cs.open(url)
    saved = store.save({"w": torch.zeros(40_000_000)}, step=1)
    report = store.verify(sample=0.3)
    assert report.ok
    assert 0 < report.read_bytes < saved.stored_bytes / 2
    for wrong in (0, 1.5, -1):
        with pytest.raises(cs.FormatError, match="sample"):
            store.verify(sample=wrong)


def test_state_of_nothing_and_of_one_tensor(url: str) -> None:
    """An empty state and a bare tensor are states too."""
    store = cs.open(url)
    store.save({}, step=0)
    assert store.load() == {}
    store.save(torch.arange(3), step=1)
    assert store.load().tolist() == [0, 1, 2]
    store.save({"x": torch.empty(0, 4)}, step=2)
    assert store.load()["x"].shape == (0, 4)
    assert store.verify().ok


def test_components_with_odd_names(url: str) -> None:
    """Names that differ only by case or odd letters get files of their own."""
    state = {"Model": torch.ones(1), "model": torch.zeros(1), "mödel/x": {"w": torch.ones(2)}, "...": torch.ones(3)}
    store = cs.open(url)
    store.save({"a": state, "A": state, "ä": state, "tmp-x": state, "": state}, step=1)
    loaded = store.load()
    assert list(loaded) == ["a", "A", "ä", "tmp-x", ""]
    assert all(torch.equal(loaded[k][n], t) for k in loaded for n, t in state.items() if n != "mödel/x")
    assert store.verify().ok
    assert store.verify().foreign == []


def test_verify_beside_a_running_trainer(store_path: Path) -> None:
    """What is committed while the store is verified is no leftover; damage of a record that was read before is seen."""
    store, other = cs.open(store_path), cs.open(store_path)
    store.save(tensors(1), step=1)
    saved = []
    report = store.verify(progress=lambda done, total: saved or saved.append(other.save(tensors(2), step=2)))
    assert len(saved) == 1
    assert (report.leftovers, report.foreign, report.ok) == ([], [], True)
    commit = store_path / "commits" / f"{saved[0].id}.json"
    commit.write_bytes(commit.read_bytes()[:-1])
    [damage] = store.verify().damages
    assert "move it away" in damage.problem


@pytest.mark.parametrize(
    "use",
    [
        lambda store: store.resolve(3),
        lambda store: store.load(None),
        lambda store: store.verify(sample="10%"),
        lambda store: cs.open("memory://x", pool_bytes=0),
        lambda store: cs.open("memory://x", threads=0),
    ],
)
def test_wrong_arguments_name_themselves(url: str, use: Any) -> None:
    """A wrong argument is an error of ours that says what is right."""
    with pytest.raises(cs.FormatError):
        use(cs.open(url))


def test_only_as_text_is_explained(url: str) -> None:
    """A text is a sequence of letters; the message gives the list."""
    store = cs.open(url)
    store.save(tensors(1), step=1)
    with pytest.raises(cs.StateError, match=r"only=\['model/\*'\]"):
        store.load(only="model/*")
    with pytest.raises(cs.StateError, match="it has 'model', 'step'"):
        store.load(only=["modle/*"])


def test_close_twice_and_use_after() -> None:
    """close may be called twice; what comes after is a clear error."""
    store = cs.open("memory://closed")
    store.close()
    store.close()
    with pytest.raises(cs.StorageError, match="closed"):
        store.checkpoints()
