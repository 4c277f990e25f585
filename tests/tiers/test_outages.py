"""A backup that is away, hangs, or fails: saves go on, copies are made later, and nothing is taken for empty."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ckptstore.engine import backups as backups_module
from ckptstore.engine.facts import Facts
from ckptstore.engine.saver import Job
from ckptstore.errors import (
    CheckpointError,
    NoCheckpointError,
    SaveFailedError,
    StaleWriterError,
    StorageError,
    StorageFullError,
    UnavailableError,
)
from ckptstore.maintenance import replicate, retainer
from ckptstore.maintenance.evict import evict
from ckptstore.policy.rules import last
from ckptstore.store import Store
from tests.integrity.stores import Raw, Tensors, flat, opened, silence, state
from tests.tiers.scenes import Hooked, folder, hook_backups, loads, memory, opened_with, tidy, whole_alone

HANG_S = 60.0
"""Whoever waits so long hangs."""


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backups_module, "GLANCE_S", 0.05)
    monkeypatch.setattr(replicate, "_PAUSE_S", (0.01, 0.02))


@pytest.fixture(params=["memory", "folder"])
def two(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Raw, Raw]:
    if request.param == "memory":
        return memory(), memory()
    return folder(tmp_path / "primary"), folder(tmp_path / "backup")


class Outage:
    """What is wrong with a backup: nothing, it refuses, or it never answers. Hooked into each of its calls.

    Attributes:
        fired: how many calls it met.
        commits: the commit records that were written there, in order.
    """

    def __init__(self, only: Callable[[str, str], bool] = lambda call, key: True) -> None:
        self.error: CheckpointError | None = None
        self.answers = threading.Event()
        self.answers.set()
        self.hit = threading.Event()
        self.fired, self.commits, self.only = 0, list[str](), only

    def __call__(self, call: str, key: str) -> None:
        if self.only(call, key):
            if not self.answers.is_set():
                self._meet()
                assert self.answers.wait(HANG_S), "never released"
            if self.error is not None:
                self._meet()
                raise self.error
        if call == "create" and key.startswith("commits/"):
            self.commits.append(key.removeprefix("commits/").removesuffix(".json"))

    def _meet(self) -> None:
        self.fired += 1
        self.hit.set()

    def refuse(self, error: CheckpointError | None = None) -> None:
        self.error = error or UnavailableError("no route to it", transient=True)

    def hang(self) -> None:
        self.answers.clear()

    def end(self) -> None:
        self.error = None
        self.answers.set()
        self.hit.clear()


@contextmanager
def watched(outage: Outage, primary: Raw, backup: Raw, **options: Any) -> Iterator[Store]:
    """A store whose backup has ``outage``, which is over when the block ends."""
    with opened_with(primary, backup, **options) as store:
        hook_backups(store, outage)
        try:
            yield store
        finally:
            outage.end()


def until(holds: Callable[[], object]) -> None:
    end = time.monotonic() + HANG_S
    while not holds():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.002)


def content(step: int) -> Tensors:
    return {"model/w": b"%d " % step * 1000, "optimizer/m": b"m%d" % step}


def save(store: Store, step: int, *, durable: Any = "primary") -> str:
    """Save past ``capture``; the id."""

    return store._dispatcher.save(Job(state(content(step)), Facts(step, None, {}, {}, []), durable)).id


def has(raw: Raw, id: str) -> bool:
    # Not by a listing, which folders that come and go would disturb.
    try:
        return bool(raw.get(f"commits/{id}.json"))
    except (KeyError, FileNotFoundError):
        return False


def told(caplog: pytest.LogCaptureFixture, text: str = "") -> list[str]:
    return [one.message for one in caplog.records if one.levelno >= logging.WARNING and text in one.message]


# --- saves go on ---


@pytest.mark.parametrize("how", ["refuse", "hang"])
def test_an_outage(two: tuple[Raw, Raw], how: str, caplog: pytest.LogCaptureFixture) -> None:
    """Told once each time, not at each save; what was missed is copied in order."""
    primary, backup = two
    outage, wanted = Outage(), {}
    with watched(outage, primary, backup) as store:
        wanted[save(store, 1, durable="backup")] = content(1)
        step = 1
        for number in (1, 2):
            getattr(outage, how)()
            for _ in range(3):
                step += 1
                # Acknowledged while the backup is away.
                id = save(store, step)
                wanted[id] = content(step)
                assert has(primary, id)
                assert not has(backup, id)
            until(lambda: outage.fired)
            away = [text for text in told(caplog) if "can't be reached" in text or "copying to the backup" in text]
            assert len(away) == number, away
            outage.end()
            until(lambda: all(has(backup, id) for id in wanted))
            until(lambda number=number: len(told(caplog, "is reached again")) == number)
            outage.fired = 0
        save_ids = sorted(wanted)
        assert outage.commits == save_ids
    assert whole_alone(wanted, backup) == set(wanted)
    assert whole_alone(wanted, primary) == set(wanted)


def test_a_hanging_backup_is_waited_for_once() -> None:
    """The second save doesn't even ask it."""
    primary, backup = memory(), memory()
    outage = Outage()
    with watched(outage, primary, backup) as store:
        save(store, 1, durable="backup")
        outage.hang()
        save(store, 2)
        backup_object = store._finder.backups.all[0]
        assert not backup_object.reachable
        until(lambda: outage.fired)
        before = outage.fired
        save(store, 3)
        # One call more at most: the copying thread's own.
        assert outage.fired <= before + 1


