"""An engine for tests: tensors as bytes by name, the tree as JSON text."""

from __future__ import annotations

import json
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ckptstore.state import Restoration, TensorSpec, capture, restore_into, restore_plain


@dataclass
class Saved:
    """What an engine would have on storage."""

    text: str
    specs: list[TensorSpec]
    data: dict[str, bytes]
    parameters: int

    @property
    def tree(self) -> Any:
        """The tree, parsed anew."""
        return json.loads(self.text)


def save(state: object) -> Saved:
    """Capture and read everything, in two pieces per tensor."""
    snapshot = capture(state)
    data = {}
    for source in snapshot.sources:
        image = bytearray(source.nbytes)
        half = source.nbytes // 2
        source.read_into(half, memoryview(image)[half:])
        source.read_into(0, memoryview(image)[:half])
        source.release()
        data[source.spec.name] = bytes(image)
    assert len(data) == len(snapshot.sources), "names are unique"
    text = json.dumps(snapshot.tree, allow_nan=False)
    return Saved(text, [source.spec for source in snapshot.sources], data, snapshot.parameters)


def fill(restoration: Restoration, saved: Saved) -> Any:
    """Bring in the bytes that are wanted, and finish."""
    for name, destination in restoration.wanted.items():
        assert destination.nbytes == len(saved.data[name])
        if destination.nbytes:
            destination.host()[:] = saved.data[name]
    return restoration.finish()


def load(saved: Saved, **options: Any) -> Any:
    """A plain load."""
    return fill(restore_plain(saved.tree, saved.specs, **options), saved)


def load_into(saved: Saved, target: Any, **options: Any) -> Restoration:
    """A load in place."""
    restoration = restore_into(saved.tree, saved.specs, target, **options)
    assert fill(restoration, saved) is target
    return restoration


def bits(value: torch.Tensor) -> bytes:
    """The bytes of a tensor's elements, in C order."""
    carrier = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
    value = value.detach().resolve_conj().resolve_neg()
    if not value.numel():
        return b""
    return value.view(carrier[value.element_size()]).contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same(a: object, b: object) -> bool:
    """Whether two states are of the same types and the same bits, all the way down, in the same order."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        assert isinstance(b, torch.Tensor)
        alike = (a.dtype, a.shape, a.requires_grad) == (b.dtype, b.shape, b.requires_grad)
        return alike and bits(a) == bits(b)
    if isinstance(a, np.ndarray | np.generic):
        assert isinstance(b, np.ndarray | np.generic)
        if a.dtype.char in "gG":
            # The padding of extended precision has no value.
            return a.dtype.str == b.dtype.str and np.array_equal(a, b)
        return (a.dtype.str, a.shape, a.tobytes()) == (b.dtype.str, b.shape, b.tobytes())
    if isinstance(a, dict):
        assert isinstance(b, dict)
        return len(a) == len(b) and all(
            same(k, m) and same(v, w) for (k, v), (m, w) in zip(a.items(), b.items(), strict=True)
        )
    if isinstance(a, list | tuple | deque):
        assert isinstance(b, list | tuple | deque)
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float | complex):
        return np.array(a).tobytes() == np.array(b).tobytes()
    return bool(a == b)
