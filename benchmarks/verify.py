"""How fast ``store.verify()`` reads a store from a cold page cache, beside plain direct reads of as many bytes."""

from __future__ import annotations

import os
from typing import Any

import ckptstore as cs
from benchmarks.rounds import timed
from benchmarks.workload import GPT2, Size, Workload
from ckptstore.engine.workers import cores, run
from ckptstore.format.digest import BLOCK_DIGEST, block_digest
from ckptstore.format.tensorfile import BLOCK_BYTES
from ckptstore.tools.subjects import SUBJECTS, drop_cache
from ckptstore.tools.turns import Tell, turns

_BLOCKS = 16
"""Different ones: more than the cores keep in their caches."""


def measure(folder: str, rounds: int, *, size: Size = GPT2, tell: Tell | None = None) -> dict[str, Any]:
    """Seconds of each round: ``verify_s``; ``raw_s`` of 16 MiB blocks read by two threads and not hashed; ``hash_s`` of
    as many blocks in memory, hashed on all cores and not read."""
    workload = Workload(size)
    tensors = workload.tensors()
    place = os.path.join(folder, "store")
    found: dict[str, list[float]] = {"verify": [], "raw": [], "hash": []}
    with cs.open(place) as store, SUBJECTS["raw"](os.path.join(folder, "raw"), workload.bytes) as raw:
        store.save(workload.state, step=1)
        raw.save(tensors)

        def verify() -> None:
            assert store.verify().ok

        verify()
        blocks = [os.urandom(BLOCK_BYTES) for _ in range(_BLOCKS)]
        work = {
            "verify": verify,
            "raw": lambda: raw.load(tensors),
            "hash": lambda: _hash(blocks, workload.bytes),
        }
        for name in turns(tuple(found), rounds, tell):
            drop_cache(place if name == "verify" else raw.place)
            found[name].append(timed(work[name]))
    return {"bytes": workload.bytes} | {f"{name}_s": seconds for name, seconds in found.items()}


def _hash(blocks: list[bytes], total_bytes: int) -> None:
    tasks = (blocks[number % len(blocks)] for number in range(-(-total_bytes // BLOCK_BYTES)))
    run(tasks, lambda block: block_digest(BLOCK_DIGEST, block), threads=cores())