@pytest.mark.parametrize("error", [StorageError("403 Forbidden"), UnavailableError("503", transient=True)])
def test_whatever_is_wrong_there_saves_go_on(error: StorageError) -> None:
    primary, backup = memory(), memory()
    outage, wanted = Outage(), {}
    with watched(outage, primary, backup) as store:
        wanted[save(store, 1, durable="backup")] = content(1)
        outage.refuse(error)
        wanted[save(store, 2)] = content(2)
        assert flat(store.load("latest")) == content(2)
        assert outage.fired
        outage.end()
        until(lambda: all(has(backup, id) for id in wanted))
    whole_alone(wanted, backup)


def test_away_when_a_run_begins() -> None:
    """The primary has checkpoints, so that nothing is needed of the backup."""
    primary, backup = memory(), memory()
    wanted = {}
    with opened_with(primary, backup) as store:
        wanted[save(store, 1)] = content(1)
    outage = Outage()
    with watched(outage, primary, backup) as store:
        outage.refuse()
        assert flat(store.load("latest")) == content(1)
        wanted[save(store, 2)] = content(2)
        assert outage.fired
        outage.end()
        until(lambda: all(has(backup, id) for id in wanted))
        save(store, 3, durable="backup")


@pytest.mark.parametrize("call", ["open_writer", "write", "finish", "create", "read", "size", "list"])
def test_fails_in_the_midst_of_a_copy(two: tuple[Raw, Raw], call: str) -> None:
    """Again and again, each time one call of a kind later: the copy is taken up where it ended."""
    primary, backup = two
    wanted, failed = {}, list[str]()
    seen = allowed = 0

    def sometimes(name: str, key: str) -> None:
        nonlocal seen, allowed
        copying = threading.current_thread().name.startswith("ckptstore-")
        if name != call or not copying or threading.current_thread().name == "ckptstore-ask":
            return
        seen += 1
        if seen > allowed:
            seen, allowed = 0, allowed + 1
            failed.append(key)
            raise UnavailableError(f"{name} {key}: the connection was lost", transient=True)

    with opened_with(primary, backup) as store:
        wanted[save(store, 1, durable="backup")] = content(1)
        hook_backups(store, sometimes)
        for step in (2, 3):
            wanted[save(store, step)] = content(step)
        until(lambda: all(has(backup, id) for id in wanted))
    assert len(failed) >= 3
    assert whole_alone(wanted, backup) == set(wanted)
    tidy(backup)
    assert whole_alone(wanted, backup) == set(wanted)


# --- acknowledged when the backup has it ---


def test_durable_in_the_backup_fails_and_is_made_up_for() -> None:
    primary, backup = memory(), memory()
    outage, wanted = Outage(), {}
    with watched(outage, primary, backup) as store:
        wanted[save(store, 1, durable="backup")] = content(1)
        outage.refuse()
        with pytest.raises(UnavailableError, match="copied later"):
            save(store, 2, durable="backup")
        id = opened(primary.url).resolve("step:2").id
        wanted[id] = content(2)
        assert outage.fired
        assert not has(backup, id)
        outage.end()
        until(lambda: has(backup, id))
        wanted[save(store, 3, durable="backup")] = content(3)
        assert whole_alone(wanted, backup) == set(wanted)


