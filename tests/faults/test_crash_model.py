"""Every disk that POSIX lets a power cut leave, at every moment of a save and of delete and prune.

The logs are those of real operations; only the disk is a model, and real stores made from its states are shown to the
library as well.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import NamedTuple

import pytest

from ckptstore import CheckpointError, DamageWarning

from .crash import TORN, Disk, Files, begin, fsync_names, replay
from .outcome import NEW, OLD, Base, check
from .points import named
from .processes import Worker
from .promise import Promise
from .recorder import ABOVE, BEGIN, Event

OPERATIONS = ["save", "first save", "delete", "delete a lender"]


class State(NamedTuple):
    """One disk that a cut may leave, and what was told before it."""

    files: Files
    told: frozenset[tuple[str, str]]


class Run(NamedTuple):
    """One recorded operation."""

    operation: str
    base: Base
    log: list[Event]
    promise: Promise
    held: Mapping[int, bytes]
    """What each file held when it was whole."""


@pytest.fixture(scope="module", params=OPERATIONS)
def run(request: pytest.FixtureRequest, worker: Worker, bases: dict[str, Base], scratch: Path) -> Run:
    base = bases[request.param]
    store = base.copy(scratch)
    log = worker.run(store, base.operation, NEW, log=True).told("log")
    promise = Promise(log, base.new is not None, base.old, base.lent)
    return Run(request.param, base, log, promise, contents(log, base.path, store))


def states(log: Sequence[Event], *, without: Set[int] = frozenset()) -> Iterator[State]:
    """Every state at every moment of the operation, the fsyncs at these places left out."""
    disk, told = Disk(), set()
    for place, event in enumerate(log):
        if event[0] == "note" and isinstance(event[1], dict):
            told |= {(word, id) for word, id in event[1].items() if isinstance(id, str)}
        if place not in without:
            disk.apply(event)
        if place >= begin(log):
            for files in disk.states():
                yield State(files, frozenset(told))


def broken(run: Run, *, without: Set[int] = frozenset()) -> str | None:
    """How a cut breaks the promise, or None where it can't."""
    seen = set()
    for state in states(run.log, without=without):
        key = frozenset(state.files.items()), state.told
        if key not in seen:
            seen.add(key)
            problem = run.promise.broken_by(*state)
            if problem is not None:
                return problem
    return None


def numbered(names: Mapping[int, str]) -> dict[str, int]:
    """The place in the log by name and number, as "<id>/ 2" for the second fsync of that folder."""
    seen: Counter[str] = Counter()
    places = {}
    for place, name in names.items():
        seen[name] += 1
        places[f"{name} {seen[name]}"] = place
    return places


REDUNDANT = {
    "save": {
        # For names that a killed process left unsynced: test_after_a_killed_save shows that they are needed then.
        "above the store 1",
        "root 4",
        # The fourth, before the commit, does the same: the others cost nothing where nothing changed.
        "root 1",
        "root 2",
        "root 3",
        # The claim is a fence against processes that live on, and none survives a cut.
        "writers/ 1",
        # The next one, after the manifest, does the same.
        "<id>/ 1",
    },
    "first save": {
        # Either of the two will do.
        "above the store 1",
        "above the store 2",
        # The last one, when commits/ is made, covers the names made before it.
        "root 1",
        "root 2",
        "root 3",
        "root 4",
        "writers/ 1",
        "<id>/ 1",
    },
    "delete": {
        "above the store 1",
        "root 1",
        "root 3",
        # The condemned save died with its process, and the names removed below come back as leftovers at worst.
        "commits/ 2",
        "<id>/ 1",
        "checkpoints/ 1",
        "<id>/ 2",
        "checkpoints/ 2",
    },
    "delete a lender": {"above the store 1", "root 1", "<id>/ 1"},
}
"""The fsyncs of each operation that could be left out, one at a time."""


def test_no_cut_at_any_moment_breaks_the_promise(run: Run) -> None:
    assert broken(run) is None
    assert sum(1 for _ in states(run.log)) >= (40 if run.base.lent else 150)


def test_without_any_one_required_fsync_some_cut_breaks_it(run: Run) -> None:
    """And without a redundant one none does: the list is exact."""
    places = numbered(fsync_names(run.log))
    unharmed = {name for name, place in places.items() if broken(run, without={place}) is None}

    assert unharmed == REDUNDANT[run.operation]
    assert len(places) - len(unharmed) >= (2 if run.base.lent else 5)


