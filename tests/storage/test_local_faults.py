"""What a local folder does when the system calls go wrong."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ckptstore.errors import ExistsError, NotFoundError, StorageError, StorageFullError, UnavailableError
from ckptstore.storage import LocalStorage, ObjectWriter, Slot, local, posix

from .contract import read_object, write_object


class Fault:
    """``os.<name>`` fails, at the calls with these numbers (from 1), or at all."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, code: int, *, at: tuple[int, ...] = ()) -> None:
        self.calls, self.fired = 0, 0
        real = getattr(os, name)

        def call(*args: object, **options: object) -> object:
            self.calls += 1
            if not at or self.calls in at:
                self.fired += 1
                raise OSError(code, os.strerror(code))
            return real(*args, **options)

        monkeypatch.setattr(os, name, call)


def aligned(data: bytes) -> memoryview:
    memory = memoryview(mmap.mmap(-1, max(len(data), 1)))[: len(data)]
    memory[:] = data
    return memory


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- partial and interrupted calls ---


@pytest.mark.parametrize("direct", [True, False])
def test_short_writes_are_continued(root: Path, monkeypatch: pytest.MonkeyPatch, direct: bool) -> None:
    short: list[str] = []

    def shorten(name: str) -> None:
        real = getattr(os, name)

        def call(fd: int, data: memoryview, *rest: int) -> Any:
            # A whole page, as direct I/O needs, or a third of what is less.
            part = memoryview(data)[: 4096 if len(data) > 4096 else -(-len(data) // 3)]
            if len(part) < len(data):
                short.append(name)
            return real(fd, part, *rest)

        monkeypatch.setattr(os, name, call)

    shorten("write")
    shorten("pwrite")
    storage, data = LocalStorage(root, direct=direct), os.urandom(21_000)

    storage.create("small", data)
    writer = storage.open_writer("large", size=len(data))
    writer.write(writer.reserve(len(data)), aligned(data))
    writer.finish()

    assert {"write", "pwrite"} == set(short)
    assert (root / "small").read_bytes() == data == (root / "large").read_bytes()


def test_short_reads_are_continued(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, counts = os.urandom(50_001), []
    root.mkdir()
    (root / "a").write_bytes(data)
    real_preadv, real_read = os.preadv, os.read

    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        counts.append("preadv")
        return real_preadv(fd, [buffers[0][:4096]], offset)

    def read(fd: int, size: int) -> bytes:
        counts.append("read")
        return real_read(fd, min(size, 1000))

    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr(os, "read", read)
    storage = LocalStorage(root)

    assert read_object(storage, "a") == data == storage.read("a", limit=50_001)
    assert counts.count("preadv") >= 13
    assert counts.count("read") >= 50


def test_interrupted_calls_are_repeated(tmp_path: Path) -> None:
    """EINTR from the kernel itself, at every second write, pwrite and fsync."""
    strace, log = shutil.which("strace"), tmp_path / "log"
    if strace is None:
        pytest.skip("needs strace")
    trace = [strace, "-f", "-o", str(log), "-e", "trace=write,pwrite64,fsync"]
    inject = [*trace, "-e", "inject=write,pwrite64,fsync:error=EINTR:when=1+2"]
    if subprocess.run([*trace, "true"], capture_output=True).returncode:
        pytest.skip("strace may not trace here")
    script = f"""
from ckptstore.storage import LocalStorage
storage = LocalStorage({str(tmp_path / "root")!r})
writer = storage.open_writer("large", size=9000)
writer.write(writer.reserve(9000), memoryview(b"x" * 9000))
writer.finish()
storage.create("small", b"y")
"""
    project = Path(local.__file__).parents[2]
    subprocess.run([*inject, sys.executable, "-c", script], check=True, env={**os.environ, "PYTHONPATH": str(project)})

    for call in ("write(", "pwrite64(", "fsync("):
        assert any(call in line and "EINTR" in line for line in log.read_text().splitlines()), call
    assert (tmp_path / "root/large").read_bytes() == b"x" * 9000
    assert (tmp_path / "root/small").read_bytes() == b"y"


# --- create ---


def test_a_link_whose_answer_was_lost_is_ours(
    storage: LocalStorage, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An NFS client repeats the request and is told EEXIST by its own first try."""
    real, fired = os.link, []

    def link_twice(*args: Any, **options: Any) -> None:
        real(*args, **options)
        fired.append(args)
        real(*args, **options)

    monkeypatch.setattr(os, "link", link_twice)

    storage.create("commits/x", b"mine")

    assert len(fired) == 1
    assert (root / "commits/x").read_bytes() == b"mine"
    assert names(root / "commits") == ["first", "x"]


@pytest.mark.parametrize(
    ("code", "outcome"),
    [(errno.ENOSPC, "failed"), (errno.EACCES, "failed"), (errno.EIO, "unknown"), (errno.ETIMEDOUT, "unknown")],
)
def test_a_failed_link_says_whether_it_may_have_worked(
    storage: LocalStorage, root: Path, monkeypatch: pytest.MonkeyPatch, code: int, outcome: str
) -> None:
    fault = Fault(monkeypatch, "link", code)

    with pytest.raises(StorageError) as caught:
        storage.create("commits/x", b"")

    assert fault.fired == 1
    assert caught.value.outcome == outcome
    assert caught.value.key == "commits/x"
    assert names(root / "commits") == ["first"]


@pytest.mark.parametrize(("number", "outcome"), [(1, "failed"), (2, "unknown")])
def test_a_failed_fsync_is_never_repeated(
    storage: LocalStorage, root: Path, monkeypatch: pytest.MonkeyPatch, number: int, outcome: str
) -> None:
    """The first is the file's, before the link; the second the folder's, after it."""
    fault = Fault(monkeypatch, "fsync", errno.EIO, at=(number,))

    with pytest.raises(StorageError) as caught:
        storage.create("commits/x", b"")

    assert (fault.fired, fault.calls) == (1, number)
    assert caught.value.outcome == outcome
    assert isinstance(caught.value.__cause__, OSError)
    assert ("x" in names(root / "commits")) == (outcome == "unknown")


def test_file_systems_without_fsync_are_reported_once(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before = storage.capabilities.durability
    fault = Fault(monkeypatch, "fsync", errno.EINVAL)

    storage.create("commits/x", b"1")
    write_object(storage, "commits/y", [b"2"])

    assert fault.fired >= 3
    assert (before, storage.capabilities.durability) == ("power-cut", "process-crash")
    assert [record.levelname for record in caplog.records] == ["WARNING"]


# --- large objects ---


def _write_and_finish(writer: ObjectWriter, slot: Slot) -> None:
    writer.write(slot, memoryview(b"x" * slot.length))
    writer.finish()


@pytest.mark.parametrize("call", ["pwrite", "fsync", "ftruncate", "close"])
def test_a_writer_that_failed_is_dead(
    storage: LocalStorage, root: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    writer = storage.open_writer("d/x", size=5000)
    slot = writer.reserve(5000)
    with monkeypatch.context() as patch:
        fault = Fault(patch, call, errno.EIO)
        with pytest.raises(StorageError, match="dmesg"):
            _write_and_finish(writer, slot)
        assert fault.fired == 1

    with pytest.raises(StorageError, match="failed already"):
        writer.finish()
    writer.abort()

    assert names(root) == ["commits"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_space_that_is_not_there_is_known_at_the_start(
    storage: LocalStorage, root: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    fault = Fault(monkeypatch, "posix_fallocate", code)

    with pytest.raises(StorageFullError, match="d/x"):
        storage.open_writer("d/x", size=1 << 20)

    assert fault.fired == 1
    assert names(root) == ["commits"]


def test_a_file_system_without_preallocation_is_written_all_the_same(
    storage: LocalStorage, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = Fault(monkeypatch, "posix_fallocate", errno.EOPNOTSUPP)

    write_object(storage, "x", [b"x" * 5000], sized=True)

    assert fault.fired == 1
    assert (root / "x").read_bytes() == b"x" * 5000


def test_refused_direct_transfers_go_through_the_cache(
    storage: LocalStorage, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some file systems accept the flag and then refuse the write."""
    if not storage.capabilities.direct_io:
        pytest.skip("no direct I/O here anyway")
    fault = Fault(monkeypatch, "pwrite", errno.EINVAL, at=(1,))

    write_object(storage, "x", [b"x" * 10_000, b"y" * 10_000], sized=True)

    assert fault.fired == 1
    assert not storage.capabilities.direct_io
    assert (root / "x").read_bytes() == b"x" * 10_000 + b"y" * 10_000


def test_aborting_while_others_write_never_touches_another_file(root: Path) -> None:
    """A thread inside ``write`` keeps the descriptor; the next file gets another one."""
    storage = LocalStorage(root, direct=False)
    writer = storage.open_writer("a")
    slot = writer.reserve(4)
    with writer._using("write") as fd:
        writer.abort()
        write_object(storage, "b", [b"good"])
        os.pwrite(fd, b"late", 0)

    assert (root / "b").read_bytes() == b"good"
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)
    with pytest.raises(StorageError, match="aborted already"):
        writer.write(slot, memoryview(b"late"))


@pytest.mark.parametrize(("failures", "fine"), [(3, True), (4, False)])
def test_stale_handles_are_reopened_three_times(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch, failures: int, fine: bool
) -> None:
    storage.create("a", b"x" * 100)
    reader = storage.open_reader("a")
    fault = Fault(monkeypatch, "preadv", errno.ESTALE, at=tuple(range(1, failures + 1)))
    buffer = bytearray(100)

    if fine:
        assert reader.read_into(0, memoryview(buffer)) == 100
        assert buffer == b"x" * 100
    else:
        with pytest.raises(UnavailableError):
            reader.read_into(0, memoryview(buffer))
    assert fault.fired == failures


# --- errors ---


@pytest.mark.parametrize(
    ("code", "kind", "words", "transient"),
    [
        (errno.ENOSPC, StorageFullError, "space", False),
        (errno.EDQUOT, StorageFullError, "quota", False),
        (errno.ENOENT, NotFoundError, "doesn't exist", None),
        (errno.EEXIST, ExistsError, "exists already", None),
        (errno.EACCES, StorageError, "Check permissions", False),
        (errno.EROFS, StorageError, "how it is mounted", False),
        (errno.EIO, StorageError, "dmesg", False),
        (errno.ESTALE, UnavailableError, "try again later", True),
        (errno.EHOSTDOWN, UnavailableError, "try again later", True),
        (errno.ELOOP, StorageError, "symlink", False),
        (errno.EMFILE, StorageError, "ulimit", True),
    ],
)
def test_system_errors_become_ours(code: int, kind: type[Exception], words: str, transient: bool | None) -> None:
    with pytest.raises(kind, match=words) as caught, posix.os_errors("read", "/root/a/b", "a/b"):
        raise OSError(code, os.strerror(code))

    assert "/root/a/b" in str(caught.value)
    assert vars(caught.value)["key"] == "a/b"
    assert vars(caught.value).get("transient") == transient
    assert isinstance(caught.value.__cause__, OSError)


def test_a_listing_that_fails_is_never_shortened(storage: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.create("a/b", b"")
    fault = Fault(monkeypatch, "scandir", errno.EIO, at=(2,))

    with pytest.raises(StorageError):
        storage.list("")
    assert fault.fired == 1
