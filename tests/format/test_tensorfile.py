"""Data files: what is written opens in safetensors' own reader, and each byte belongs to exactly one block."""

from __future__ import annotations

import json
import struct
from itertools import pairwise
from pathlib import Path
from uuid import uuid4

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load, save

from ckptstore.errors import FormatError
from ckptstore.format import tensorfile
from ckptstore.format.tensorfile import BLOCK_BYTES, HEADER_ALIGNMENT, ITEM_BYTES, TensorFile, TensorRow, storage_order
from tests.integrity import stores
from tests.integrity.stores import MemoryRaw, Source, Spec, State, opened

NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1"}
NUMPY |= {"U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?"}
texts = st.text(min_size=1, max_size=30).filter(lambda text: text != "__metadata__")
shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)


def rows_of(dtypes: list[str]) -> st.SearchStrategy[list[TensorRow]]:
    one = st.builds(TensorRow, texts, st.sampled_from(dtypes), shapes)
    return st.lists(one, max_size=8, unique_by=lambda row: row.name).map(storage_order)


@given(rows_of(sorted(NUMPY)), st.integers(0, 1 << 32))
def test_safetensors_reads_what_is_laid_out(rows: list[TensorRow], seed: int) -> None:
    """Names, types, shapes and bytes come back in the reader of the format's authors."""
    rng = np.random.default_rng(seed)
    arrays = {row.name: rng.integers(0, 2, row.shape).astype(NUMPY[row.dtype]) for row in rows}
    stream = TensorFile.of(rows)
    data = stream.header + b"".join(arrays[row.name].tobytes() for row in stream.rows)
    assert len(data) == stream.raw_bytes
    found = load(data)
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)


@given(rows_of(sorted(ITEM_BYTES)))
def test_headers(rows: list[TensorRow]) -> None:
    """A page's multiple of plain JSON without gaps, each tensor aligned to its elements."""
    stream = TensorFile.of(rows)
    [length] = struct.unpack("<Q", stream.header[:8])
    assert len(stream.header) == length + 8
    assert len(stream.header) % HEADER_ALIGNMENT == 0
    table = json.loads(stream.header[8:])
    assert table.pop("__metadata__") == {"format": "pt"}
    assert list(table) == [row.name for row in rows]
    end = 0
    for row in rows:
        begin, after = table[row.name]["data_offsets"]
        assert begin == end
        assert begin % ITEM_BYTES[row.dtype] == 0 or after == begin
        assert after - begin == row.nbytes
        assert table[row.name]["shape"] == list(row.shape)
        end = after
    assert len(stream.header) + end == stream.raw_bytes


@given(rows_of(sorted(ITEM_BYTES)))
def test_segments_follow_the_table(rows: list[TensorRow]) -> None:
    """The header is U8, then each byte has the type of the tensor it is in, and neighbours of one type are one."""
    stream = TensorFile.of(rows)
    expected = ["U8"] * len(stream.header) + [row.dtype for row in rows for _ in range(row.nbytes)]
    found = stream.segments(0)
    assert [dtype for dtype, length in found for _ in range(length)] == expected
    assert all(a != b for (a, _), (b, _) in pairwise(found))


