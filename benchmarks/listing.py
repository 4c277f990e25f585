"""How long it takes to list a store of 10,000 checkpoints, each time from nothing."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import ckptstore as cs
from ckptstore.format import layout
from ckptstore.format.records import seal


def measure(folder: str, *, checkpoints: int = 10_000, rounds: int = 5) -> dict[str, Any]:
    """Seconds of ``store.checkpoints()`` in a new store object."""
    with tempfile.TemporaryDirectory(dir=folder) as root:
        with cs.open(root) as store:
            first = store.save({"x": 1}, step=0, metrics={"val_loss": 3.0}, reasons=["every 250 steps"])
        for seq in range(2, checkpoints + 1):
            id = layout.new_id(1, seq, seq * 250)
            record = first.record.model_copy(update={"id": str(id), "step": id.step})
            Path(root, layout.commit_key(id)).write_bytes(seal(record))
        seconds = []
        for _ in range(rounds):
            begin = time.perf_counter()
            with cs.open(root, read_only=True) as store:
                assert len(store.checkpoints()) == checkpoints
            seconds.append(time.perf_counter() - begin)
    return {"checkpoints": checkpoints, "seconds": seconds, "median_s": statistics.median(seconds)}
