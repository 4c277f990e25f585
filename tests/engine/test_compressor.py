"""``auto`` compresses where that is faster, as it has measured, and nowhere else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import ckptstore as cs
import ckptstore.engine.compressor as module
from ckptstore.engine.compressor import Compressor
from ckptstore.format.codecs import parse_compression

WEIGHTS = np.random.default_rng(0).standard_normal(1 << 18).astype("<f4")
SEGMENTS = [("F32", WEIGHTS.nbytes)]


class Clock:
    """Time that passes only where a test says so: a busy machine decides nothing here."""

    CODEC_S = 0.01
    """For one call of the codec."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    thread_time = perf_counter


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    real = module.encode

    def encode(*arguments: Any) -> Any:
        clock.now += clock.CODEC_S
        return real(*arguments)

    monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(module, "encode", encode)
    return clock


def save(clock: Clock, raw: memoryview, segments: list[tuple[str, int]], write_s: float, blocks: int = 12) -> list[str]:
    """The codecs of some blocks, each of whose writes takes so long for each raw byte's worth."""
    compressor, codecs = Compressor(parse_compression("auto"), threads=2), []
    for _ in range(blocks):
        codec, stored = compressor.encode(raw, segments)
        codecs.append(codec)
        with compressor.timed_write(len(stored)):
            clock.now += write_s * len(stored) / len(raw)
    return codecs


def test_a_slow_storage_gets_compressed_blocks(clock: Clock) -> None:
    """Writing takes fifty times as long as the codec."""
    assert save(clock, memoryview(WEIGHTS).cast("B"), SEGMENTS, 0.5) == ["float-zstd"] * 12
    assert clock.now > 12 * clock.CODEC_S


def test_a_fast_storage_gets_them_as_they_are(clock: Clock) -> None:
    """Where writing takes next to no time, only the first blocks are encoded, to measure."""
    codecs = save(clock, memoryview(WEIGHTS).cast("B"), SEGMENTS, 1e-6)
    assert codecs == ["float-zstd"] * 2 + ["none"] * 10


def test_what_doesnt_shrink_is_never_encoded(clock: Clock) -> None:
    """On random bytes the codec has nothing to offer, however slow the storage is: it isn't asked after the trial."""
    noise = memoryview(np.random.default_rng(1).bytes(1 << 18))
    assert save(clock, noise, [("U8", len(noise))], 1.0) == ["none"] * 12
    assert clock.now == pytest.approx(12 * 1.0 + 2 * clock.CODEC_S)


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