def test_in_the_background_too() -> None:
    torch = pytest.importorskip("torch")
    primary, backup = memory(), memory()
    outage = Outage()
    with watched(outage, primary, backup, durable="backup") as store:
        store.save({"model": {"w": torch.ones(3)}}, step=1)
        outage.refuse()
        handle = store.save({"model": {"w": torch.ones(3)}}, step=2, mode="async")
        with pytest.raises(UnavailableError):
            handle.wait()
        assert outage.fired


def test_deleted_while_it_is_waited_for() -> None:
    """Nobody waits for ever for what won't be copied."""
    primary, backup = memory(), memory()
    outage = Outage(lambda call, key: threading.current_thread().name == "ckptstore-backup")
    errors: list[BaseException] = []

    def work(store: Store) -> None:
        try:
            save(store, 2, durable="backup")
        except CheckpointError as error:
            errors.append(error)

    with watched(outage, primary, backup) as store:
        save(store, 1, durable="backup")
        outage.hang()
        thread = threading.Thread(target=work, args=[store])
        thread.start()
        assert outage.hit.wait(HANG_S)
        deleted = store.delete("step:2").id
        outage.end()
        thread.join(HANG_S)
        assert not thread.is_alive()
    assert len(errors) <= 1
    assert bool(errors) != has(backup, deleted)


def test_condemned_in_the_backup_while_it_is_waited_for() -> None:
    primary, backup = memory(), memory()
    outage = Outage(lambda call, key: call == "create" and key.startswith("commits/"))
    with watched(outage, primary, backup) as store:
        save(store, 1, durable="backup")
        outage.refuse()
        with pytest.raises(UnavailableError):
            save(store, 2, durable="backup")
        # Somebody takes what was copied in part for what a dead save left.
        with opened(backup.url) as other:
            assert other.prune(grace_s=0).leftovers
        outage.end()
        save(store, 3, durable="backup")
        id = store.resolve("step:2").id
        with pytest.raises((SaveFailedError, StorageError)):
            store._replicators[0].wait_for(id)
    assert outage.fired


