"""Runs that are killed or stopped at any moment while another one takes over: what was acknowledged stays."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.forked import CONTEXT, preload
from tests.integrity.stores import FolderRaw, flat, opened, silence
from tests.tiers.running import content, run
from tests.tiers.scenes import opened_with, tidy

preload("tests.tiers.running")
HANG_S = 120.0


@dataclass
class Run:
    """One process that saves, and what it told.

    Attributes:
        saved: what it was told to be saved, by id: its step.
        resumed: what it began with.
    """

    number: int
    process: Any
    pipe: Any
    saved: dict[str, int] = field(default_factory=dict)
    resumed: Any = None
    began: int = 0
    error: str | None = None
    closed: bool = False

    def listen(self, timeout: float = 0.0) -> bool:
        """Hear what it tells; False where there was nothing."""
        if not self.pipe.poll(timeout):
            return False
        try:
            what, *more = self.pipe.recv()
        except (EOFError, OSError):
            # Killed in the midst of telling.
            return False
        if what == "resumed":
            self.resumed = more[0]
        elif what == "began":
            self.began = more[0]
        elif what == "saved":
            self.saved[more[0]] = more[1]
        elif what == "error":
            self.error = more[0]
        else:
            self.closed = True
        return True

    def until_saved(self, count: int) -> None:
        end = time.monotonic() + HANG_S
        while len(self.saved) < count:
            self.listen(0.1)
            assert self.error is None, self.error
            assert time.monotonic() < end, "it doesn't save"

    def kill(self, how: signal.Signals) -> None:
        os.kill(self.process.pid, how)
        if how == signal.SIGKILL:
            self.process.join(HANG_S)
        while self.listen():
            pass

    def goes_on(self) -> None:
        """Wake it up, and hear how it ends."""
        os.kill(self.process.pid, signal.SIGCONT)
        end = time.monotonic() + HANG_S
        while self.error is None:
            assert time.monotonic() < end, "nothing stops it"
            self.listen(0.1)

    def ends(self) -> None:
        """Have it save no more, and close its store."""
        self.pipe.send("end")
        end = time.monotonic() + HANG_S
        while not self.closed:
            assert time.monotonic() < end, "closing hangs"
            self.listen(0.1)
        self.pipe.send("exit")
        self.process.join(HANG_S)


@contextmanager
def started(url: Path, backup: Path, number: int, first: int, durable: str, keep: int | None) -> Iterator[Run]:
    ours, theirs = CONTEXT.Pipe()
    args = (str(url), str(backup), number, first, durable, keep, theirs)
    process = CONTEXT.Process(target=run, args=args, daemon=True)
    process.start()
    theirs.close()
    try:
        yield Run(number, process, ours)
    finally:
        process.kill()
        process.join(HANG_S)
        ours.close()


@dataclass
class Story:
    """What happened in one round."""

    old: Run
    new: Run
    old_place: Path
    new_place: Path
    backup: Path
    durable: str

    def acknowledged(self) -> dict[str, dict[str, bytes]]:
        return {id: content(one.number, step) for one in (self.old, self.new) for id, step in one.saved.items()}

    def check(self) -> None:
        """Nothing that was acknowledged is lost, ``latest`` is the new run's everywhere, and all is whole."""
        wanted = self.acknowledged()
        newest = max(self.new.saved)
        with opened_with(FolderRaw(self.new_place), FolderRaw(self.backup)) as store, silence():
            assert store.resolve("latest").id == newest
            there = {checkpoint.id for checkpoint in store.checkpoints()}
            for id, tensors in wanted.items():
                if self.durable == "backup" or id in self.new.saved or self.old_place == self.new_place:
                    assert id in there, f"{id} was acknowledged and is lost"
                    assert flat(store.load(id)) == tensors
        for place in {self.old_place, self.new_place, self.backup}:
            with opened(str(place), read_only=True) as store, silence():
                report = store.verify()
                assert report.ok, report.damages
                assert not report.foreign
                if place != self.old_place or place == self.new_place:
                    assert store.resolve("latest").id == newest
                else:
                    # It never heard of the new run; it just stopped.
                    assert store.checkpoints()[-1].id in {*self.old.saved, *self._unheard(store)}
        with opened(str(self.backup), read_only=True) as store:
            there = {checkpoint.id for checkpoint in store.checkpoints()}
        if self.durable == "backup":
            assert set(wanted) <= there
        for place in {self.new_place, self.backup}:
            tidy(FolderRaw(place))
        with opened(str(self.backup), read_only=True) as store:
            assert {checkpoint.id for checkpoint in store.checkpoints()} == there

    def _unheard(self, store: Any) -> list[str]:
        """What it saved in the moment in which it was stopped, and couldn't tell any more."""
        return [c.id for c in store.checkpoints() if c.step == self.old.began]


