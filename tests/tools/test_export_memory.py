"""Exports take no more memory for a large checkpoint than for a small one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ckptstore as cs
from ckptstore.engine.streamed import Computed, Streamed
from ckptstore.engine.tensorreader import BlockCache
from ckptstore.format.tensorfile import BLOCK_BYTES, TensorRow
from ckptstore.tools import export as exporting

MB = 1 << 20


def anonymous_bytes() -> int:
    """Memory of this process that is no file's."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) << 10


def numbers(name: str, megabytes: int) -> Computed:
    """A float32 tensor that is made while it is written."""

    def fill(offset: int, out: memoryview) -> None:
        out[:] = bytes([offset // MB % 64]) * len(out)

    return Computed(TensorRow(name, "F32", (megabytes, MB // 4)), fill)


def save(store: cs.Store, sizes_mb: list[int]) -> None:
    """A model with weights of these sizes."""
    sources = [numbers(f"model/{number:04}", size) for number, size in enumerate(sizes_mb)]
    nodes: Any = {source.spec.name[6:]: {"$": "tensor", "name": source.spec.name} for source in sources}
    store.save_streamed(Streamed({"model": nodes}, sources, 0), step=1)


def growth(store: cs.Store, path: Path, **options: Any) -> tuple[int, cs.ExportReport]:
    """How much the memory grows by an export."""
    seen: list[int] = []
    # Once for what is imported, and made for good.
    cs.export(store, "latest", path, only=["model/0000"], **options)
    before = anonymous_bytes()
    report = cs.export(
        store, "latest", path, progress=lambda *_: seen.append(anonymous_bytes()), overwrite=True, **options
    )
    return max(seen) - before, report


pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells")


@pytest.mark.parametrize("to", ["hf", "dcp"])
def test_a_few_blocks_are_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: Any) -> None:
    """Of tensors that are larger than what may be in memory, and of many small ones."""
    monkeypatch.setattr(exporting, "_cache", lambda checkpoint: BlockCache(2 * BLOCK_BYTES))
    with cs.open(tmp_path / "store") as store:
        save(store, [2, 140, *[2] * 30])
        grown, report = growth(store, tmp_path / "out", to=to)
    assert report.written_bytes > 200 * MB
    assert grown < 140 * MB


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[cs.Store]:
    place = tmp_path_factory.mktemp("export") / "store"
    with cs.open(place) as store:
        save(store, [8, 1024, 500, *[10] * 260])
        yield store
    shutil.rmtree(place)


@pytest.mark.full
@pytest.mark.parametrize("dtype", [None, "bf16"])
@pytest.mark.parametrize("to", ["hf", "safetensors", "torch", "dcp"])
def test_four_gigabytes_in_one(large: cs.Store, tmp_path: Path, to: Any, dtype: Any) -> None:
    """With the memory for blocks that it has by itself."""
    grown, report = growth(large, tmp_path / "out", to=to, dtype=dtype)
    # pytest keeps what tests leave.
    shutil.rmtree(tmp_path)
    assert report.written_bytes > (4 << 30) // (2 if dtype else 1)
    assert grown < 600 * MB
