"""The store that a config describes."""

from __future__ import annotations

from pathlib import Path

import pytest

import ckptstore as cs
from ckptstore import config


def test_it_has_its_rules_and_its_backup(tmp_path: Path) -> None:
    said = {"storage": str(tmp_path / "a"), "backup": str(tmp_path / "b"), "keep": "last(1)", "durable": "backup"}
    with config.parse(said, environment={}).open() as store:
        for step in range(3):
            store.save({"x": step}, step=step)
    with cs.open(tmp_path / "a") as store:
        assert [c.step for c in store.checkpoints()] == [2]
    with cs.open(tmp_path / "b") as store:
        assert [c.step for c in store.checkpoints()] == [0, 1, 2]


def test_it_leaves_time_to_bring_back(tmp_path: Path) -> None:
    said = {"storage": str(tmp_path), "keep": "last(1)", "trash": "1h", "compression": "zstd"}
    with config.parse(said, environment={}).open() as store:
        for step in range(3):
            store.save({"x": step}, step=step)
        assert [c.step for c in store.deleted()] == [0, 1]
    with pytest.raises(cs.StorageError, match="read-only"):
        config.parse(said, environment={}).open(read_only=True).delete("latest")


def test_without_a_place() -> None:
    with pytest.raises(cs.FormatError, match="doesn't say where"):
        config.parse({"keep": "last(1)"}, environment={}).open()
