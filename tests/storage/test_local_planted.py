"""Symlinks, FIFOs and devices that somebody planted are neither followed nor opened."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptstore.errors import ExistsError, IntegrityError, StorageError
from ckptstore.storage import LocalStorage


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _plant(kind: str, path: Path, outside: Path) -> None:
    match kind:
        case "symlink to a file":
            path.symlink_to(outside / "secret")
        case "symlink to a folder":
            path.symlink_to(outside)
        case "dangling symlink":
            path.symlink_to(outside / "nothing")
        case "FIFO":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "device":
            try:
                os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 5))
            except PermissionError:
                pytest.skip("devices need root")


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """A folder that nothing may reach; checked at the end."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret")
    yield outside
    assert names(outside) == ["secret"]
    assert (outside / "secret").read_bytes() == b"secret"


KINDS = ["symlink to a file", "symlink to a folder", "dangling symlink", "FIFO", "device"]


@pytest.mark.parametrize("kind", [*KINDS, "folder"])
def test_what_is_no_regular_file_is_not_opened(storage: LocalStorage, root: Path, outside: Path, kind: str) -> None:
    _plant(kind, root / "commits/x", outside)

    for use in (
        lambda: storage.read("commits/x", limit=99),
        lambda: storage.size("commits/x"),
        lambda: storage.open_reader("commits/x"),
    ):
        with pytest.raises(IntegrityError, match="commits/x is no regular file") as caught:
            use()
        assert caught.value.key == "commits/x"
    for write in (lambda: storage.create("commits/x", b""), lambda: storage.open_writer("commits/x")):
        with pytest.raises(ExistsError):
            write()
    assert [entry.size for entry in storage.list("commits/")] == [0, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_folder_is_not_entered(storage: LocalStorage, root: Path, outside: Path, kind: str) -> None:
    _plant(kind, root / "checkpoints", outside)

    for read in (
        lambda: storage.read("checkpoints/secret", limit=99),
        lambda: storage.size("checkpoints/secret"),
        lambda: storage.open_reader("checkpoints/secret"),
    ):
        with pytest.raises(IntegrityError, match="symlink"):
            read()
    for use in (
        lambda: storage.create("checkpoints/new", b""),
        lambda: storage.open_writer("checkpoints/id/new"),
        lambda: storage.delete(["checkpoints/secret"]),
        lambda: storage.list("checkpoints/"),
    ):
        with pytest.raises(StorageError, match="symlink"):
            use()
    assert [entry.key for entry in storage.list("")] == ["checkpoints", "commits/first"]


@pytest.mark.parametrize("kind", KINDS)
def test_deleting_removes_the_planted_thing_itself(storage: LocalStorage, root: Path, outside: Path, kind: str) -> None:
    _plant(kind, root / "commits/x", outside)

    storage.delete(["commits/x"])

    assert names(root / "commits") == ["first"]