def test_redundant_fsyncs_are_redundant_one_at_a_time_only(run: Run) -> None:
    """For the first save: of each group that covers another, one has to stay."""
    places = numbered(fsync_names(run.log))
    without = {places[name] for name in ("above the store 1", "above the store 2") if name in places}

    assert (broken(run, without=without) is not None) == (run.operation == "first save")


def contents(log: Sequence[Event], base: Path, store: Path) -> dict[int, bytes]:
    """What each file held when it was whole: in ``base``, or in ``store`` after the operation."""
    before, after = replay(log[: begin(log)]).now(), replay(log).now()
    found = {node: (base / path) for path, (node, _) in before.items()}
    found |= {node: (store / path) for path, (node, _) in after.items()}
    return {node: path.read_bytes() for node, path in found.items() if path.is_file()}


def make(files: Files, whole: Mapping[int, int], held: Mapping[int, bytes], path: Path) -> Path:
    """A real store as the cut leaves it."""
    shutil.rmtree(path, ignore_errors=True)
    if files:
        path.mkdir(parents=True)
    for name, (node, version) in sorted(files.items()):
        if name.endswith("/"):
            (path / name).mkdir()
        else:
            data = held.get(node, b"")
            torn = bytes(len(data)) if version == TORN else b""
            (path / name).write_bytes(data if version == whole[node] else torn)
    return path


def test_the_library_finds_every_such_disk_in_order(run: Run, tmp_path: Path, full: bool) -> None:
    """Real stores made from the states: loaded, verified, saved to and pruned."""
    distinct = {(frozenset(state.files.items()), state.told): state for state in states(run.log)}
    chosen = list(distinct.values())[:: 1 if full or run.base.lent else 6]

    for state in chosen:
        path = make(state.files, run.promise.whole, run.held, tmp_path / "store")
        told = dict(state.told)
        with named(run.operation, sorted(state.files)):
            check(path, run.base, there=told.get("ack"), gone=told.get("buried"))

    assert len(chosen) >= (60 if full and not run.base.lent else 10)


def test_the_library_finds_what_a_forgotten_fsync_breaks(run: Run, tmp_path: Path) -> None:
    """For each required fsync, a real store made from a state that breaks the promise without it."""
    for name, place in numbered(fsync_names(run.log)).items():
        if name not in REDUNDANT[run.operation]:
            state = next(s for s in states(run.log, without={place}) if run.promise.broken_by(*s))
            path = make(state.files, run.promise.whole, run.held, tmp_path / "store")
            told = dict(state.told)
            with named(name), pytest.raises((AssertionError, CheckpointError, DamageWarning)):
                check(path, run.base, there=told.get("ack"), gone=told.get("buried"))


def joined(first: Sequence[Event], second: Sequence[Event]) -> list[Event]:
    """Two processes one after the other, as one log; the second found what the first had left, synced or not."""
    left = {path: node for path, (node, _) in replay(first).now().items()}
    found = {path: node for path, (node, _) in replay(second[: begin(second)]).now().items()}
    same = {ABOVE: ABOVE, **{node: left[path] for path, node in found.items()}}
    roots = [[event[3] for event in log if event[:3:2] == ["mkdir", "store"]] for log in (first, second)]
    same |= dict(zip(roots[1], roots[0], strict=False))

    def renamed(event: Event) -> Event:
        kind, *rest = event
        return (
            event if kind == "note" else [kind, *(same.get(x, x + 10_000) if isinstance(x, int) else x for x in rest)]
        )

    kept = [event for event in first if event != BEGIN]
    return [*kept, BEGIN, *(renamed(event) for event in second[begin(second) :])]


def test_after_a_killed_save(worker: Worker, bases: dict[str, Base], scratch: Path, full: bool) -> None:
    """The first save is killed at any call, the next one finds names that no fsync covers, and the power is cut."""
    base, needed = bases["first save"], set()
    length = len(worker.run(base.copy(scratch), "save", OLD, log=True).told("log"))
    for dies_at in range(1, length, 1 if full else 7):
        path = base.copy(scratch)
        first = worker.run(path, "save", OLD, log=True, dies_at=dies_at).told("log")
        second = worker.run(path, "save", NEW, log=True).told("log")
        log = joined(first, second)
        run = Run("save", base, log, Promise(log, deletes=False, old=None), {})
        with named(f"killed at call {dies_at}"):
            assert broken(run) is None
            places = numbered(fsync_names(log))
            needed |= {name for name in REDUNDANT["save"] & set(places) if broken(run, without={places[name]})}

    assert {"above the store 1"} <= needed <= {"above the store 1", "root 4"}
    assert "root 4" in needed or not full
