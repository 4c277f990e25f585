"""``auto`` compresses where that is faster, as it has measured, and nowhere else."""

from __future__ import annotations

import time

import numpy as np
import pytest

import ckptstore as cs
from ckptstore.engine.compressor import Compressor
from ckptstore.format.codecs import parse_compression

WEIGHTS = np.random.default_rng(0).standard_normal(1 << 18).astype("<f4")
SEGMENTS = [("F32", WEIGHTS.nbytes)]


def save(compressor: Compressor, write_s: float, blocks: int = 12) -> list[str]:
    """The codecs of some blocks, each of whose writes takes so long for each raw byte's worth."""
    codecs = []
    for _ in range(blocks):
        codec, stored = compressor.encode(memoryview(WEIGHTS).cast("B"), SEGMENTS)
        codecs.append(codec)
        with compressor.timed_write(len(stored)):
            time.sleep(write_s * len(stored) / WEIGHTS.nbytes)
    return codecs


def test_a_slow_storage_gets_compressed_blocks() -> None:
    """Half a second for a block of a megabyte is slower than any codec."""
    assert save(Compressor(parse_compression("auto"), threads=2), 0.5, blocks=5) == ["float-zstd"] * 5


def test_a_fast_storage_gets_them_as_they_are() -> None:
    """Where writing takes no time, only the first blocks are encoded, to measure."""
    codecs = save(Compressor(parse_compression("auto"), threads=2), 0.0)
    assert codecs == ["float-zstd"] * 2 + ["none"] * 10


def test_what_doesnt_shrink_is_never_encoded() -> None:
    """On random bytes the codec has nothing to offer, however slow the storage is."""
    compressor = Compressor(parse_compression("auto"), threads=2)
    noise = memoryview(np.random.default_rng(1).bytes(1 << 18))
    for _ in range(4):
        codec, stored = compressor.encode(noise, [("U8", len(noise))])
        with compressor.timed_write(len(stored)):
            time.sleep(0.2)
        assert codec == "none"
    assert not compressor._worth_it()


def test_other_settings_are_followed() -> None:
    """No measuring where the user has chosen."""
    for setting, codec in (("none", "none"), ("float-zstd", "float-zstd"), ("zstd:3", "zstd")):
        compressor = Compressor(parse_compression(setting), threads=2)
        data = np.zeros(1 << 16, "<f4")
        assert compressor.encode(memoryview(data).cast("B"), [("F32", data.nbytes)])[0] == codec
        assert compressor.encodes == (setting != "none")


@pytest.mark.parametrize("compression", ["auto", "float-zstd", "zstd"])
def test_whole_saves(compression: str) -> None:
    """Whatever is decided for each block, what was saved comes back and verifies."""
    values = {f"t{n}": WEIGHTS * n for n in range(40)}
    with cs.open(f"memory://compressor-{compression}", compression=compression) as store:
        store.save({"x": values}, step=1)
        loaded = store.load()["x"]
        assert all(np.array_equal(loaded[name], value) for name, value in values.items())
        assert store.verify().ok
