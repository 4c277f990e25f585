"""Transfers past the page cache: which ones are, from whose memory, and what happens to partial pages."""

from __future__ import annotations

import fcntl
import mmap
import os
from pathlib import Path
from typing import Any

import pytest

from ckptstore.storage import LocalStorage
from ckptstore.storage.localio import is_aligned

from .contract import write_object

BLOCK = 1 << 20


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    storage = LocalStorage(tmp_path)
    write_object(storage, "probe", [b"x"], sized=True)
    if not storage.capabilities.direct_io:
        pytest.skip("no direct I/O on this file system")
    return storage


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, memoryview]]:
    """(offset, memory) of each ``pwrite``."""
    calls: list[tuple[int, memoryview]] = []
    real = os.pwrite

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        calls.append((offset, data))
        assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    return calls


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """(bytes, whether past the page cache) of each ``preadv``; one that fails is not counted."""
    calls: list[tuple[int, bool]] = []
    real = os.preadv

    def preadv(fd: int, buffers: list[memoryview], offset: int) -> Any:
        direct = bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)
        calls.append((len(buffers[0]), direct))
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    return calls


def aligned(data: bytes) -> memoryview:
    memory = memoryview(mmap.mmap(-1, len(data)))
    memory[:] = data
    return memory


def test_aligned_blocks_are_written_from_the_callers_memory(
    storage: LocalStorage, tmp_path: Path, written: list[tuple[int, memoryview]]
) -> None:
    """Two whole blocks and a tail: three writes, the last a padded page, cut off again at the end."""
    pieces = [aligned(os.urandom(length)) for length in (BLOCK, BLOCK, 100)]
    writer = storage.open_writer("x", size=2 * BLOCK + 100)
    for piece in pieces:
        writer.write(writer.reserve(len(piece)), piece)

    assert writer.finish() == 2 * BLOCK + 100
    assert [(offset, len(data)) for offset, data in written] == [(0, BLOCK), (BLOCK, BLOCK), (2 * BLOCK, 4096)]
    assert [data.obj for _, data in written[:2]] == [piece.obj for piece in pieces[:2]]
    assert (tmp_path / "x").read_bytes() == b"".join(pieces)


def test_unaligned_memory_goes_through_aligned_memory(
    storage: LocalStorage, tmp_path: Path, written: list[tuple[int, memoryview]]
) -> None:
    data = aligned(os.urandom(3 * BLOCK + 4096))[1 : 3 * BLOCK + 1]
    writer = storage.open_writer("x", size=len(data))
    writer.write(writer.reserve(len(data)), data)
    writer.finish()

    assert [(offset, len(memory)) for offset, memory in written] == [(i * BLOCK, BLOCK) for i in range(3)]
    assert all(is_aligned(memory) for _, memory in written)
    assert not is_aligned(data)
    assert (tmp_path / "x").read_bytes() == data


def test_a_page_shared_by_slots_is_written_once_and_when_complete(
    storage: LocalStorage, tmp_path: Path, written: list[tuple[int, memoryview]]
) -> None:
    pieces = [os.urandom(5000), os.urandom(3000), os.urandom(300)]
    writer = storage.open_writer("x", size=8300)
    slots = [writer.reserve(len(piece)) for piece in pieces]
    seen = []
    for i in (2, 0, 1):
        writer.write(slots[i], memoryview(pieces[i]))
        seen.append([offset for offset, _ in written])
    writer.finish()

    assert seen == [[], [0], [0, 4096]]
    assert [offset for offset, _ in written] == [0, 4096, 8192]
    assert (tmp_path / "x").read_bytes() == b"".join(pieces)


def test_without_a_size_or_on_request_writes_go_through_the_cache(
    storage: LocalStorage, tmp_path: Path, written: list[tuple[int, memoryview]]
) -> None:
    """The recorder would refuse a descriptor that isn't direct; this one is asked about its flags instead."""
    for writer in (
        storage.open_writer("no-size"),
        LocalStorage(tmp_path, direct=False).open_writer("on-request", size=BLOCK),
    ):
        assert not fcntl.fcntl(writer._file.fd, fcntl.F_GETFL) & os.O_DIRECT
        writer.abort()
    assert written == []


def test_only_aligned_reads_bypass_the_cache(storage: LocalStorage, tmp_path: Path, reads: list[Any]) -> None:
    data = os.urandom(2 * BLOCK + 100)
    (tmp_path / "x").write_bytes(data)
    reader, buffer = storage.open_reader("x"), memoryview(mmap.mmap(-1, 3 * BLOCK))

    for offset, memory, expected in [
        (0, buffer[:BLOCK], [(BLOCK, True)]),
        (BLOCK, buffer[: BLOCK + 100], [(BLOCK, True), (100, False)]),
        (BLOCK, buffer, [(3 * BLOCK, True)]),
        (1, buffer[:BLOCK], [(BLOCK, False)]),
        (0, buffer[1 : BLOCK + 1], [(BLOCK, False)]),
        (0, buffer[:4095], [(4095, False)]),
    ]:
        reads.clear()
        count = reader.read_into(offset, memory)
        assert reads == expected
        assert memory[:count] == data[offset : offset + len(memory)]


def test_opened_without_direct_io_nothing_bypasses_the_cache(tmp_path: Path, reads: list[Any]) -> None:
    storage = LocalStorage(tmp_path, direct=False)
    (tmp_path / "x").write_bytes(b"x" * BLOCK)

    assert storage.open_reader("x").read_into(0, memoryview(mmap.mmap(-1, BLOCK))) == BLOCK
    assert reads == [(BLOCK, False)]
    assert not storage.capabilities.direct_io
