"""Files as other programs write them, and as nobody should."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import Counter, OrderedDict, defaultdict, deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch


def tensors() -> dict[str, torch.Tensor]:
    """Every kind of tensor that ``torch.save`` takes."""
    torch.manual_seed(3)
    base = torch.randn(6, 7)
    codes = (
        "float64 float32 float16 bfloat16 complex64 complex128 int64 int32 int16 int8 uint8 uint16 uint32 uint64 "
        "float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz"
    ).split()
    made = {code: torch.arange(10).to(getattr(torch, code)) for code in codes}
    return made | {
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 3),
        "nan": torch.tensor([float("nan"), float("-inf"), -0.0]),
        "base": base,
        "transposed": base.t(),
        "rows": base[1:3],
        "columns": base[:, ::2],
        "conjugated": torch.randn(3, 2, dtype=torch.complex64).t().conj(),
        "parameter": torch.nn.Parameter(torch.randn(2, 2)),
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    }


def values() -> dict[str, Any]:
    """Plain values of all kinds that a training's state has."""
    return {
        "numbers": [0, -1, 2**53 + 1, -(2**200), 1.5, float("inf"), True, None, 1 + 2j],
        "texts": ["", "naïve ☃", "a/b", "$"],
        "bytes": [b"", b"x" * 5000, bytearray(b"y")],
        "containers": {
            "tuple": (1, (2, [3])),
            "set": {1, 2},
            "frozen": frozenset("ab"),
            "ordered": OrderedDict([("b", 1), ("a", torch.ones(2))]),
            "counter": Counter("abca"),
            "deque": deque([1, 2, 3], maxlen=4),
            "default": defaultdict(list, {"k": [1]}),
            "namespace": SimpleNamespace(lr=0.1, deep=SimpleNamespace(x=torch.zeros(3))),
            3: "a number as key",
            (1, "a"): "a tuple as key",
            "$": "a tag",
        },
        "torch": [torch.Size([2, 3]), torch.bfloat16, torch.device("cpu")],
        "numpy": [np.float32(2.5), np.int64(7), np.bool_(True), np.arange(6.0).reshape(2, 3).T, np.zeros(0, np.int8)],
        "random": np.random.RandomState(5).get_state(),
        "same": [torch.ones(3)] * 2,
    }


def same(one: Any, other: Any) -> bool:
    """Whether two values are the same, to the last bit."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        alike = (one.dtype, one.shape, one.requires_grad) == (other.dtype, other.shape, other.requires_grad)
        return alike and image(one) == image(other)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    if isinstance(one, SimpleNamespace):
        return same(vars(one), vars(other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple | deque):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def image(tensor: torch.Tensor) -> bytes:
    """Its elements in order, as bytes."""
    plain = tensor.detach().resolve_conj().contiguous()
    return bytes(plain.reshape(-1).view(torch.uint8).numpy().tobytes()) if plain.numel() else b""


class Reduced:
    """Pickled, it calls a function when it is loaded."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.how = function, arguments

    def __reduce__(self) -> Any:
        return self.how


class Foreign:
    """An object of a class of somebody's own."""

    def __init__(self) -> None:
        self.x = 1


class Items(list[int]):
    """A list of a class of somebody's own."""


class Names(dict[str, int]):
    """A dict of a class of somebody's own."""


def archive(path: Path, data: bytes, *records: bytes, compress: bool = False) -> Path:
    """An archive as ``torch.save`` writes it, of this pickle and these storages."""
    kind = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", kind) as made:
        made.writestr("archive/data.pkl", data)
        made.writestr("archive/byteorder", b"little")
        for number, record in enumerate(records):
            made.writestr(f"archive/data/{number}", record)
        made.writestr("archive/version", b"3\n")
    return path


def lying_tensor(path: Path, size: tuple[int, ...], stride: tuple[int, ...], elements: int = 4) -> Path:
    """A file with a tensor that says it is ``size``, over a storage that says it has ``elements`` and has four."""
    storage = object()

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", elements) if value is storage else None

    stream = io.BytesIO()
    arguments = (storage, 0, size, stride, False, OrderedDict())
    rebuilt = Reduced(torch._utils._rebuild_tensor_v2, *arguments)
    Pickler(stream, 2).dump({"w": rebuilt, "step": 1})
    return archive(path, stream.getvalue(), bytes(16))
