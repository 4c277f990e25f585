"""What is said of a tensor is what NumPy says of it, and nothing else is read."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ckptstore as cs
from ckptstore.format.tensorfile import BLOCK_BYTES
from ckptstore.tools.examine import TensorStats, examine_all
from tests.ranks import golden

_count = itertools.count()


def looked_at(tensor: Any, **options: Any) -> TensorStats:
    with cs.open(f"memory://examined-{next(_count)}", **options) as store:
        store.save({"t": tensor}, step=1)
        return cs.examine(store, "latest", "t")


def check(stats: TensorStats, values: np.ndarray[Any, Any]) -> None:
    """Beside the finite ones of ``values``, in fp64."""
    finite = values[np.isfinite(values)]
    assert (stats.elements, stats.nan) == (values.size, int(np.isnan(values).sum()))
    assert stats.inf == values.size - finite.size - int(np.isnan(values).sum())
    assert stats.zeros == int((values == 0).sum())
    if not finite.size:
        assert (stats.min, stats.mean, stats.percentiles, stats.counts) == (None, None, None, ())
        return
    assert (stats.min, stats.max) == (finite.min(), finite.max())
    size = float(np.abs(finite).max())
    assert stats.mean == pytest.approx(finite.mean(), abs=1e-12 * size)
    assert stats.std == pytest.approx(finite.std(), rel=1e-6, abs=1e-9 * size)
    assert stats.norm == pytest.approx(float(np.linalg.norm(finite)), rel=1e-9)
    assert sum(stats.counts) == finite.size
    assert len(stats.edges) == len(stats.counts) + 1
    inner = np.histogram(finite, np.array(stats.edges))[0]
    # At an edge the last bit may say otherwise.
    assert np.abs(np.cumsum(inner) - np.cumsum(stats.counts)).max() <= 0.02 * finite.size + 1


DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2, torch.int64, torch.int8,
          torch.uint16, torch.uint64, torch.bool]  # fmt: skip


@given(st.data())
def test_small_ones(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(DTYPES))
    if dtype.is_floating_point:
        extra = st.sampled_from([math.nan, math.inf, -math.inf, 0.0, -0.0])
        values = data.draw(st.lists(st.one_of(st.floats(-100, 100), extra), max_size=30))
        tensor = torch.tensor(values, dtype=torch.float64).to(dtype)
    else:
        tensor = torch.tensor(data.draw(st.lists(st.integers(0, 1 if dtype is torch.bool else 120), max_size=30)))
        tensor = tensor.to(dtype)
    stats = looked_at(tensor)
    check(stats, tensor.to(torch.float64).numpy())
    assert stats.shape == tuple(tensor.shape)
    assert stats.nbytes == tensor.nbytes
    np.testing.assert_equal(list(stats.first), tensor.double().tolist()[:8])
    if not dtype.is_floating_point and stats.min is not None:
        assert type(stats.min) is int


def test_one_of_several_blocks_is_read_once() -> None:
    tensor = torch.randn(4_500_000, generator=torch.Generator().manual_seed(3))
    tensor[123] = math.nan
    with cs.open("memory://examined-large", compression="zstd") as store:
        store.save({"other": torch.zeros(4_500_000), "m": {"t": tensor, "u": torch.zeros(5)}}, step=1)
        with store.reader("latest") as reader:
            from ckptstore.tools.examine import described

            [stats] = described(reader, ["m/t"], None)
            [file] = [file for file in reader.contents.files if file.entry.name.startswith("m.")]
            assert reader.read_bytes == sum(block.length for block in file.entry.blocks)
    check(stats, tensor.double().numpy())
    assert stats.percentiles is not None
    spread = float(stats.max) - float(stats.min)  # type: ignore[arg-type]
    for percent, value in stats.percentiles.items():
        assert value == pytest.approx(np.nanpercentile(tensor.numpy(), percent), abs=spread / 4000)
    [home] = stats.homes
    assert home.key.endswith("/m.blocks")
    assert (home.first, home.last) == (0, len(tensor) * 4 // BLOCK_BYTES)
    assert set(home.codecs) <= {"zstd", "none"}


def test_complex_numbers_are_described_by_their_size() -> None:
    tensor = torch.tensor([3 + 4j, 0, complex(math.nan, 0)])
    for one in (tensor, tensor.to(torch.complex128)):
        stats = looked_at(one.reshape(3, 1))
        assert (stats.shape, stats.min, stats.max, stats.nan, stats.zeros) == ((3, 1), 0.0, 5.0, 1, 1)
        assert (stats.norm, list(stats.first[:2])) == (5.0, [3 + 4j, 0j])


def test_a_scalar_an_empty_one_and_equal_numbers() -> None:
    scalar = looked_at(torch.tensor(2.5))
    assert (scalar.shape, scalar.min, scalar.max, scalar.std, scalar.first) == ((), 2.5, 2.5, 0.0, [2.5])
    assert scalar.percentiles is not None
    assert set(scalar.percentiles.values()) == {2.5}
    empty = looked_at(torch.empty(0, 4))
    assert (empty.shape, empty.elements, empty.first, empty.min, empty.nan) == ((0, 4), 0, [], None, 0)
    large = looked_at(torch.full((100,), 2**60, dtype=torch.int64))
    assert (large.min, large.max, large.std) == (2**60, 2**60, 0.0)


def test_the_widest_range_has_a_histogram() -> None:
    most = torch.finfo(torch.float64).max
    wide = looked_at(torch.tensor([-most, 0.0, 1.0, most], dtype=torch.float64))
    assert (sum(wide.counts), wide.counts[0], wide.counts[-1]) == (4, 1, 1)
    assert all(math.isfinite(edge) for edge in wide.edges)
    tiny = looked_at(torch.tensor([0.0, 5e-324, 1e-323], dtype=torch.float64))
    assert (sum(tiny.counts), tiny.counts[0]) == (3, 1)


def test_what_are_no_numbers() -> None:
    texts = looked_at(np.array(["one", "two"]))
    assert (texts.dtype, texts.shape, list(texts.first), texts.min) == ("numpy:<U3", (2,), ["one", "two"], None)
    dates = looked_at(np.array(["2020-01-02"], "M8[D]"))
    assert (dates.first, dates.nan) == (["2020-01-02"], None)
    numbers = looked_at(np.array([[1.5, 2.5]]))
    assert (numbers.shape, numbers.mean) == ((1, 2), 2.0)


def test_shards_are_one_tensor() -> None:
    with cs.open(golden.PLACE, read_only=True, ranks="one") as store:
        model = store.load("latest")["model"]
        found = examine_all(store, "latest", ["model/*"])
    assert {stats.name.removeprefix("model/") for stats in found} == set(model)
    for stats in found:
        check(stats, model[stats.name.removeprefix("model/")].detach().double().numpy())
    assert max(len(stats.homes) for stats in found) == golden.SIZE


def test_a_misspelt_name_is_told_what_is_like_it() -> None:
    with cs.open("memory://examined-names") as store:
        store.save({"model": {"layers.0.weight": torch.zeros(1), "[odd]": torch.zeros(1)}}, step=1)
        for wrong in ("model/layer.0.weigth", "layers.0.wieght"):
            with pytest.raises(cs.NotFoundError, match=r"did you mean model/layers.0.weight\?"):
                cs.examine(store, "latest", wrong)
        with pytest.raises(cs.NotFoundError, match="it has model/"):
            examine_all(store, "latest", ["model/*", "zzz*"])
        assert cs.examine(store, "latest", "model/[odd]").elements == 1
        assert [stats.name for stats in examine_all(store, "latest", ["model/[odd]"])] == ["model/[odd]"]