def test_making_room_waits_for_no_save_that_waits_for_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room is made by the thread that copies; a save that waits for its copy must not keep it from that."""
    primary, backup = memory(), memory()
    saving, making = threading.Event(), threading.Event()

    def slow(*args: Any) -> list[str]:
        if len([key for key in primary.listing() if key.startswith("commits/")]) > 1:
            making.set()
            assert saving.wait(HANG_S)
        return evict(*args)

    def on_read() -> None:
        assert making.wait(HANG_S)
        saving.set()

    with opened_with(primary, backup, keep=last(1), durable="backup") as store:
        monkeypatch.setattr(retainer, "evict", slow)
        save(store, 1)
        save(store, 2)
        store._dispatcher.save(Job(state(content(3), on_read=on_read), Facts(3, None, {}, {}, []), "backup"))
        assert saving.is_set()
    assert len([key for key in primary.listing() if key.startswith("commits/")]) == 1
    assert len([key for key in backup.listing() if key.startswith("commits/")]) == 3


def test_a_commit_there_of_which_nothing_is_known_is_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    """The request was lost, and so was the question whether it was."""
    primary, backup = memory(), memory()
    lost: list[str] = []

    def lose(call: str, key: str) -> None:
        # Its creation, and the first look at it after that.
        if key.startswith("commits/") and (call == "create" or lost) and len(lost) < 2 and call != "list":
            lost.append(call)
            raise UnavailableError("the connection was lost", transient=True, outcome="unknown")

    with opened_with(primary, backup) as store:
        save(store, 1, durable="backup")
        hook_backups(store, lose)
        id = save(store, 2)
        until(lambda: has(backup, id))
        save(store, 3, durable="backup")
    assert lost == ["create", "read"]
    assert not [one for one in caplog.records if one.levelno >= logging.ERROR]


def test_interrupted_while_it_waits() -> None:
    """Ctrl-C: what was saved is saved, and the store goes on."""
    primary, backup = memory(), memory()
    outage = Outage(lambda call, key: threading.current_thread().name == "ckptstore-backup")
    wanted = {}
    with watched(outage, primary, backup) as store:
        wanted[save(store, 1, durable="backup")] = content(1)
        outage.hang()

        def press() -> None:
            assert outage.hit.wait(HANG_S)
            until(lambda: store._replicators[0]._waiting)
            os.kill(os.getpid(), signal.SIGINT)

        presser = threading.Thread(target=press)
        presser.start()
        with pytest.raises(KeyboardInterrupt):
            save(store, 2, durable="backup")
        presser.join()
        wanted[store.resolve("step:2").id] = content(2)
        wanted[save(store, 3)] = content(3)
        outage.end()
        wanted[save(store, 4, durable="backup")] = content(4)
    assert whole_alone(wanted, backup) == set(wanted)


# --- the end of a run ---


def test_closing_without_the_backup(caplog: pytest.LogCaptureFixture) -> None:
    primary, backup = memory(), memory()
    outage = Outage()
    store = opened_with(primary, backup)
    hook_backups(store, outage)
    first = save(store, 1, durable="backup")
    outage.refuse()
    second = save(store, 2)
    until(lambda: outage.fired)
    store.close()
    store.close()
    assert len(told(caplog, "lacks checkpoints")) == 1
    assert has(backup, first)
    assert not has(backup, second)
    # The next run makes up for it.
    with opened_with(primary, backup) as store:
        third = save(store, 3)
    assert whole_alone({first: content(1), second: content(2), third: content(3)}, backup) == {first, second, third}


# --- nothing is taken for what it isn't ---


def test_a_foreign_store_is_refused() -> None:
    primary, backup = memory(), memory()
    for raw in (primary, backup):
        with opened(raw.url) as store:
            save(store, 1)
    before = dict(backup.objects)
    with opened_with(primary, backup) as store:
        for action in (lambda: store.load("latest"), store.checkpoints, lambda: save(store, 2)):
            with pytest.raises(CheckpointError, match="another store") as caught:
                action()
            assert isinstance(caught.value, StorageError | SaveFailedError)
    assert dict(backup.objects) == before


@pytest.mark.parametrize("order", ["only", "first", "last"])
@pytest.mark.parametrize("how", ["refuse", "hang"])
def test_lost_primary_and_a_backup_that_is_away(order: str, how: str) -> None:
    """Never a fresh start, and never an older checkpoint than there is."""
    primary, lost = memory(), memory()
    backups = {"only": [memory()], "first": [memory(), memory()], "last": [memory(), memory()]}[order]
    with opened_with(primary, *backups) as store:
        save(store, 1)
    outage = Outage()
    with opened_with(lost, *backups) as store:
        away = store._finder.backups.all[-1 if order == "last" else 0]
        away.storage = Hooked(away.storage, outage)
        getattr(outage, how)()
        for action in (lambda: store.load("latest"), store.checkpoints, store.resolve):
            with pytest.raises(UnavailableError) as caught:
                action()
            assert not isinstance(caught.value, NoCheckpointError)
        with pytest.raises(SaveFailedError) as failed:
            save(store, 2)
        assert isinstance(failed.value.__cause__, UnavailableError)
        assert outage.fired
        outage.end()
        assert flat(store.load("latest")) == content(1)
    assert len([key for key in lost.listing() if key.startswith("commits/")]) == 1


# --- who may save ---


class LateAnswers(Hooked):
    """What is created is there, and the answer is lost, the first time for each key."""

    def __init__(self, inner: Any, only: str) -> None:
        super().__init__(inner, lambda call, key: None)
        self.only, self.lost = only, set[str]()

    def create(self, key: str, data: bytes) -> None:
        super().create(key, data)
        if key.startswith(self.only) and key not in self.lost:
            self.lost.add(key)
            raise UnavailableError("the answer was lost", transient=True, outcome="unknown")


@pytest.mark.parametrize("only", ["writers/", "store.json", "commits/", "checkpoints/", "copying/"])
def test_a_lost_answer_makes_nobody_a_stranger(only: str, caplog: pytest.LogCaptureFixture) -> None:
    primary, backup = memory(), memory()
    wanted = {}
    with opened_with(primary, backup) as store:
        late = LateAnswers(store._finder.backups.all[0].storage, only)
        store._finder.backups.all[0].storage = late
        try:
            wanted[save(store, 1)] = content(1)
        except SaveFailedError:
            # Before there was a claim: the caller saves again.
            wanted[save(store, 1)] = content(1)
        wanted[save(store, 2)] = content(2)
        until(lambda: all(has(backup, id) for id in wanted))
        late.only = "nothing"
        wanted[save(store, 3, durable="backup")] = content(3)
    assert late.lost
    assert not told(caplog, "nothing more is copied")
    assert whole_alone(wanted, backup) == set(wanted)


def test_two_runs_with_swapped_roles(two: tuple[Raw, Raw]) -> None:
    """One store, whichever place is called the backup: the older run is told at its next save."""
    left, right = two
    wanted = {}
    with opened_with(left, right) as first, opened_with(right, left) as second:
        wanted[save(first, 1, durable="backup")] = content(1)
        wanted[save(second, 2, durable="backup")] = content(2)
        with pytest.raises(StaleWriterError):
            save(first, 3)
        assert flat(first.load("latest")) == content(2)
        assert flat(second.load("latest")) == content(2)
    for raw in two:
        assert whole_alone(wanted, raw) == set(wanted)
        tidy(raw)
        assert whole_alone(wanted, raw) == set(wanted)


def test_another_run_took_the_same_number_in_the_backup() -> None:
    """While this one couldn't reach it: its next save says so, though it is no newer."""
    primary, elsewhere, backup = memory(), memory(), memory()
    with opened_with(primary, backup) as store:
        save(store, 1)
    outage = Outage()
    with watched(outage, primary, backup) as store:
        outage.refuse()
        ours = save(store, 2)
        with opened_with(elsewhere, backup) as other:
            theirs = save(other, 3, durable="backup")
        assert ours[:4] == theirs[:4]
        outage.end()
        until(lambda: store._replicators[0]._stale)
        with pytest.raises(StaleWriterError):
            save(store, 4)
    assert not has(backup, ours)
    assert has(backup, theirs)


