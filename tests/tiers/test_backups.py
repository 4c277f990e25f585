"""Every checkpoint gets to the backup, and comes back from it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Literal

import pytest
import torch

import ckptstore as cs
from ckptstore.format import layout
from ckptstore.format.records import ReceiptRecord, unseal
from tests.tiers.places import data_file, flip, holds, lose, objects, state, steps


def test_what_is_saved_is_copied_byte_by_byte(primary: Path, backup: Path) -> None:
    """Under the same names: a backup is a store like any other."""
    with cs.open(primary, backup=backup) as store:
        for step in range(3):
            store.save(state(step), step=step)

    for folder in ("commits", "checkpoints"):
        assert objects(backup, folder) == objects(primary, folder) != {}
    assert (backup / "store.json").read_bytes() == (primary / "store.json").read_bytes()
    with cs.open(backup, read_only=True) as copy:
        assert copy.verify().ok
        assert holds(copy, "latest", 2)


@pytest.mark.parametrize("compression", ["none", "zstd", "float-zstd"])
def test_borrowed_and_encoded_files_are_copied_too(primary: Path, backup: Path, compression: str) -> None:
    frozen = torch.nn.Linear(100, 100).requires_grad_(False)
    with cs.open(primary, backup=backup, compression=compression) as store:
        for step in range(3):
            store.save({"frozen": frozen, **state(step)}, step=step)
        assert store.checkpoints()[-1].borrowed_bytes > 0

    lose(primary)
    with cs.open(backup) as copy:
        assert copy.verify().ok
        assert torch.equal(copy.load()["frozen"]["weight"], frozen.weight)


def test_several_backups_each_get_everything(primary: Path, tmp_path: Path) -> None:
    places = [tmp_path / name for name in ("one", "two", "three")]
    with cs.open(primary, backup=places) as store:
        for step in range(2):
            store.save(state(step), step=step)

    assert [steps(place) for place in places] == [[0, 1]] * 3


@pytest.mark.parametrize("mode", ["sync", "async", "overlapped"])
def test_durable_in_the_backup_when_save_returns(
    primary: Path, backup: Path, mode: Literal["sync", "async", "overlapped"]
) -> None:
    with cs.open(primary, backup=backup, durable="backup") as store:
        for step in range(3):
            saved = store.save(state(step), step=step, mode=mode)
            if isinstance(saved, cs.SaveHandle):
                saved.result()
            assert steps(backup) == list(range(step + 1))


def test_durable_here_is_enough_for_a_single_save(primary: Path, backup: Path) -> None:
    """What was chosen when the store was opened is only the default."""
    with cs.open(primary, backup=backup) as store:
        store.save(state(0), step=0, durable="backup")
        assert steps(backup) == [0]


def test_what_an_earlier_run_left_behind_is_copied_by_the_next(primary: Path, backup: Path) -> None:
    with cs.open(primary) as store:
        for step in range(3):
            store.save(state(step), step=step)

    with cs.open(primary, backup=backup) as store:
        store.save(state(3), step=3)

    assert steps(backup) == [0, 1, 2, 3]


def test_looking_copies_nothing(primary: Path, backup: Path) -> None:
    with cs.open(primary) as store:
        store.save(state(0), step=0)

    with cs.open(primary, backup=backup) as store:
        assert holds(store, "latest", 0)
        assert store.checkpoints()[0].step == 0

    assert not backup.exists()


def test_each_copy_has_a_receipt(primary: Path, backup: Path) -> None:
    with cs.open(primary, backup=backup) as store:
        saved = [store.save(state(step), step=step) for step in range(2)]

    for checkpoint in saved:
        key = layout.receipt_key(backup.as_uri(), checkpoint.order)
        receipt = unseal((primary / key).read_bytes(), key, [ReceiptRecord])
        assert (receipt.id, receipt.place, receipt.method) == (checkpoint.id, backup.as_uri(), "readback")
        assert receipt.manifest == checkpoint.record.manifest
        assert receipt.stored_bytes == checkpoint.stored_bytes


def test_lag_is_seen_from_the_primary(primary: Path, backup: Path) -> None:
    with cs.open(primary, backup=backup) as store:
        store.save(state(0), step=0)
    with cs.open(primary) as store:
        late = [store.save(state(step), step=step) for step in (1, 2)]
        (lag,) = store.lags()

    assert (lag.place, lag.copied, lag.behind) == (backup.as_uri(), 1, 2)
    assert lag.behind_bytes == sum(checkpoint.stored_bytes for checkpoint in late)
    assert lag.since == late[0].created


def test_deleting_is_not_mirrored(primary: Path, backup: Path) -> None:
    """What was deleted here stays there, and isn't taken back from there."""
    with cs.open(primary, backup=backup) as store:
        for step in range(3):
            store.save(state(step), step=step, durable="backup")
        store.delete("step:1")
        assert store.prune(grace_s=0).reclaimed
        assert [c.step for c in store.checkpoints()] == [0, 2]
        store.save(state(3), step=3, durable="backup")
        assert [c.step for c in store.checkpoints()] == [0, 2, 3]

    assert steps(backup) == [0, 1, 2, 3]
    assert steps(primary) == [0, 2, 3]


