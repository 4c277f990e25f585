"""An import holds neither the file nor the state in memory, in none of both processes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import ckptstore as cs
from ckptstore.tools.importing import plain, reader
from ckptstore.tools.importing.sandbox import Reader
from tests.tools.test_importing import boxes

MIB = 1 << 20
LIMIT = 64 * MIB
"""The store's buffers are half of it, a block on its way through the reader is a quarter."""


def anonymous_bytes(pid: int) -> int:
    """Memory of a process that is no file's."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.partition("RssAnon:")[2].split()[0]) << 10


class Watched:
    """The most memory that reader and importer had beyond what they began with, looked at whenever bytes are read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.looks = 0
        self.own = self.reader = 0
        self._begin = anonymous_bytes(os.getpid())
        self._readers: dict[int, int] = {}
        read, opened = Reader.read, Reader.open

        def reading(one: Reader, index: int, offset: int, out: memoryview) -> None:
            read(one, index, offset, out)
            self.look(one.pid)

        def opening(one: Reader, *args: object, **options: object) -> object:
            self._readers[one.pid] = anonymous_bytes(one.pid)
            answer = opened(one, *args, **options)  # type: ignore[arg-type]
            self.look(one.pid)
            return answer

        monkeypatch.setattr(Reader, "read", reading)
        monkeypatch.setattr(Reader, "open", opening)

    def look(self, pid: int | None = None) -> None:
        self.looks += 1
        self.own = max(self.own, anonymous_bytes(os.getpid()) - self._begin)
        if pid is not None:
            self.reader = max(self.reader, anonymous_bytes(pid) - self._readers[pid])


def archive(path: Path, rows: int) -> Path:
    """A contiguous tensor, and one of the same size that isn't."""
    half = torch.arange(rows << 17, dtype=torch.int32).reshape(-1, 512)
    torch.save({"a": half, "b": half.clone().t(), "step": 1}, path / "a.pt")
    return path / "a.pt"


def safetensors(path: Path, rows: int) -> Path:
    save_file({"w": torch.arange(rows << 18, dtype=torch.int32)}, path / "a.safetensors")
    return path / "a.safetensors"


def pieces(path: Path, rows: int) -> Path:
    """A folder of DCP, its tensor in eight pieces."""
    whole = torch.arange(rows << 18, dtype=torch.int32).reshape(-1, 512)
    step = len(whole) // 8
    return boxes(path / "dcp", whole, *((slice(n * step, (n + 1) * step), slice(0, 512)) for n in range(8)))


def check(make: Callable[[Path, int], Path], rows: int, path: Path, monkeypatch: pytest.MonkeyPatch) -> Watched:
    """Import a file of so many MiB; both processes stay below a limit that doesn't depend on it."""
    source = make(path, rows)
    with cs.open(path / "store", pool_bytes=32 * MIB) as store:
        watched = Watched(monkeypatch)
        report = cs.import_from(source, store, step=1, progress=lambda done, total: watched.look())
        assert report.checkpoints[0].raw_bytes >= rows * MIB
    assert watched.looks > rows // 16
    assert watched.own < LIMIT
    assert watched.reader < LIMIT
    return watched


@pytest.mark.usefixtures("sandbox")
@pytest.mark.parametrize("make", [archive, safetensors, pieces])
def test_memory(make: Callable[[Path, int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(make, 80, tmp_path, monkeypatch)


@pytest.mark.full
@pytest.mark.usefixtures("sandbox")
@pytest.mark.parametrize("make", [archive, safetensors])
def test_memory_of_four_gigabytes(
    make: Callable[[Path, int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(make, 4096, tmp_path, monkeypatch)


def test_lists_that_name_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """A list of two lists of two lists, each of them one in memory, ends the walk, not the memory."""
    monkeypatch.setattr(plain, "_MAX_VALUES", 10_000)
    value: list[object] = [{}]
    for _ in range(90):
        value = [value, value]
    with pytest.raises(cs.FormatError, match="again and again"):
        plain.Plainer().walk({"x": value}, "")
    monkeypatch.setattr(plain, "_MAX_PLAIN", 10_000)
    with pytest.raises(cs.FormatError, match="again and again"):
        plain.Plainer().walk([[1] * 1000] * 11, "")


@pytest.mark.parametrize("piece", [1, 7, 64, 1 << 20])
def test_any_bytes_of_a_tensor_that_is_not_contiguous(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long its rows are."""
    monkeypatch.setattr(reader, "_PIECE", piece)
    base = torch.arange(2 * 3 * 4 * 5, dtype=torch.int32).reshape(2, 3, 4, 5)
    for tensor in (base.permute(3, 1, 0, 2), base.transpose(0, 3), base[..., ::2], base[:, 0, 0].t()):
        image = tensor.contiguous().numpy().tobytes()
        for offset in range(0, len(image), 13):
            for length in (1, 10, len(image) - offset):
                length = min(length, len(image) - offset)
                assert bytes(reader._by_rows(tensor, offset, length)) == image[offset : offset + length]