def test_segments_of_blocks_that_begin_amid_a_tensor() -> None:
    rows = [TensorRow("a", "F64", (BLOCK_BYTES // 4,)), *(TensorRow(f"b{n:04}", "F32", (1000,)) for n in range(9000))]
    stream = TensorFile.of([*rows, TensorRow("c", "BF16", (5,))])
    blocks = [stream.segments(number) for number in range(len(stream.block_lengths))]
    assert [sum(length for _, length in found) for found in blocks] == stream.block_lengths
    head = len(stream.header)
    assert blocks[:2] == [[("U8", head), ("F64", BLOCK_BYTES - head)], [("F64", BLOCK_BYTES)]]
    assert blocks[2] == [("F64", head), ("F32", BLOCK_BYTES - head)]
    assert blocks[-1][-1] == ("BF16", 10)


def test_a_file_as_saved_opens(tmp_path: Path) -> None:
    """safe_open finds every tensor, of every type, in a file as it lies in the store."""
    raw = MemoryRaw(uuid4().hex)
    content = {dtype: bytes(n % 2 for n in range(6 * size)) for dtype, size in ITEM_BYTES.items()}
    sources = [Source(Spec(f"model/{dtype}", dtype, (3, 2)), data) for dtype, data in content.items()]
    with opened(raw.url) as store:
        id = stores.save(store, State(sources, {}), 1).id
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw.get(f"checkpoints/{id}/model.safetensors"))
    with safe_open(path, framework="numpy") as file:
        assert sorted(file.keys()) == sorted(ITEM_BYTES)
        for dtype, data in content.items():
            assert file.get_slice(dtype).get_dtype() == dtype
            assert file.get_slice(dtype).get_shape() == [3, 2]
            if dtype in NUMPY:
                assert file.get_tensor(dtype).tobytes() == data


def test_the_header_is_that_of_safetensors_but_for_order_and_padding() -> None:
    arrays = {"b": np.zeros(3, "<f4"), "a": np.zeros((2, 2), "<f4"), "c": np.zeros(1, "u1")}
    stream = TensorFile.of([TensorRow("a", "F32", (2, 2)), TensorRow("b", "F32", (3,)), TensorRow("c", "U8", (1,))])
    theirs = save(arrays, metadata={"format": "pt"})
    [length] = struct.unpack("<Q", theirs[:8])
    assert json.loads(stream.header[8:]) == json.loads(theirs[8 : 8 + length])


class TestBlocks:
    """With blocks of 64 KiB, so that small files have several."""

    @pytest.fixture(autouse=True)
    def small_blocks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tensorfile, "BLOCK_BYTES", 1 << 16)

    @pytest.mark.parametrize("seed", range(30))
    def test_pieces_cover_each_byte_exactly_once(self, seed: int) -> None:
        """The header's part and the pieces of each block, put together, are the stream."""
        rng = np.random.default_rng(seed)
        dtypes = sorted(ITEM_BYTES)
        sizes = [0, 1, 7, 4096, 30_000, 65_536, 61_440, 100_000]
        rows = storage_order(
            TensorRow(f"t{n}", dtypes[rng.integers(len(dtypes))], (int(rng.choice(sizes)),))
            for n in range(rng.integers(9))
        )
        stream = TensorFile.of(rows)
        covered = bytearray(stream.raw_bytes)
        taken = [0] * len(rows)
        for number, length in enumerate(stream.block_lengths):
            start = number << 16
            head = stream.header_part(number)
            assert stream.header[start : start + len(head)] == head
            at = len(head)
            covered[start : start + len(head)] = b"\1" * len(head)
            for index, begin, count, offset in stream.pieces(number):
                assert offset == at
                assert begin == taken[index]
                assert begin % ITEM_BYTES[rows[index].dtype] == 0, "an element straddles two blocks"
                at += count
                taken[index] += count
                covered[start + offset : start + offset + count] = b"\1" * count
            assert at == length
        assert covered == b"\1" * stream.raw_bytes
        assert taken == [row.nbytes for row in rows]

    @pytest.mark.parametrize("length", [0, 1, 61_439, 61_440, 61_441, 126_976, 126_977])
    def test_borders(self, length: int) -> None:
        """Exactly full blocks are followed by none."""
        stream = TensorFile.of([TensorRow("t", "U8", (length,))])
        lengths = stream.block_lengths
        assert sum(lengths) == stream.raw_bytes == 4096 + length
        assert all(n == 1 << 16 for n in lengths[:-1])
        assert 0 < lengths[-1] <= 1 << 16

    def test_a_header_of_several_blocks(self) -> None:
        rows = [TensorRow(f"{n:0400d}", "U8", (1,)) for n in range(400)]
        stream = TensorFile.of(rows)
        assert len(stream.header) > 2 << 16
        assert b"".join(stream.header_part(n) for n in range(len(stream.block_lengths))) == stream.header
        assert stream.pieces(0) == []
        assert sum(len(stream.pieces(n)) for n in range(len(stream.block_lengths))) == 400


def test_a_file_without_tensors() -> None:
    stream = TensorFile.of([])
    assert load(stream.header) == {}
    assert stream.block_lengths == [4096]


def test_the_block_is_16_mib() -> None:
    assert BLOCK_BYTES == 16 * 1024 * 1024


@pytest.mark.parametrize(
    "rows",
    [
        [TensorRow("a", "F32", (1,)), TensorRow("a", "F32", (1,))],
        [TensorRow("b", "F32", (1,)), TensorRow("a", "F32", (1,))],
        [TensorRow("a", "F32", (1,)), TensorRow("b", "F64", (1,))],
        [TensorRow("__metadata__", "F32", (1,))],
        [TensorRow("a", "F31", (1,))],
        [TensorRow("a", "F32", (-1,))],
        [TensorRow("a", "F32", (1 << 48,))],
        [TensorRow("a", "F32", (0, 2**63 - 1))],
        [TensorRow("a", "F32", (1 << 30, 1 << 30))],
        [TensorRow("a", "F32", (1,) * 65)],
    ],
)
def test_what_is_refused(rows: list[TensorRow]) -> None:
    with pytest.raises(FormatError):
        TensorFile.of(rows)


def test_shapes_at_the_limit() -> None:
    """The largest that are allowed are laid out without being allocated."""
    stream = TensorFile.of([TensorRow("a", "F64", ((1 << 48) - 1, 4095)), TensorRow("b", "U8", (1,) * 64)])
    assert stream.raw_bytes == len(stream.header) + 8 * ((1 << 48) - 1) * 4095 + 1