def test_its_tombstone_stays_as_long_as_a_backup_has_it(
    primary: Path, backup: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the checkpoint would come back when tombstones are forgotten."""
    monkeypatch.setattr("ckptstore.maintenance.prune.TOMBSTONE_S", -1.0)
    with cs.open(primary, backup=backup) as store:
        for step in range(2):
            store.save(state(step), step=step, durable="backup")
        store.delete("step:0")
        store.prune(grace_s=0)
        store.prune(grace_s=0)
        assert [c.step for c in store.checkpoints()] == [1]


def test_what_the_backup_buried_is_not_copied_again(primary: Path, backup: Path) -> None:
    with cs.open(primary, backup=backup) as store:
        store.save(state(0), step=0)
    with cs.open(backup, shared=True) as copy:
        copy.delete("step:0")

    with cs.open(primary, backup=backup) as store:
        store.save(state(1), step=1)

    assert steps(backup) == [1]
    assert steps(primary) == [0, 1]


def test_a_lost_primary_is_resumed_from_the_backup_and_filled_again(primary: Path, backup: Path) -> None:
    with cs.open(primary, backup=backup) as store:
        for step in range(3):
            store.save(state(step), step=step)
    lose(primary)

    with cs.open(primary, backup=backup) as store:
        assert holds(store, "latest", 2)
        assert [c.step for c in store.checkpoints()] == [0, 1, 2]
        saved = store.save(state(3), step=3)
        assert saved.order.writer == 2

    assert steps(primary) == steps(backup) == [0, 1, 2, 3]
    assert objects(primary, "commits") == objects(backup, "commits")
    with cs.open(primary) as store:
        assert store.verify().ok


def test_a_lost_primary_that_is_only_looked_at_stays_lost(primary: Path, backup: Path) -> None:
    with cs.open(primary, backup=backup) as store:
        store.save(state(0), step=0)
    lose(primary)

    with cs.open(primary, backup=backup, read_only=True) as store:
        assert holds(store, "latest", 0)

    assert not primary.exists()


def test_a_lost_commit_record_comes_from_the_backup(primary: Path, backup: Path) -> None:
    """One checkpoint that is missed, and not all: the newest is still the newest."""
    with cs.open(primary, backup=backup) as store:
        saved = [store.save(state(step), step=step) for step in range(3)]
    (primary / layout.commit_key(saved[2].order)).unlink()

    with cs.open(primary, backup=backup) as store:
        assert holds(store, "latest", 2)

    assert steps(primary) == [0, 1, 2]


def test_a_damaged_commit_record_comes_from_the_backup(primary: Path, backup: Path) -> None:
    with cs.open(primary, backup=backup) as store:
        saved = [store.save(state(step), step=step) for step in range(2)]
    flip(primary / layout.commit_key(saved[1].order), 100)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with cs.open(primary, backup=backup) as store:
            assert holds(store, "latest", 1)

    with cs.open(primary) as store:
        assert store.verify().ok


def test_a_damaged_block_is_read_from_the_backup_and_repaired(primary: Path, backup: Path) -> None:
    with cs.open(primary, backup=backup) as store:
        saved = store.save(state(0), step=0)
    flip(data_file(primary, saved.id), 9000)

    repaired = pytest.warns(cs.DamageWarning, match=r"came from a backup, and it is repaired")
    with cs.open(primary, backup=backup) as store, repaired:
        assert holds(store, "latest", 0)

    with cs.open(primary) as store:
        assert store.verify().ok


def test_a_backup_of_another_store_is_refused(primary: Path, backup: Path) -> None:
    for place in (primary, backup):
        with cs.open(place) as store:
            store.save(state(0), step=0)

    with cs.open(primary, backup=backup) as store:
        with pytest.raises(cs.StorageError, match="holds another store"):
            store.load()
        with pytest.raises(cs.SaveFailedError, match="holds another store"):
            store.save(state(1), step=1)


def test_what_can_t_be_is_said_before_anything_is_written(primary: Path, backup: Path) -> None:
    with pytest.raises(cs.FormatError, match="given twice"):
        cs.open(primary, backup=primary)
    with pytest.raises(cs.FormatError, match="backup=URL"):
        cs.open(primary, durable="backup")
    with pytest.raises(cs.FormatError, match="'primary' or 'backup'"):
        cs.open(primary, backup=backup, durable="both")  # type: ignore[arg-type]
    with pytest.raises(cs.FormatError, match="lies in the backup"):
        cs.open(primary, backup=backup, keep=cs.last(2), trash="1h")
    with cs.open(primary) as store, pytest.raises(cs.FormatError, match="backup=URL"):
        store.save(state(0), step=0, durable="backup")
    assert not primary.exists()


def test_several_processes_may_share_a_store_and_its_backup(primary: Path, backup: Path) -> None:
    with cs.open(primary, backup=backup, shared=True) as one, cs.open(primary, backup=backup, shared=True) as other:
        for step in range(4):
            (one, other)[step % 2].save(state(step), step=step, durable="backup")

    assert steps(primary) == steps(backup) == [0, 1, 2, 3]


def test_a_copy_on_its_way_is_no_leftover(primary: Path, backup: Path) -> None:
    """Whoever prunes the backup meanwhile must not condemn it: its id is an older writer's."""
    with cs.open(primary) as store:
        saved = store.save(state(0), step=0)
    with cs.open(backup, shared=True) as copy:
        copy.save(state(1), step=1)
        copy.save(state(2), step=2)
    # Begun by somebody, and not finished.
    (backup / "copying").mkdir()
    marker = backup / layout.copying_key(saved.order)
    marker.write_bytes(b"{}")
    folder = backup / "checkpoints" / saved.id
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"half")

    with cs.open(backup) as copy:
        assert copy.prune().spared == [saved.id]
        assert folder.exists()
        assert saved.id in copy.prune(grace_s=0).leftovers
    assert not folder.exists()
