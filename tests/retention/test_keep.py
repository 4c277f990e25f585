"""What stays of a store's checkpoints after each save, and what never goes."""

from __future__ import annotations

import logging
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import ckptstore as cs
from ckptstore.storage.local import LocalStorage
from tests.integrity.stores import FolderRaw


def fill(store: cs.Store, steps: range | list[int], **facts: Any) -> list[cs.Checkpoint]:
    return [store.save({"model": {"w": torch.full((50,), float(step))}}, step=step, **facts) for step in steps]


def steps(store: cs.Store) -> list[int]:
    return [checkpoint.step for checkpoint in store.checkpoints()]


def folders(place: Path) -> int:
    return len(list((place / "checkpoints").iterdir()))


def test_only_what_is_kept_stays(tmp_path: Path) -> None:
    with cs.open(tmp_path, keep=cs.last(2)) as store:
        seen = []
        for step in range(5):
            fill(store, [step])
            seen.append(steps(store))
        assert seen == [[0], [0, 1], [1, 2], [2, 3], [3, 4]]
        assert folders(tmp_path) == 2
        assert not store.deleted()
        assert store.verify().ok
        assert not store.verify().leftovers


def test_roles_are_reasons_and_no_copies(tmp_path: Path) -> None:
    """The latest, the one before, the end of an epoch and the best are single checkpoints."""
    losses = [3.0, 2.0, 1.0, 2.5, 2.4, 2.3]
    with cs.open(tmp_path, keep=cs.last(2) | cs.epochs() | cs.best("val_loss")) as store:
        for step, loss in enumerate(losses, 1):
            fill(store, [step * 10], epoch=step // 2, metrics={"val_loss": loss})
        assert steps(store) == [20, 30, 40, 50, 60]
        why = {v.step: v.why for v in store.judge(cs.last(2) | cs.epochs() | cs.best("val_loss")).verdicts}
        assert why == {
            20: "end of epoch 1",
            30: "the best val_loss",
            40: "end of epoch 2",
            50: "one of the newest 2",
            60: "one of the newest 2, end of epoch 3",
        }


@pytest.mark.parametrize("mode", ["async", "overlapped"])
def test_saves_in_the_background(tmp_path: Path, mode: Any) -> None:
    with cs.open(tmp_path, keep=cs.last(1)) as store:
        for step in range(4):
            fill(store, [step], mode=mode)
    with cs.open(tmp_path) as store:
        assert steps(store) == [3]


def test_what_went_can_be_brought_back_for_a_while(tmp_path: Path) -> None:
    with cs.open(tmp_path, keep=cs.last(1), trash="1h") as store:
        fill(store, range(3))
        assert steps(store) == [2]
        assert [c.step for c in store.deleted()] == [0, 1]
        store.undelete("step:1")
        assert store.load("step:1")["model"]["w"][0] == 1.0


def test_what_went_is_reclaimed_when_its_time_is_over(tmp_path: Path) -> None:
    with cs.open(tmp_path, keep=cs.last(1), trash="1h") as store:
        fill(store, range(3))
    with cs.open(tmp_path, keep=cs.last(1), trash=1e-6) as store:
        fill(store, [3])
        assert steps(store) == [3]
        assert not store.deleted()
    assert folders(tmp_path) == 1


def test_deleted_by_hand_is_not_reclaimed(tmp_path: Path) -> None:
    """Only a prune does that."""
    with cs.open(tmp_path, keep=cs.last(2)) as store:
        fill(store, range(2))
        store.delete("step:0")
        fill(store, range(2, 5))
        assert [c.step for c in store.deleted()] == [0]


def test_held_ones_stay(tmp_path: Path) -> None:
    with cs.open(tmp_path, keep=cs.last(1)) as store:
        fill(store, [0])
        store.hold("step:0", "paper")
        fill(store, range(1, 4))
        assert steps(store) == [0, 3]
        assert store.judge(cs.last(1)).verdicts[0].why == "held as paper"


def test_what_others_borrow_from_stays(tmp_path: Path) -> None:
    frozen = torch.nn.Linear(50, 50).requires_grad_(False)
    with cs.open(tmp_path, keep=cs.last(1)) as store:
        for step in range(4):
            store.save({"base": frozen, "step": step}, step=step)
        assert steps(store) == [0, 3]
        assert "borrows from it" in store.judge(cs.last(1)).verdicts[0].why
        assert store.verify().ok


def test_only_good_ones_count(tmp_path: Path) -> None:
    """The two newest have lost files: the newest good one stays, and what is damaged is for a person to decide."""
    with cs.open(tmp_path) as store:
        saved = fill(store, range(4))
    raw = FolderRaw(tmp_path)
    for checkpoint in saved[2:]:
        raw.remove(f"checkpoints/{checkpoint.id}/model.safetensors")

    with cs.open(tmp_path) as store:
        verdicts = store.judge(cs.last(1)).verdicts
        assert [v.step for v in verdicts if v.stays] == [1, 2, 3]
        assert "damaged" in verdicts[2].why
        assert store.prune(keep=cs.last(1)).retired == [saved[0].id]
        assert steps(store) == [1, 2, 3]


@pytest.mark.parametrize("what", ["manifest.json", "model.safetensors"])
def test_one_that_is_cut_short_does_not_count(tmp_path: Path, what: str) -> None:
    with cs.open(tmp_path) as store:
        saved = fill(store, range(3))
    raw, key = FolderRaw(tmp_path), f"checkpoints/{saved[2].id}/{what}"
    raw.put(key, raw.get(key)[:-1])
    with cs.open(tmp_path) as store:
        assert [v.step for v in store.judge(cs.last(1)).verdicts if v.stays] == [1, 2]


def test_a_record_that_can_t_be_read_keeps_all(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It may be a hold, or borrow: nothing goes, the save succeeds, and it is said once."""
    with cs.open(tmp_path) as store:
        saved = fill(store, range(3))
    FolderRaw(tmp_path).put(f"commits/{saved[0].id}.json", b"{}")

    with caplog.at_level(logging.WARNING), cs.open(tmp_path, keep=cs.last(1)) as store:
        fill(store, range(3, 6))
        with pytest.warns(cs.DamageWarning):
            assert steps(store) == [1, 2, 3, 4, 5]
    assert len([r for r in caplog.records if "nothing was let go" in r.message]) == 1


def test_a_listing_that_fails_removes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The save itself succeeded, and the next one makes up for it."""
    real, failed = LocalStorage.list, []

    def fails(self: LocalStorage, prefix: str) -> Any:
        if prefix == "holds/":
            failed.append(prefix)
            raise cs.StorageError("the disk is tired")
        return real(self, prefix)

    with cs.open(tmp_path, keep=cs.last(1)) as store:
        fill(store, [0])
        with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
            patch.setattr(LocalStorage, "list", fails)
            fill(store, [1])
        assert failed
        assert steps(store) == [0, 1]
        assert "the disk is tired" in caplog.text
        fill(store, [2])
        assert steps(store) == [2]


def test_very_many_need_force(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with cs.open(tmp_path) as store:
        fill(store, range(8))
    with caplog.at_level(logging.WARNING), cs.open(tmp_path, keep=cs.last(2)) as store:
        fill(store, [8])
        assert len(steps(store)) == 9
        assert "7 of 9 checkpoints would go at once" in caplog.text
        with pytest.raises(cs.FormatError, match="--force"):
            store.prune(keep=cs.last(2))
        assert len(steps(store)) == 9
        assert len(store.prune(keep=cs.last(2), force=True).retired) == 7
        assert steps(store) == [7, 8]
        assert len(store.deleted()) == 7


def test_a_dry_run_changes_nothing(tmp_path: Path) -> None:
    with cs.open(tmp_path) as store:
        saved = fill(store, range(4))
        store.delete("step:0")
    before = {key: FolderRaw(tmp_path).get(key) for key in FolderRaw(tmp_path).listing()}
    with cs.open(tmp_path, read_only=True) as store:
        report = store.prune(keep=cs.last(2), grace_s=0, dry_run=True)
    assert list(report.retired) == [saved[1].id]
    assert list(report.reclaimed) == [saved[0].id]
    assert report.freed_bytes == saved[0].stored_bytes
    assert {key: FolderRaw(tmp_path).get(key) for key in FolderRaw(tmp_path).listing()} == before
    with cs.open(tmp_path) as store:
        done = store.prune(keep=cs.last(2), grace_s=0)
        # What a prune with rules has just deleted is older than no grace at all.
        assert set(done.retired) == set(report.retired)
        assert set(report.reclaimed) <= set(done.reclaimed)


def test_a_run_that_was_replaced_removes_nothing(tmp_path: Path) -> None:
    old = cs.open(tmp_path, keep=cs.last(1))
    fill(old, [0])
    with cs.open(tmp_path) as new:
        fill(new, range(1, 4))
    assert old._retainer is not None
    old._retainer.saved()
    with cs.open(tmp_path) as store:
        assert steps(store) == [0, 1, 2, 3]
    old.close()


def test_two_saves_of_one_step_and_a_roll_back(tmp_path: Path) -> None:
    """What is newest goes by the order of saving, whatever the step says."""
    with cs.open(tmp_path, keep=cs.last(2)) as store:
        fill(store, [999_999, 1_000_000, 1_000_000])
        assert steps(store) == [1_000_000, 1_000_000]
    with cs.open(tmp_path, keep=cs.last(2)) as store:
        fill(store, [500, 510])
        assert steps(store) == [500, 510]
        assert store.resolve().step == 510


def test_foreign_files_stay(tmp_path: Path) -> None:
    with cs.open(tmp_path, keep=cs.last(1)) as store:
        fill(store, [0])
        (tmp_path / "checkpoints" / "notes.txt").write_text("mine")
        (tmp_path / "checkpoint-600").write_text("a file")
        fill(store, range(1, 3))
        assert steps(store) == [2]
    assert (tmp_path / "checkpoints" / "notes.txt").read_text() == "mine"
    assert (tmp_path / "checkpoint-600").exists()


def test_a_limit_in_bytes(tmp_path: Path) -> None:
    with cs.open(tmp_path) as store:
        each = fill(store, [0])[0].stored_bytes
    with cs.open(tmp_path, keep=cs.at_most(5 * each)) as store:
        fill(store, range(1, 30))
        left = steps(store)
        assert len(left) == 5
        assert left[-1] == 29
        gaps = [b - a for a, b in pairwise(left)]
        assert gaps == sorted(gaps, reverse=True)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"keep": "last(2)"}, "is no rule"),
        ({"keep": cs.milestones("1B")}, "is no rule"),
        ({"trash": "1h"}, "keep= says what goes"),
        ({"keep": cs.last(1), "trash": "soon"}, "no duration"),
        ({"keep": cs.last(1), "trash": "1h", "backup": "memory://elsewhere"}, "lies in the backup"),
    ],
)
def test_what_can_t_be(tmp_path: Path, options: dict[str, Any], match: str) -> None:
    with pytest.raises(cs.FormatError, match=match):
        cs.open(tmp_path, **options)


def test_with_a_backup_rules_are_for_the_primary(tmp_path: Path) -> None:
    with cs.open(tmp_path / "a", backup=tmp_path / "b") as store:
        fill(store, [0])
        with pytest.raises(cs.FormatError, match="without its backups"):
            store.prune(keep=cs.last(1))
