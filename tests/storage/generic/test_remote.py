"""What errors mean, what is tried again, and what no message repeats."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any, ClassVar
from uuid import uuid4

import pytest
from fsspec import AbstractFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from ckptstore.errors import (
    ExistsError,
    NotFoundError,
    StorageError,
    StorageFullError,
    UnavailableError,
)
from ckptstore.storage import open_storage
from ckptstore.storage.generic import GenericStorage
from ckptstore.storage.generic.failures import is_transient, may_be_applied
from ckptstore.storage.generic.traits import traits_of
from tests.storage.generic.rig import MemoryRaw, patience, register


class FailingFileSystem(MemoryFileSystem):
    """Raises what ``plan`` says, call by call of ``method``; before or after the call does its work."""

    protocol = "failing"
    method: ClassVar[str] = ""
    plan: ClassVar[list[tuple[str, Exception]]] = []

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.removeprefix("failing://"))

    def _planned(self, method: str, work: Callable[[], Any]) -> Any:
        if method != self.method or not self.plan:
            return work()
        when, error = self.plan.pop(0)
        if when == "after":
            work()
        raise error

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **how: Any) -> Any:
        return self._planned("pipe_file", lambda: super(FailingFileSystem, self).pipe_file(path, value, mode))

    def info(self, path: str, **how: Any) -> Any:
        return self._planned("info", lambda: super(FailingFileSystem, self).info(path))

    def find(self, path: str, *args: Any, **how: Any) -> Any:
        return self._planned("find", lambda: super(FailingFileSystem, self).find(path, *args, **how))

    def cp_file(self, path1: str, path2: str, **how: Any) -> Any:
        return self._planned("cp_file", lambda: super(FailingFileSystem, self).cp_file(path1, path2))


class AzureLikeError(Exception):
    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")
        self.status_code = status


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> str:
    register("failing", FailingFileSystem)
    patience(monkeypatch, 0.3)
    return uuid4().hex


def plan(monkeypatch: pytest.MonkeyPatch, method: str, *steps: tuple[str, Exception]) -> list[tuple[str, Exception]]:
    """The list, which is empty when all have fired."""
    left = list(steps)
    monkeypatch.setattr(FailingFileSystem, "method", method)
    monkeypatch.setattr(FailingFileSystem, "plan", left)
    return left


@pytest.mark.parametrize(
    "error",
    [
        TimeoutError("slow"),
        ConnectionResetError("reset"),
        OSError(errno.EBUSY, "busy"),
        AzureLikeError(503),
        EOFError(),
    ],
    ids=lambda e: type(e).__name__,
)
def test_what_may_pass_is_tried_again(place: str, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    patience(monkeypatch, 60)
    storage = GenericStorage("failing", place, {})
    storage.create("a", b"x")
    left = plan(monkeypatch, "info", ("before", error), ("before", error))

    assert storage.size("a") == 1
    assert left == []


@pytest.mark.parametrize(
    ("error", "kind", "transient"),
    [
        (PermissionError("no"), UnavailableError, False),
        (AzureLikeError(403), UnavailableError, False),
        (OSError("Forbidden: https://x"), UnavailableError, False),
        (OSError(errno.ENOSPC, "full"), StorageFullError, False),
        (RuntimeError("who knows"), StorageError, False),
        (AzureLikeError(400), StorageError, False),
    ],
)
def test_what_stays_is_told_at_once(
    place: str, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[StorageError], transient: bool
) -> None:
    storage = GenericStorage("failing", place, {})
    left = plan(monkeypatch, "find", ("before", error), ("before", AssertionError("tried again")))

    with pytest.raises(kind) as caught:
        storage.list("")

    assert type(caught.value) is kind
    assert caught.value.transient is transient
    assert caught.value.__cause__ is error
    assert len(left) == 1


def test_a_server_that_is_away_is_never_taken_for_empty(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the file system says "not found", and the cause is that it could not ask."""
    storage = GenericStorage("failing", place, {})
    hidden = FileNotFoundError("failing://x")
    hidden.__cause__ = ConnectionRefusedError("refused")
    for ask, method in ((lambda: storage.list(""), "find"), (lambda: storage.size("a"), "info")):
        left = plan(monkeypatch, method, *[("before", hidden)] * 1000)
        with pytest.raises(UnavailableError, match="refused") as caught:
            ask()
        assert caught.value.transient
        assert len(left) < 1000


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (ConnectionRefusedError("nobody"), "failed"),
        (PermissionError("no"), "failed"),
        (TimeoutError("slow"), "unknown"),
        (AzureLikeError(500), "unknown"),
        (AzureLikeError(400), "failed"),
        (RuntimeError("who knows"), "unknown"),
    ],
)
def test_a_write_that_fails_says_what_is_certain(
    place: str, monkeypatch: pytest.MonkeyPatch, error: Exception, outcome: str
) -> None:
    storage = GenericStorage("failing", place, {})
    left = plan(monkeypatch, "cp_file", *[("before", error)] * 1000)

    with pytest.raises(StorageError) as caught:
        storage.create("a", b"x")

    assert caught.value.outcome == outcome
    assert len(left) < 1000
    assert MemoryRaw(place).keys() == []


