"""Kill the process before and after every system call of a save, of the first save, and of delete and prune."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest

from .outcome import NEW, Base, check
from .points import SEED, kinds, named, sampled
from .processes import CHANGING, Fault, Result, Worker

OPERATIONS = ["save", "first save", "tuned save", "delete", "delete a lender"]
BEFORE, AFTER = "signal=KILL", "signal=SEGV"
STATUS = {BEFORE: -signal.SIGKILL, AFTER: -signal.SIGSEGV}


def check_after_death(result: Result, path: Path, base: Base, *, large: bool) -> bool:
    """Whether a checkpoint of step ``NEW`` exists after the child died as ``result`` tells."""
    return check(path, base, large=large, there=result.told("ack"), gone=result.told("buried"))


@pytest.mark.parametrize(("effect", "made"), [(BEFORE, False), (AFTER, True)])
def test_the_kill_comes_before_or_after_the_call(
    traced: Worker, bases: dict[str, Base], tmp_path: Path, effect: str, made: bool
) -> None:
    """The instrument itself: of the only mkdirat and the first linkat, one side has happened and the other not."""
    for call, folder in (("mkdirat", "checkpoints"), ("linkat", "writers")):
        path = bases["save"].copy(tmp_path)
        before = set((path / folder).iterdir())
        points = traced.points(bases["save"].copy(tmp_path), "save", NEW, [call])
        path = bases["save"].copy(tmp_path)

        result = traced.broken(path, "save", NEW, Fault(points[0], effect))

        assert result.status == STATUS[effect]
        new = [entry for entry in set((path / folder).iterdir()) - before if not entry.name.startswith("tmp-")]
        assert bool(new) == made


def test_the_same_operation_makes_the_same_calls(traced: Worker, bases: dict[str, Base], tmp_path: Path) -> None:
    """Otherwise counting them would hit other points than it names."""
    for operation in OPERATIONS:
        base = bases[operation]
        runs = [traced.points(base.copy(tmp_path), base.operation, NEW, CHANGING) for _ in range(3)]
        assert runs[0] == runs[1] == runs[2]
        assert len(runs[0]) >= 55


def test_a_tuned_save_borrows(worker: Worker, bases: dict[str, Base], tmp_path: Path) -> None:
    """Where nothing disturbs it: otherwise the tests below would be those of a plain save."""
    base = bases["tuned save"]
    result = worker.run(base.copy(tmp_path), base.operation, NEW)
    assert result.told("ack")
    assert result.told("borrowed")


@pytest.mark.parametrize("effect", [BEFORE, AFTER])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_killed_at_every_call(
    traced: Worker, bases: dict[str, Base], tmp_path: Path, full: bool, operation: str, effect: str
) -> None:
    """Old checkpoint untouched, new one whole or absent, the next save works, and prune leaves nothing behind."""
    base = bases[operation]
    points = traced.points(base.copy(tmp_path), base.operation, NEW, CHANGING, large=full)
    chosen = sampled(points, 8, full=full)
    existing = 0

    for point in chosen:
        fault = Fault(point, effect)
        path = base.copy(tmp_path)
        with named(operation, fault):
            result = traced.broken(path, base.operation, NEW, fault, large=full)
            assert result.status == STATUS[effect], "the kill did not fire"
            existing += check_after_death(result, path, base, large=full)

    assert len(chosen) >= (55 if full else 25)
    assert {"linkat", "unlinkat", "fsync", "write", "openat", "mkdirat"} <= kinds(chosen)
    assert 0 < existing < len(chosen), "kills before and after the commit must both be among them"


@pytest.mark.parametrize("operation", ["save", "first save", "delete"])
def test_killed_at_any_time_with_several_threads(
    worker: Worker, bases: dict[str, Base], tmp_path: Path, full: bool, operation: str
) -> None:
    """The same with four threads, where no two runs are alike."""
    base, choose = bases[operation], random.Random(f"{SEED} {operation}")
    begin = time.perf_counter()
    assert worker.run(base.copy(tmp_path), base.operation, NEW, threads=4, large=True).status == 0
    duration_s = time.perf_counter() - begin
    killed, tries = 0, 100 if full else 8

    for number in range(4 * tries):
        if number >= tries and killed >= tries // 4:
            break
        after_s = choose.uniform(0.1, 1) * duration_s
        path = base.copy(tmp_path)
        with named(operation, f"try {number}", f"{after_s:.4f} s"):
            begin = time.perf_counter()
            result = worker.run(path, base.operation, NEW, threads=4, large=True, dies_after_s=after_s)
            if result.status == 0:
                # The machine was busy when it was timed: it takes no longer than this.
                duration_s = min(duration_s, time.perf_counter() - begin)
            assert result.status in (0, -signal.SIGALRM)
            killed += result.status != 0
            check_after_death(result, path, base, large=True)

    assert killed >= tries // 4, "too few of the kills came before the end"
