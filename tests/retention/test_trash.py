"""What the rules let go of and what stays, where the two have a limit together."""

from __future__ import annotations

from pathlib import Path

import torch

import ckptstore as cs
from ckptstore.engine.finder import Finder
from ckptstore.storage.local import LocalStorage


def save(store: cs.Store, step: int) -> cs.Checkpoint:
    return store.save({"x": torch.full((8,), step)}, step=step, epoch=step // 5)


def one_bytes() -> int:
    with cs.open("memory://one-of-the-trash") as store:
        return save(store, 0).stored_bytes


SIZE = one_bytes()


def steps(store: cs.Store) -> list[int]:
    return [c.step for c in store.checkpoints()]


def buried(path: Path) -> list[int]:
    return [c.step for c in Finder(LocalStorage(path), read_only=False).scan().buried]


def test_without_a_limit_all_of_it_stays_for_a_while(tmp_path: Path) -> None:
    with cs.open(tmp_path, keep=cs.last(2), trash="1h") as store:
        for step in range(6):
            save(store, step)
        assert steps(store) == [4, 5]
    assert buried(tmp_path) == [0, 1, 2, 3]


def test_it_makes_room_within_a_limit(tmp_path: Path) -> None:
    """And never the other way round: as many stay as if there were no trash, and all together is within the limit."""
    keep = cs.last(2) | cs.epochs() | cs.at_most(6 * SIZE)
    with cs.open(tmp_path, keep=keep, trash="1h") as store:
        for step in range(21):
            save(store, step)
            assert len(steps(store)) == min(step + 1, 6)
            assert len(steps(store)) + len(buried(tmp_path)) <= 6
        assert {5, 10, 15, 19, 20} <= set(steps(store))


def test_what_a_person_deleted_counts(tmp_path: Path) -> None:
    """As long as it can be brought back; it isn't reclaimed for lack of room."""
    with cs.open(tmp_path) as store:
        for step in range(5):
            save(store, step)
        store.delete("step:3")
        store.delete("step:4")
    for step in (5, 6):
        with cs.open(tmp_path, keep=cs.at_most(4 * SIZE), trash="1h") as store:
            save(store, step)
            assert len(steps(store)) == 2
            assert steps(store)[-1] == step
        assert buried(tmp_path) == [3, 4]