def test_a_creation_whose_answer_was_lost_knows_its_own_work(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    patience(monkeypatch, 60)
    storage = GenericStorage("failing", place, {})
    left = plan(monkeypatch, "cp_file", ("after", TimeoutError("the answer was lost")))

    storage.create("a", b"mine")

    assert left == []
    assert MemoryRaw(place).get("a") == b"mine"
    with pytest.raises(ExistsError):
        storage.create("a", b"mine")


def test_a_creation_that_lost_its_answer_does_not_take_what_is_another_s(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    patience(monkeypatch, 60)
    storage = GenericStorage("failing", place, {})
    left = plan(monkeypatch, "cp_file", ("before", TimeoutError("the answer was lost")))
    real = FailingFileSystem._planned

    def overtaken(self: FailingFileSystem, method: str, work: Callable[[], Any]) -> Any:
        try:
            return real(self, method, work)
        except TimeoutError:
            MemoryRaw(place).put("a", b"theirs")
            raise

    monkeypatch.setattr(FailingFileSystem, "_planned", overtaken)

    with pytest.raises(ExistsError):
        storage.create("a", b"mine")
    assert left == []
    assert MemoryRaw(place).get("a") == b"theirs"


def test_a_copy_that_is_short_is_taken_away_again(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fired = []

    def short(self: FailingFileSystem, path1: str, path2: str, **how: Any) -> None:
        fired.append(path2)
        MemoryFileSystem.pipe_file(self, path2, b"x")

    monkeypatch.setattr(FailingFileSystem, "cp_file", short)
    storage = GenericStorage("failing", place, {})

    with pytest.raises(UnavailableError, match="1 bytes are there of 7"):
        storage.create("a", b"1234567")

    assert fired
    assert MemoryRaw(place).keys() == []


def test_no_secret_is_repeated(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"token": "hunter2-token", "nested": {"headers": ["Bearer hunter2"]}, "conn": "AccountKey=hunter2key;x=1"}
    storage = GenericStorage("failing", place, options)
    for error in (RuntimeError("bad token hunter2-token"), OSError("Bearer hunter2"), ValueError("key hunter2key")):
        outer = OSError(errno.EIO, "wrapped")
        outer.__cause__ = error
        for raised in (error, outer):
            left = plan(monkeypatch, "find", ("before", raised))
            with pytest.raises(StorageError) as caught:
                storage.list("")
            shown: BaseException | None = caught.value
            while shown is not None:
                assert "hunter2" not in f"{shown} {shown!r}"
                shown = shown.__cause__ or shown.__context__
            assert left == []
    assert "hunter2" not in repr(storage) + storage.url


def test_options_that_do_not_fit_are_named_without_their_values() -> None:
    with pytest.raises(StorageError, match="secret_thing") as caught:
        open_storage("failing-options://x/y", options={"secret_thing": "hunter2!"})

    assert "hunter2" not in str(caught.value)


class PickyFileSystem(AbstractFileSystem):
    protocol = "failing-options"

    def __init__(self, skip_instance_cache: bool = False) -> None:
        super().__init__()


register("failing-options", PickyFileSystem)


def test_what_can_not_be_written_whole_is_not_written() -> None:
    """A class that neither renames nor copies could publish half an object."""
    assert traits_of(PickyFileSystem()).publish == "never"
    with pytest.raises(StorageError, match="nothing can be written to failing-options"):
        open_storage("failing-options://x/y").create("a", b"x")


def test_a_fork_can_not_use_it(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = GenericStorage("failing", place, {})
    pid = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: pid + 1)

    with pytest.raises(StorageError, match="open it again there"):
        storage.list("")


def test_missing_objects_are_no_failure(place: str) -> None:
    with pytest.raises(NotFoundError):
        GenericStorage("failing", place, {}).size("a")
    assert not is_transient(FileNotFoundError("x"))
    assert not may_be_applied(FileNotFoundError("x"))


def test_where_looking_first_is_all_it_is_said(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that takes conditions and doesn't mind them is found out."""
    storage = GenericStorage("failing", place, {})
    assert storage.capabilities.exclusive_create
    storage.create("store.json", b"x" * 300)
    tried: list[str] = []
    monkeypatch.setattr(GenericStorage, "_put_new", lambda self, path, data: tried.append(path))

    storage.probe("store.json", b"x" * 300)

    assert len(tried) == 2
    assert all("/tmp-" in path for path in tried)
    assert not storage.capabilities.exclusive_create
