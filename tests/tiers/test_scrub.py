"""What lies there unread is read again."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import ckptstore as cs
from tests.tiers.places import data_file, flip, state


def wait_until(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_damage_is_found_and_repaired(primary: Path, backup: Path, caplog: pytest.LogCaptureFixture) -> None:
    with cs.open(primary, backup=backup) as store:
        saved = [store.save(state(step), step=step) for step in range(3)]
    good = data_file(primary, saved[0].id).read_bytes()
    flip(data_file(primary, saved[0].id), 9000)

    with caplog.at_level(logging.WARNING, "ckptstore"), cs.open(primary, backup=backup, scrub=0.5):
        wait_until(lambda: "it is repaired" in caplog.text)

    assert f"damage found while scrubbing: block 0 of checkpoints/{saved[0].id}" in caplog.text
    assert data_file(primary, saved[0].id).read_bytes() == good


def test_damage_without_a_backup_is_told_once(primary: Path, caplog: pytest.LogCaptureFixture) -> None:
    with cs.open(primary) as store:
        saved = store.save(state(0), step=0)
    flip(data_file(primary, saved.id), 9000)

    with caplog.at_level(logging.ERROR, "ckptstore"), cs.open(primary, scrub=0.05) as store:
        assert store._scrubber is not None
        scrubber = store._scrubber
        wait_until(lambda: scrubber.read_blocks > 4)

    assert caplog.text.count("no backup to repair it from") == 1


def test_each_pass_is_put_down(primary: Path, backup: Path) -> None:
    """What it found, repaired and left; a pass that isn't over is not."""

    def found() -> list[cs.Verification]:
        return cs.open(primary, read_only=True).verifications()

    with cs.open(primary, backup=backup) as store:
        saved = [store.save(state(step), step=step) for step in range(2)]
    flip(data_file(primary, saved[0].id), 9000)
    with cs.open(primary, backup=backup, scrub=0.05):
        wait_until(found)
    first = found()[-1]
    assert (first.by, first.ok, first.damages, first.repaired) == ("scrub", True, 0, 1)
    assert (first.checkpoints, first.newest, first.id, first.sample) == (2, saved[1].id, None, 1.0)
    assert first.read_bytes == sum(c.stored_bytes for c in saved)

    flip(data_file(primary, saved[0].id), 9000)
    before = found()
    with cs.open(primary, scrub="1h") as store:
        assert store._scrubber is not None
        scrubber = store._scrubber
        wait_until(lambda: scrubber.read_blocks)
    assert found() == before
    with cs.open(primary, scrub=0.05):
        wait_until(lambda: not found()[0].ok)
    assert found()[0].damages == 1


def test_nothing_is_read_while_a_save_runs_in_the_background(primary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with cs.open(primary) as store:
        store.save(state(0), step=0)
    monkeypatch.setattr("ckptstore.engine.background.Background.busy", lambda self: True)

    store = cs.open(primary, scrub=0.01)
    assert store._scrubber is not None
    time.sleep(0.3)
    assert store._scrubber.read_blocks == 0
    store._scrubber.end()


def test_a_time_that_can_t_be(primary: Path) -> None:
    for bad in ("7", "a week", -1, float("nan")):
        with pytest.raises(cs.FormatError, match=r"scrub: .* is no duration"):
            cs.open(primary, scrub=bad)  # type: ignore[arg-type]
