"""A small and fast primary keeps the newest, the backups keep all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import ckptstore as cs
from tests.tiers.places import data_file, holds, state, steps


def test_the_newest_stay_here_and_all_are_there(primary: Path, backup: Path) -> None:
    with cs.open(primary, backup=backup, keep=cs.last(2)) as store:
        for step in range(5):
            store.save(state(step), step=step)

    assert steps(primary) == [3, 4]
    assert steps(backup) == [0, 1, 2, 3, 4]
    assert len(list((primary / "checkpoints").iterdir())) == 2
    assert not list((primary / "trash").glob("*.json"))


def test_what_was_let_go_is_found_and_loaded_as_before(primary: Path, backup: Path) -> None:
    with cs.open(primary, backup=backup, keep=cs.last(1)) as store:
        for step in range(4):
            store.save(state(step), step=step, durable="backup")
    with cs.open(primary, backup=backup, keep=cs.last(1)) as store:
        assert [c.step for c in store.checkpoints()] == [0, 1, 2, 3]
        assert holds(store, "step:1", 1)
        with pytest.raises(cs.NotFoundError, match="lies only in the backup"):
            store.delete("step:1")
        with pytest.raises(cs.NotFoundError, match="lies only in the backup"):
            store.hold("step:1", "mine")

    assert steps(primary) == [3]


def test_nothing_goes_before_every_backup_has_it(primary: Path, tmp_path: Path) -> None:
    """One of two backups has lost a file: what it should have stays here."""
    one, two = tmp_path / "one", tmp_path / "two"
    with cs.open(primary, backup=[one, two]) as store:
        saved = [store.save(state(step), step=step) for step in range(3)]
    data_file(two, saved[0].id).unlink()

    with cs.open(primary, backup=[one, two], keep=cs.last(1)) as store:
        store.save(state(3), step=3)

    assert steps(primary) == [0, 3]


def test_held_ones_stay(primary: Path, backup: Path) -> None:
    with cs.open(primary, backup=backup) as store:
        store.save(state(0), step=0)
        store.hold("step:0", "release")
    with cs.open(primary, backup=backup, keep=cs.last(1)) as store:
        for step in (1, 2):
            store.save(state(step), step=step)

    assert steps(primary) == [0, 2]


def test_what_others_borrow_from_stays(primary: Path, backup: Path) -> None:
    frozen = torch.nn.Linear(50, 50).requires_grad_(False)
    with cs.open(primary, backup=backup, keep=cs.last(1)) as store:
        for step in range(4):
            store.save({"frozen": frozen, **state(step)}, step=step)

    assert steps(primary) == [0, 3]
    with cs.open(primary) as store:
        assert store.verify().ok
        assert torch.equal(store.load()["frozen"]["weight"], frozen.weight)
        report = store.prune(grace_s=0)
        assert (list(report.leftovers), list(report.reclaimed)) == ([], [])
        assert store.verify().ok


def test_a_lost_primary_gets_back_only_what_it_keeps(primary: Path, backup: Path) -> None:
    with cs.open(primary, backup=backup) as store:
        for step in range(4):
            store.save(state(step), step=step)
    for place in sorted(primary.rglob("*"), reverse=True):
        place.unlink() if place.is_file() else place.rmdir()

    with cs.open(primary, backup=backup, keep=cs.last(2)) as store:
        assert holds(store, "latest", 3)

    assert steps(primary) == [2, 3]


@pytest.mark.parametrize("count", [0, -1, 1.0, True, "2"])
def test_a_rule_that_can_t_be(count: object) -> None:
    with pytest.raises(cs.FormatError, match="at least 1"):
        cs.last(count)  # type: ignore[arg-type]