def play(tmp_path: Path, seed: int, how: signal.Signals) -> Story:
    choose = random.Random(f"{seed} {how}")
    elsewhere, durable = bool(seed % 2), choose.choice(["primary", "backup"])
    keep = choose.choice([None, 2])
    old_place, backup = tmp_path / "old", tmp_path / "backup"
    new_place = tmp_path / "new" if elsewhere else old_place
    with started(old_place, backup, 1, 1, durable, keep) as old:
        old.until_saved(choose.randrange(1, 4))
        time.sleep(choose.random() * 0.05)
        old.kill(how)
        with started(new_place, backup, 2, old.began + 1, durable, keep) as new:
            new.until_saved(3)
            known = [content(1, step) for step in range(1, old.began + 1)]
            if new.resumed is None:
                # On another machine, and nothing had been copied yet.
                assert elsewhere
                assert durable == "primary"
            else:
                assert new.resumed in known
            if durable == "backup" or not elsewhere:
                assert new.resumed in known[-2:], "it resumed from an older one than was acknowledged"
            before = dict(new.saved)
            if how == signal.SIGSTOP:
                old.goes_on()
                assert old.error == "StaleWriterError"
                # One more at most: that which was on its way when it was stopped.
                assert set(old.saved.values()) <= set(range(1, old.began + 1))
                old.ends()
            new.until_saved(len(before) + 1)
            new.ends()
    story = Story(old, new, old_place, new_place, backup, durable)
    story.check()
    return story


SEEDS = [pytest.param(seed, marks=pytest.mark.full if seed >= 2 else ()) for seed in range(30)]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_run_is_replaced(tmp_path: Path, how: signal.Signals, seed: int) -> None:
    story = play(tmp_path, seed, how)
    assert story.old.saved
    assert len(story.new.saved) >= 4


def test_a_zombie_that_shares_only_the_backup_lets_nothing_go(tmp_path: Path) -> None:
    """It keeps two of its own and would let go more; it has been replaced, so it touches nothing, closing included."""
    old_place, new_place, backup = tmp_path / "old", tmp_path / "new", tmp_path / "backup"
    with started(old_place, backup, 1, 1, "backup", None) as old:
        old.until_saved(3)
        old.kill(signal.SIGSTOP)
        with started(new_place, backup, 2, 100, "backup", None) as new:
            new.until_saved(2)
            with opened(str(old_place), read_only=True) as store:
                before = {checkpoint.id for checkpoint in store.checkpoints()}
            old.goes_on()
            assert old.error == "StaleWriterError"
            old.ends()
            new.ends()
    with opened(str(old_place), read_only=True) as store:
        after = {checkpoint.id for checkpoint in store.checkpoints()}
    assert before <= after
    assert not [key for key in FolderRaw(old_place).listing() if key.startswith("trash/")]
    with opened(str(backup), read_only=True) as store:
        assert store.resolve("latest").id == max(new.saved)
        assert set(old.saved) | set(new.saved) <= {checkpoint.id for checkpoint in store.checkpoints()}
