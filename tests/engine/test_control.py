"""Requests to a running job: asked once, seen with one listing, answered by being removed, never trusted."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from uuid import uuid4

import pytest

import ckptstore as cs
from ckptstore.engine import control
from ckptstore.errors import ExistsError, FormatError, NotFoundError, StorageError, UnavailableError
from ckptstore.format import layout
from ckptstore.storage import open_storage
from tests.integrity.stores import GOOD, FolderRaw, MemoryRaw, Raw, opened, save, state
from tests.tiers.scenes import Hooked, objects

ID = "0" * 32
SAVE, STOP = layout.control_key("save"), layout.control_key("stop")


@pytest.fixture(params=["memory", "folder"])
def raw(request: pytest.FixtureRequest, tmp_path: Path) -> Raw:
    raw = MemoryRaw(uuid4().hex) if request.param == "memory" else FolderRaw(tmp_path / "store")
    with opened(raw.url) as store:
        save(store, state(GOOD), 1)
    return raw


def test_asked_seen_and_answered(raw: Raw) -> None:
    storage = open_storage(raw.url)
    assert control.poll(storage) == []
    asked = [control.ask(storage, ID, action) for action in control.ACTIONS]
    assert control.poll(storage) == asked
    assert [request.action for request in asked] == ["save", "stop"]
    assert all(request.problem is None and request.pid for request in asked)
    assert control.answer(storage, asked[0])
    assert control.poll(storage) == asked[1:]
    assert not control.answer(storage, asked[0])
    assert control.answer(storage, asked[1])
    assert control.poll(storage) == []


def test_asking_twice_says_since_when(raw: Raw) -> None:
    """The other action is another question."""
    storage = open_storage(raw.url)
    first = control.ask(storage, ID, "save")
    with pytest.raises(ExistsError, match=f"asked to save already.*at {first.created} by process {first.pid}") as error:
        control.ask(storage, ID, "save")
    assert error.value.key == SAVE
    assert control.ask(storage, ID, "stop").action == "stop"
    assert control.answer(storage, first)
    assert control.ask(storage, ID, "save").nonce != first.nonce


def test_a_request_of_before_is_told_by_its_nonce(raw: Raw) -> None:
    """What a run found when it began is answered unheeded; the next one differs."""
    storage = open_storage(raw.url)
    control.ask(storage, ID, "stop")
    known = {request.nonce for request in control.poll(storage)}
    for request in control.poll(storage):
        assert request.nonce in known
        assert control.answer(storage, request)
    control.ask(storage, ID, "stop")
    [new] = control.poll(storage)
    assert new.nonce not in known


def test_only_the_request_that_is_meant_is_removed(raw: Raw) -> None:
    """One taken back and asked anew meanwhile stays."""
    storage = open_storage(raw.url)
    seen = control.ask(storage, ID, "save")
    assert control.answer(storage, seen)
    newer = control.ask(storage, ID, "save")
    assert not control.answer(storage, seen)
    assert control.poll(storage) == [newer]


@pytest.mark.parametrize("harm", ["flipped", "torn", "empty", "long", "another's", "newer"])
def test_a_damaged_request_asks_for_nothing(raw: Raw, harm: str, caplog: pytest.LogCaptureFixture) -> None:
    """It is reported when it is removed, once, and raises nothing."""
    storage = open_storage(raw.url)
    control.ask(storage, ID, "save")
    control.ask(storage, ID, "stop")
    good = raw.get(SAVE)
    bad = {
        "flipped": good.replace(b"0000", b"0001", 1),
        "torn": good[:40],
        "empty": b"",
        "long": good * 100,
        "another's": raw.get(STOP),
        "newer": good.replace(b'"format": 1', b'"format": 2'),
    }[harm]
    assert bad != good
    raw.put(SAVE, bad)
    damaged, stop = control.poll(storage)
    assert damaged.action == "save"
    assert damaged.problem is not None
    assert SAVE in damaged.problem
    assert stop.problem is None
    assert not caplog.records
    with pytest.raises(ExistsError, match="a damaged request lies there"):
        control.ask(storage, ID, "save")
    with caplog.at_level(logging.WARNING, "ckptstore"):
        assert control.answer(storage, damaged)
    assert [damaged.problem in record.getMessage() for record in caplog.records] == [True]
    assert control.poll(storage) == [stop]


def test_what_was_damaged_and_is_whole_now_stays(raw: Raw) -> None:
    """As where a slow storage shows a request that is just being written."""
    storage = open_storage(raw.url)
    control.ask(storage, ID, "save")
    good = raw.get(SAVE)
    raw.put(SAVE, good[:50])
    [damaged] = control.poll(storage)
    assert damaged.problem is not None
    raw.put(SAVE, good)
    assert not control.answer(storage, damaged)
    assert [request.problem for request in control.poll(storage)] == [None]


class Taken(Hooked):
    """Says that every key is taken; with ``after``, when it has just created the object itself."""

    def __init__(self, raw: Raw, *, after: bool) -> None:
        super().__init__(open_storage(raw.url), lambda name, key: None)
        self.after, self.tries = after, 0

    def create(self, key: str, data: bytes) -> None:
        self.tries += 1
        if self.after:
            self.inner.create(key, data)
        raise ExistsError("taken", key=key)


def test_a_request_that_came_twice_is_no_other_one(raw: Raw) -> None:
    """An answer was lost on the way, and the second try was told that the key is taken: by itself."""
    storage = Taken(raw, after=True)
    request = control.ask(storage, ID, "save")
    assert storage.tries == 1
    assert control.poll(storage) == [request]


def test_where_others_are_always_quicker_it_ends(raw: Raw) -> None:
    storage = Taken(raw, after=False)
    with pytest.raises(UnavailableError, match="all the time"):
        control.ask(storage, ID, "save")
    assert storage.tries > 1


def test_a_failing_storage_is_told_to_who_looks(raw: Raw) -> None:
    def fails(name: str, key: str) -> None:
        raise UnavailableError("away", key=key)

    with pytest.raises(UnavailableError, match="away"):
        control.poll(Hooked(open_storage(raw.url), fails))


def test_waiting(raw: Raw) -> None:
    """Until it is taken up; what nobody takes up is taken back."""
    storage = open_storage(raw.url)
    request = control.ask(storage, ID, "save")
    assert not control.wait(storage, request, 0)
    assert control.poll(storage) == []
    request = control.ask(storage, ID, "save")
    seen = threading.Event()

    def run() -> None:
        seen.wait()
        control.answer(storage, request)

    runner = threading.Thread(target=run)
    runner.start()
    assert control.wait(Hooked(storage, lambda name, key: seen.set()), request, 600)
    runner.join()


@pytest.mark.parametrize("at", [1, 2, 3])
def test_who_gives_up_waiting_takes_it_back(raw: Raw, at: int) -> None:
    """Whether it lies there yet or not."""
    calls: list[str] = []

    def interrupts(name: str, key: str) -> None:
        calls.append(name)
        if len(calls) == at:
            raise KeyboardInterrupt

    storage = open_storage(raw.url)
    with pytest.raises(KeyboardInterrupt):
        control.ask_and_wait(Hooked(storage, interrupts), ID, "stop", 600)
    assert calls[at - 1] == ("create" if at == 1 else "read")
    assert calls[at:] == (["read"] if at == 1 else ["read", "delete"])
    assert control.poll(storage) == []


def test_signalling_leaves_the_store_to_the_run(raw: Raw) -> None:
    """The run that saves goes on saving, and nothing is strange for who proves or prunes."""
    with opened(raw.url) as run, opened(raw.url) as other:
        save(run, state(GOOD), 2)
        before = objects(raw)
        assert not other.signal("save")
        assert not other.signal("stop")
        assert set(objects(raw)) - set(before) == {SAVE, STOP}
        assert [request.action for request in control.poll(run._storage)] == ["save", "stop"]
        save(run, state(GOOD), 3)
        report = other.verify()
        assert report.ok
        assert not report.leftovers
        assert not report.foreign
        other.prune(grace_s=0)
        assert {SAVE, STOP} <= set(objects(raw))
        assert [c.step for c in run.checkpoints()] == [1, 2, 3]


def test_signal_refuses_what_makes_no_sense(raw: Raw, tmp_path: Path) -> None:
    with opened(raw.url) as store:
        with pytest.raises(FormatError, match="'pause' can't be asked for"):
            store.signal("pause")  # type: ignore[arg-type]
        with pytest.raises(FormatError, match="wait: 'soon' is no duration"):
            store.signal("save", wait="soon")
        store.signal("save")
        with pytest.raises(ExistsError, match="no run has answered"):
            store.signal("save")
        assert not store.signal("stop", wait="0s")
        assert [request.action for request in control.poll(store._storage)] == ["save"]
    with opened(raw.url, read_only=True) as store, pytest.raises(StorageError, match="read-only"):
        store.signal("save")
    with cs.open(tmp_path / "nothing") as store, pytest.raises(NotFoundError, match="there is no ckptstore"):
        store.signal("save")
    assert not (tmp_path / "nothing").exists()


def test_signal_where_only_the_commits_tell_the_store(raw: Raw) -> None:
    raw.remove("store.json")
    with opened(raw.url) as store:
        store.signal("stop")
        assert [request.action for request in control.poll(store._storage)] == ["stop"]
