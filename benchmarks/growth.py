"""How the seconds of durable saves and cold loads grow with the bytes, and with the number of tensors."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import tensors
from benchmarks.rounds import settle, timed
from ckptstore.tools.subjects import SUBJECTS, drop_cache
from ckptstore.tools.throughput import gpt_state
from ckptstore.tools.turns import Tell, turns

SAVERS = ("ckptstore", "torch")
SIZES_BYTES = (100_000_000, 300_000_000, 1_000_000_000, 3_000_000_000, 10_000_000_000)
COUNTS = (100, 1_000, 10_000, 100_000)
"""Tensors of 1 KiB."""

_MARGIN_BYTES = 2 << 30
_WARM_UP_BYTES = 1 << 20


def measure(
    folder: str,
    rounds: int,
    *,
    sizes_bytes: Sequence[int] = SIZES_BYTES,
    counts: Sequence[int] = COUNTS,
    names: tuple[str, ...] = SAVERS,
    tell: Tell | None = None,
) -> dict[str, Any]:
    """``by_bytes`` and ``by_tensors``: a list of ``{"bytes", "tensors", "savers": {name: {"save_s", "load_s"}}}``.

    A load brings the tensors into memory that is there. Where another copy of them would not fit beside it,
    ``load_s`` of a saver that needs one is empty.
    """
    warm_up = gpt_state(_WARM_UP_BYTES)
    for name in names:
        # What is imported and set up at the first use is not what is measured.
        _once(name, folder, warm_up)
    by_bytes = [_point(gpt_state(size), folder, rounds, names, tell) for size in sizes_bytes]
    by_tensors = [_point(tensors.many(count), folder, rounds, names, tell) for count in counts]
    return {"by_bytes": by_bytes, "by_tensors": by_tensors}


def _point(
    state: dict[str, torch.Tensor], folder: str, rounds: int, names: tuple[str, ...], tell: Tell | None
) -> dict[str, Any]:
    found: dict[str, dict[str, list[float]]] = {name: {"save_s": [], "load_s": []} for name in names}
    size = sum(tensor.nbytes for tensor in state.values())
    for name in turns(names, rounds, tell):
        save_s, load_s = _once(name, folder, state)
        found[name]["save_s"].append(save_s)
        found[name]["load_s"] += load_s
    return {"bytes": size, "tensors": len(state), "savers": found}


def _once(name: str, folder: str, state: dict[str, torch.Tensor]) -> tuple[float, list[float]]:
    """Seconds of a save, and of a load into the same tensors, if there is memory for it."""
    size = sum(tensor.nbytes for tensor in state.values())
    with SUBJECTS[name](os.path.join(folder, name), size) as subject:
        save_s = timed(lambda: subject.save(state))
        drop_cache(subject.place)
        fits = name == "ckptstore" or size + _MARGIN_BYTES < _available_bytes()
        load_s = [timed(lambda: subject.load(state))] if fits else []
    settle()
    return save_s, load_s


def _available_bytes() -> int:
    """Memory that can be had without swapping."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
