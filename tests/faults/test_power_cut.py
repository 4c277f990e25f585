"""Cut the power of a real ext4 under a save, mount it again, and look."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptstore import CheckpointError, DamageWarning

from .crash import fsync_names
from .ext4 import Image, missing
from .outcome import NEW, check, nothing, one_checkpoint, something_to_delete
from .points import kinds, named, sampled
from .processes import CHANGING, Fault, Point, Result, Worker

MAKERS = {"save": one_checkpoint, "first save": nothing, "delete": something_to_delete}

CAUGHT_BY_EXT4 = {"writer record", "part", "manifest", "commit record", "commits/"}
CAUGHT_WITHOUT_DIRECT_IO = CAUGHT_BY_EXT4 | {"data file"}
"""The other fsyncs are hidden by ext4: its one journal commits every name made before with the next fsync of anything,
and the size and place of a file written past the cache too. ``test_crash_model`` finds them."""


class Disk:
    """An image that holds a store, put back before each cut."""

    def __init__(self, folder: Path, worker: Worker, operation: str) -> None:
        folder.mkdir()
        self.worker, self.image = worker, Image(folder, 32)
        with self.image.mounted() as root:
            self.base = MAKERS[operation](root / "store")
        self.operation = self.base.operation
        self._copy = self.image.remember()

    def cut(self, fault: Fault | None = None, **options: object) -> Result:
        """One operation on the disk as it was, broken by ``fault`` or not, then the cut."""
        self.image.restore(self._copy)
        with self.image.mounted() as root:
            if fault is None:
                result = self.worker.run(root / "store", self.operation, NEW, **options)
            else:
                result = self.worker.broken(root / "store", self.operation, NEW, fault)
            self.image.cut_power()
        return result

    def points(self) -> list[Point]:
        """Every call of the undisturbed operation."""
        self.image.restore(self._copy)
        with self.image.mounted() as root:
            return self.worker.points(root / "store", self.operation, NEW, CHANGING)

    def check(self, result: Result) -> bool:
        """See ``outcome.check``, after the reboot."""
        with self.image.mounted() as root:
            return check(root / "store", self.base, there=result.told("ack"), gone=result.told("buried"))


@pytest.fixture(scope="module", params=list(MAKERS))
def disk(request: pytest.FixtureRequest, worker: Worker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disk]:
    folder = tmp_path_factory.mktemp("disk")
    reason = missing(folder)
    if reason is not None:
        pytest.skip(reason)
    return Disk(folder / "image", worker, request.param)


@pytest.fixture(scope="module")
def saving(worker: Worker, tmp_path_factory: pytest.TempPathFactory) -> Disk:
    folder = tmp_path_factory.mktemp("disk")
    reason = missing(folder)
    if reason is not None:
        pytest.skip(reason)
    return Disk(folder / "image", worker, "save")


def test_a_cut_loses_what_was_not_synced_and_only_that(saving: Disk) -> None:
    """The instrument itself."""
    with saving.image.mounted() as root:
        (root / "before").write_bytes(b"x")
    with saving.image.mounted() as root:
        (root / "after").write_bytes(b"x")
        saving.image.cut_power()
    with saving.image.mounted() as root:
        assert (root / "before").exists()
        assert not (root / "after").exists()
        (root / "before").unlink()


def test_power_cut_right_after_the_answer(disk: Disk, full: bool) -> None:
    """What was acknowledged is there, bit for bit."""
    for number in range(100 if full else 4):
        with named(disk.operation, f"cut {number}"):
            result = disk.cut()
            assert result.told("ack") or result.told("pruned")
            assert disk.check(result) == (disk.operation == "save")


@pytest.mark.parametrize("effect", ["signal=KILL", "signal=SEGV"])
def test_power_cut_at_every_call(disk: Disk, traced: Worker, full: bool, effect: str) -> None:
    """Killed before or after a call and cut at once: old checkpoint there, new one whole or absent, next save works."""
    points = disk.points()
    chosen = sampled(points, 40, full=full)

    for point in chosen:
        fault = Fault(point, effect)
        with named(disk.operation, fault):
            result = disk.cut(fault)
            assert result.status < 0, "the kill did not fire"
            disk.check(result)

    assert len(points) >= 54
    assert {"linkat", "unlinkat", "fsync", "write", "openat", "mkdirat"} <= kinds(chosen)


def _lost(disk: Disk, number: int, *, direct: bool) -> bool:
    """Whether a save that leaves out fsync ``number`` breaks the promise when the power is cut after its answer."""
    result = disk.cut(drop_fsyncs=[number], direct=direct)
    assert result.told("injected") == 1, "no fsync was left out"
    assert result.told("ack")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DamageWarning)
        try:
            disk.check(result)
        except (AssertionError, CheckpointError):
            return True
    return False


@pytest.mark.parametrize(("direct", "expected"), [(True, CAUGHT_BY_EXT4), (False, CAUGHT_WITHOUT_DIRECT_IO)])
def test_a_forgotten_fsync_is_caught(saving: Disk, full: bool, direct: bool, expected: set[str]) -> None:
    """The test above is no show: without any one of these fsyncs, a cut after the answer costs a checkpoint."""
    log = saving.cut(log=True).told("log")
    names = list(fsync_names(log).values())
    caught: dict[str, set[bool]] = {}

    for number, name in enumerate(names):
        if full or name in expected:
            with named(f"fsync {number} of {name}"):
                caught.setdefault(name, set()).add(_lost(saving, number, direct=direct))

    assert {name for name, lost in caught.items() if lost == {True}} == expected
    assert all(lost == {name in expected} for name, lost in caught.items())
