"""The order of the system calls that durability rests on."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from ckptstore.storage import LocalStorage


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was asked of the system, in order; descriptors by the name of their file or folder."""
    made: list[str] = []

    def record(name: str, describe: Callable[..., object]) -> None:
        real = getattr(os, name)

        def call(*args: object, **options: object) -> object:
            made.append(f"{name} {describe(*args)}")
            return real(*args, **options)

        monkeypatch.setattr(os, name, call)

    def target(fd: int, *_: object) -> str:
        name = os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))
        return "temp" if name.startswith("tmp-") else name

    for name in ("write", "pwrite", "fsync", "ftruncate"):
        record(name, target)
    record("link", lambda source, final: f"{source[:4]} {final}")
    for name in ("unlink", "rmdir", "mkdir"):
        record(name, lambda path, *_: "temp" if str(path).startswith("tmp-") else path)
    return made


needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="descriptors are named by /proc")


@needs_proc
def test_create_syncs_the_file_then_links_then_syncs_the_folder(storage: LocalStorage, calls: list[str]) -> None:
    storage.create("commits/x", b"data")

    assert calls == ["write temp", "fsync temp", "link tmp- x", "unlink temp", "fsync commits"]


@needs_proc
def test_a_new_folder_is_synced_into_the_one_above(storage: LocalStorage, calls: list[str]) -> None:
    writer = storage.open_writer("checkpoints/id/file", size=5)
    assert calls == ["mkdir checkpoints", "fsync root", "mkdir id", "fsync checkpoints"]
    calls.clear()

    writer.write(writer.reserve(5), memoryview(b"12345"))
    writer.finish()
    storage.create("checkpoints/id/manifest", b"")

    assert calls[:3] == ["pwrite file", "ftruncate file", "fsync file"]
    assert calls[-1] == "fsync id"


@needs_proc
def test_the_first_write_syncs_what_a_killed_process_left(root: Path, calls: list[str]) -> None:
    (root / "commits").mkdir(parents=True)
    calls.clear()

    LocalStorage(root).create("commits/x", b"")

    assert calls[:2] == [f"fsync {root.parent.name}", "fsync root"]
    assert calls[2:] == ["fsync root", "fsync temp", "link tmp- x", "unlink temp", "fsync commits"]


@needs_proc
def test_every_new_folder_above_the_root_is_synced(tmp_path: Path, calls: list[str]) -> None:
    LocalStorage(tmp_path / "a/b").create("x", b"")

    assert calls[:4] == ["mkdir a", f"fsync {tmp_path.name}", "mkdir b", "fsync a"]


@needs_proc
def test_delete_syncs_each_folder_once(storage: LocalStorage, calls: list[str]) -> None:
    for name in ("x", "y", "z"):
        storage.create(f"a/b/{name}", b"")
    calls.clear()

    storage.delete(["a/b/x", "commits/first", "a/b/y"])
    assert sorted(calls[:2]) == ["unlink x", "unlink y"]
    assert calls.count("fsync b") == 1
    calls.clear()

    storage.delete(["a/b/z"])
    assert calls == ["unlink z", "fsync b", "rmdir b", "fsync a", "rmdir a", "fsync root"]


@needs_proc
def test_a_folder_that_another_process_removed_is_synced_again(
    storage: LocalStorage, root: Path, calls: list[str]
) -> None:
    storage.create("a/x", b"")
    (root / "a/x").unlink()
    (root / "a").rmdir()
    calls.clear()

    storage.create("a/y", b"")

    assert calls[:2] == ["mkdir a", "fsync root"]
