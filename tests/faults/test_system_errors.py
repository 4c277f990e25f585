"""The system fails one call, or that call and all that follow, at every call of a save and of delete and prune."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ckptstore.format.layout import STORE

from .outcome import NEW, Base, check
from .points import kinds, named, sampled
from .processes import CHANGING, LOOKING, Fault, Result, Worker

OPERATIONS = ["save", "first save", "tuned save", "delete", "delete a lender"]
ERRORS = [
    *(pytest.param(name, sticky) for name in ("EIO", "ENOSPC", "EDQUOT", "EROFS") for sticky in (False, True)),
    # Python repeats an interrupted call, so that a sticky one would never end.
    pytest.param("EINTR", False),
]
ALLOWED = {"SaveFailedError", "CommitUnknownError", "StorageError"}
REPEATED_BY_PYTHON = {"openat", "read", "write", "pwrite64", "fsync", "ftruncate", "fallocate"}


def check_answer(result: Result, fault: Fault) -> None:
    """The process ended by itself and told success, or one of the errors that the documentation names."""
    assert result.status == 0
    assert any("(INJECTED)" in line for line in result.trace), "the error was not injected"
    error = result.told("error")
    if error is None:
        assert result.told("ack") or result.told("pruned") is not None
    else:
        # What a disk can't read is damage; of store.json, it is found before anything was written.
        unreadable = error["kinds"][0] == "IntegrityError" and fault.effect == "error=EIO" and error["key"] == STORE
        assert unreadable or ALLOWED & set(error["kinds"]), error
        if fault.effect in ("error=ENOSPC", "error=EDQUOT"):
            assert "StorageFullError" in [error["kinds"][0], *error["causes"]], error
    if fault.effect == "error=EINTR" and fault.point.call in REPEATED_BY_PYTHON:
        assert error is None, error


def check_no_second_fsync(result: Result) -> None:
    """After a failed fsync the pages are marked clean, so that a second one of the same file would lie."""
    failed: set[str] = set()
    for line in result.trace:
        match = re.search(r"fsync\(\d+<(.*)>\)", line)
        if match and Path(match[1]).suffix:
            assert match[1] not in failed, f"{match[1]} was synced again after an error"
            if "INJECTED" in line:
                failed.add(match[1])


def check_outcome(result: Result, path: Path, base: Base, fault: Fault) -> None:
    error, again = result.told("error"), result.told("again")
    if not fault.sticky and error is not None:
        assert "error" not in again, "the store could not be used again after one error"
    acknowledged = result.told("ack") or (again or {}).get("ack")
    # A checkpoint said to be certainly not saved must never appear.
    gone = result.told("buried")
    if error is not None and error["kinds"][0] == "SaveFailedError":
        gone = error["id"]
    check(path, base, there=acknowledged, gone=gone)


@pytest.mark.parametrize(("name", "sticky"), ERRORS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_error_at_every_call(
    traced: Worker, bases: dict[str, Base], tmp_path: Path, full: bool, operation: str, name: str, sticky: bool
) -> None:
    """Success and a whole checkpoint, or an error that tells the truth; and the store can be used again at once."""
    base = bases[operation]
    # A full or read-only disk can still be looked at.
    calls = [*CHANGING, *LOOKING] if name in ("EIO", "EINTR") else [call for call in CHANGING if call != "close"]
    points = traced.points(base.copy(tmp_path), base.operation, NEW, calls)
    chosen = sampled(points, 48, full=full)
    failed = 0

    for point in chosen:
        fault = Fault(point, f"error={name}", sticky)
        path = base.copy(tmp_path)
        with named(operation, fault):
            result = traced.broken(path, base.operation, NEW, fault, again=not sticky)
            check_answer(result, fault)
            if name != "EINTR":
                check_no_second_fsync(result)
            check_outcome(result, path, base, fault)
            failed += result.told("error") is not None

    assert len(chosen) >= (55 if full else 10)
    assert {"linkat", "unlinkat", "fsync", "write", "openat", "mkdirat"} <= kinds(chosen)
    assert failed > 0


@pytest.mark.parametrize("operation", ["save", "first save"])
def test_a_failed_fsync_is_never_acknowledged(
    traced: Worker, bases: dict[str, Base], tmp_path: Path, operation: str
) -> None:
    """Every one of them: none is only for show."""
    base = bases[operation]
    points = traced.points(base.copy(tmp_path), "save", NEW, ["fsync"])

    for point in points:
        fault = Fault(point, "error=EIO")
        with named(operation, fault):
            result = traced.broken(base.copy(tmp_path), "save", NEW, fault)
            check_answer(result, fault)
            assert result.told("ack") is None

    assert len(points) >= 10


@pytest.mark.parametrize("operation", ["save", "first save"])
def test_short_writes(worker: Worker, bases: dict[str, Base], tmp_path: Path, full: bool, operation: str) -> None:
    """Every write and pwrite stops early, and all the bytes arrive."""
    base = bases[operation]
    path = base.copy(tmp_path)

    result = worker.run(path, "save", NEW, short_writes=True, large=full)

    assert result.told("injected") >= 25
    assert result.told("ack")
    assert check(path, base, there=result.told("ack"), large=full)


def test_a_dead_disk_is_an_error_and_no_endless_search(traced: Worker, bases: dict[str, Base], tmp_path: Path) -> None:
    """Where not even "/" can be looked at, the search upwards for a folder that exists comes to an end."""
    base = bases["first save"]
    points = traced.points(base.copy(tmp_path), "save", NEW, ["newfstatat"])

    for point in points[:6]:
        with named(point):
            result = traced.broken(base.copy(tmp_path), "save", NEW, Fault(point, "error=EIO", sticky=True))
            check_answer(result, Fault(point, "error=EIO", sticky=True))
            assert result.told("ack") is None