def test_receipts_need_no_room_here() -> None:
    """A full primary is when room has to be made, by what the backup has."""
    primary, backup = memory(), memory()
    refused: list[str] = []

    def full(call: str, key: str) -> None:
        if call == "create" and key.startswith("receipts/"):
            refused.append(key)
            raise StorageFullError("no space left")

    with opened_with(primary, backup, keep=last(1)) as store:
        replicator = store._replicators[0]
        replicator._storage = Hooked(replicator._storage, full)
        for step in (1, 2, 3):
            save(store, step, durable="backup")
    assert refused
    assert len([key for key in primary.listing() if key.startswith("commits/")]) == 1
    assert len([key for key in backup.listing() if key.startswith("commits/")]) == 3


def test_one_backup_that_hangs_keeps_no_other_waiting() -> None:
    primary, good, bad = memory(), memory(), memory()
    outage, ids = Outage(), []
    with opened_with(primary, good, bad, keep=last(1)) as store:
        hanging = store._finder.backups.all[1]
        hanging.storage = Hooked(hanging.storage, outage)
        ids.append(save(store, 1, durable="backup"))
        outage.hang()
        try:
            for step in (2, 3, 4):
                ids.append(save(store, step))
                until(lambda: has(good, ids[-1]))
            assert outage.fired
            assert all(has(primary, id) for id in ids[1:])
        finally:
            outage.end()
    assert all(has(bad, id) for id in ids)


# --- forks ---


def in_fork(work: Callable[[], object]) -> int:
    """What ``work`` ends with in a fork: 0 if well; it is ended where it hangs."""
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(30)
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_fork_while_something_is_copied(tmp_path: Path) -> None:
    """The child reads, from the backup too, repairs nothing in the background, and never hangs; the parent goes on."""
    primary, backup = folder(tmp_path / "primary"), folder(tmp_path / "backup")
    wanted = {}
    outage = Outage(lambda call, key: threading.current_thread().name == "ckptstore-backup")
    with watched(outage, primary, backup) as store:
        wanted[save(store, 1, durable="backup")] = content(1)
        [first] = wanted
        # Only the backup has it now, so that the child would bring it back.
        primary.remove(f"commits/{first}.json")
        outage.hang()
        wanted[save(store, 2)] = content(2)
        assert outage.hit.wait(HANG_S)
        held, done = threading.Event(), threading.Event()

        def hold() -> None:
            with store._replicators[0]._changed:
                held.set()
                done.wait(HANG_S)

        holder = threading.Thread(target=hold)
        holder.start()
        assert held.wait(HANG_S)

        def child() -> None:
            with silence():
                assert flat(store.load(first)) == content(1)
                with pytest.raises(StaleWriterError):
                    store.save({}, step=3)
                store.close()

        status = in_fork(child)
        done.set()
        holder.join()
        assert status == 0
        outage.end()
        wanted[save(store, 4, durable="backup")] = content(4)
    assert whole_alone(wanted, backup) == set(wanted)
    loads(wanted, primary, backup)
