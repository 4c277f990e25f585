"""Who wants a part of a tensor has only the blocks read that hold it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest

import ckptstore as cs
from ckptstore.engine.buffers import BufferPool
from ckptstore.engine.contents import read_contents
from ckptstore.engine.reader import read_tensors
from ckptstore.format.tensorfile import BLOCK_BYTES
from ckptstore.storage.memory import MemoryStorage

ROWS, WIDTH = 4096, 4096
"""Four blocks of float32; the header pushes the end of the last row into a fifth."""


@dataclass
class Part:
    """Some of a tensor."""

    region: tuple[tuple[int, ...], tuple[int, ...]]
    data: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.data = np.zeros(self.region[1], np.float32)

    def host(self) -> memoryview:
        return self.data.reshape(-1).view(np.uint8).data


@pytest.mark.parametrize(
    ("region", "blocks"),
    [
        (((0, 0), (1000, WIDTH)), 1),
        (((3000, 0), (1000, WIDTH)), 2),
        (((4095, 7), (1, 1)), 1),
        (((0, 100), (ROWS, 8)), 4),
        (((0, 4000), (ROWS, 8)), 5),
        (((0, 0), (0, WIDTH)), 0),
    ],
)
def test_only_blocks_that_overlap_are_read(
    region: tuple[tuple[int, ...], tuple[int, ...]], blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = np.arange(ROWS * WIDTH, dtype=np.float32).reshape(ROWS, WIDTH)
    with cs.open("memory://regions") as store:
        checkpoint = store.save({"w": whole}, step=1)
        contents = read_contents(store._storage, checkpoint.record)
        read: set[int] = set()
        real = MemoryStorage.open_reader

        def opened(self: MemoryStorage, key: str, **options: object) -> object:
            reader = real(self, key, **options)  # type: ignore[arg-type]
            inner = reader.read_into

            def read_into(offset: int, buffer: memoryview) -> int:
                read.add(offset // BLOCK_BYTES)
                return inner(offset, buffer)

            reader.read_into = read_into  # type: ignore[method-assign]
            return reader

        monkeypatch.setattr(MemoryStorage, "open_reader", opened)
        part = Part(region)
        read_tensors(store._storage, contents, {"w": part}, pool=BufferPool(1 << 26), threads=2)
    (row, column), (rows, columns) = region
    assert np.array_equal(part.data, whole[row : row + rows, column : column + columns])
    assert len(read) == blocks
