"""How fast ``store.verify()`` reads a store from a cold page cache, beside plain direct reads of as many bytes."""

from __future__ import annotations

import os
from typing import Any

import ckptstore as cs
from benchmarks.rounds import timed
from benchmarks.workload import GPT2, Size, Workload
from ckptstore.tools.subjects import SUBJECTS, drop_cache
from ckptstore.tools.turns import Tell, turns


def measure(folder: str, rounds: int, *, size: Size = GPT2, tell: Tell | None = None) -> dict[str, Any]:
    """Seconds of each round: ``verify_s``, and ``raw_s`` of 16 MiB blocks read by two threads and not hashed."""
    workload = Workload(size)
    tensors = workload.tensors()
    place = os.path.join(folder, "store")
    found: dict[str, list[float]] = {"verify": [], "raw": []}
    with cs.open(place) as store, SUBJECTS["raw"](os.path.join(folder, "raw"), workload.bytes) as raw:
        store.save(workload.state, step=1)
        raw.save(tensors)

        def verify() -> None:
            assert store.verify().ok

        verify()
        for name in turns(tuple(found), rounds, tell):
            drop_cache(place if name == "verify" else raw.place)
            found[name].append(timed(verify if name == "verify" else lambda: raw.load(tensors)))
    return {"bytes": workload.bytes, "verify_s": found["verify"], "raw_s": found["raw"]}
