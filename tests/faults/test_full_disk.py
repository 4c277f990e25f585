"""A disk that is really full: of bytes, and of inodes."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ckptstore import SaveFailedError, StorageError, StorageFullError
from ckptstore.store import Store

from .ext4 import Image, missing
from .outcome import opened, read
from .points import named
from .worker import save, tensors


@pytest.fixture
def image(tmp_path: Path) -> Callable[..., Image]:
    """Makes an image of so many megabytes."""
    reason = missing(tmp_path)
    if reason is not None:
        pytest.skip(reason)
    return lambda megabytes, *options: Image(tmp_path, megabytes, *options)


def put_ballast(root: Path) -> None:
    """What somebody can throw away when nothing else fits: a few blocks and inodes."""
    (root / "ballast").mkdir()
    for number in range(4):
        (root / "ballast" / str(number)).write_bytes(bytes(16 << 10))


def fill(store: Store, *, large: bool, first: int = 1) -> tuple[list[int], Exception]:
    """Save steps from ``first`` on until it fails: the steps that were acknowledged, and the error."""
    steps: list[int] = []
    try:
        for step in range(first, 400):
            save(store, step, large=large)
            steps.append(step)
    except (SaveFailedError, StorageError) as error:
        return steps, error
    raise AssertionError("the disk never got full")


def check_full(path: Path, steps: list[int], error: Exception, *, large: bool) -> None:
    """Nothing acknowledged is lost; when one checkpoint is deleted and reclaimed, the next save works."""
    causes = [error, error.__cause__]
    assert any(isinstance(cause, StorageFullError) for cause in causes), causes
    with opened(path) as store:
        found = store.checkpoints()
        assert [checkpoint.step for checkpoint in found] == steps
        assert all(read(store, checkpoint) == tensors(checkpoint.step, large=large) for checkpoint in found)
        assert store.verify().ok
        for step in steps[:2]:
            _reclaim(store, path, step)
        saved = save(store, 999, large=large)
        assert read(store, saved) == tensors(999, large=large)
        store.prune(grace_s=0)
        report = store.verify()
        assert report.ok
        assert not report.leftovers


def _reclaim(store: Store, path: Path, step: int) -> None:
    # A tombstone is a file too: on a disk without a single free block or inode, something else must go first.
    shutil.rmtree(path.parent / "ballast", ignore_errors=True)
    store.delete(f"step:{step}")
    assert store.prune(grace_s=0).reclaimed


@pytest.mark.parametrize("large", [False, True])
def test_out_of_space(image: Callable[..., Image], full: bool, large: bool) -> None:
    """Disks from 4 to 68 MB, filled by checkpoints of 120 KB or of 16 MB."""
    sizes = range(40, 72, 4 if full else 20) if large else range(4, 33, 4 if full else 20)
    for megabytes in sizes:
        with named(f"{megabytes} MB"), image(megabytes).mounted() as root:
            put_ballast(root)
            with opened(root / "store") as store:
                steps, error = fill(store, large=large)
            check_full(root / "store", steps, error, large=large)


def test_the_last_bytes(image: Callable[..., Image], full: bool) -> None:
    """So many blocks left that a save ends in each of its writes."""
    disk = image(8)
    with disk.mounted() as root, opened(root / "store") as store:
        save(store, 1)
    copy = disk.remember()
    for free_kb in range(0, 180, 4 if full else 36):
        disk.restore(copy)
        with named(f"{free_kb} KB free"), disk.mounted() as root:
            put_ballast(root)
            _leave_free(root, free_kb << 10)
            with opened(root / "store") as store:
                steps, error = fill(store, large=False, first=2)
            check_full(root / "store", [1, *steps], error, large=False)


def _leave_free(root: Path, free_bytes: int) -> None:
    found = os.statvfs(root)
    length = found.f_bavail * found.f_bsize - free_bytes
    with (root / "filling").open("wb") as file:
        while length > 0:
            try:
                os.posix_fallocate(file.fileno(), 0, length)
            except OSError as error:
                # Part of the free blocks goes to the file's own tree.
                if error.errno != errno.ENOSPC:
                    raise
                length -= 4096
            else:
                return


def test_out_of_inodes(image: Callable[..., Image], full: bool) -> None:
    """Space is there, names are not."""
    for count in range(32, 128, 8) if full else [32, 64]:
        with named(f"{count} inodes"), image(16, "-N", str(count)).mounted() as root:
            put_ballast(root)
            with opened(root / "store") as store:
                steps, error = fill(store, large=False)
            check_full(root / "store", steps, error, large=False)
