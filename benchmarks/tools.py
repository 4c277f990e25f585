"""How long ``average`` and ``diff`` take, beside just reading what they read, with the same reader."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch

import ckptstore as cs
from benchmarks.rounds import settle, timed
from benchmarks.workload import GPT2, Size, Workload
from ckptstore.engine.tensorreader import BlockCache, TensorReader
from ckptstore.engine.workers import default_threads, run
from ckptstore.format.tensorfile import BLOCK_BYTES
from ckptstore.tools.subjects import drop_cache
from ckptstore.tools.turns import Tell, turns

PARENTS = 5


def measure(folder: str, rounds: int, *, size: Size = GPT2, tell: Tell | None = None) -> dict[str, Any]:
    """Seconds of each round: ``average_s`` of the models of five checkpoints, saved beside them, and ``diff_s`` of two
    whole states, all of whose tensors differ; ``read_five_s`` and ``read_two_s`` of just reading the same tensors."""
    place, averaged = os.path.join(folder, "store"), os.path.join(folder, "averaged")
    workload = Workload(size)
    found: dict[str, list[float]] = {"average": [], "read_five": [], "diff": [], "read_two": []}
    with cs.open(place) as store:
        for step in range(PARENTS):
            store.save(workload.state, step=step)
            with torch.no_grad():
                for tensor in workload.tensors().values():
                    tensor.mul_(1.01).add_(1e-3)
        steps = [f"step:{step}" for step in range(PARENTS)]
        work = {
            "average": lambda: cs.average(store, steps, target=averaged),
            "read_five": lambda: read(store, steps, "model/"),
            "diff": lambda: cs.diff(store, steps[0], steps[1]),
            "read_two": lambda: read(store, steps[:2], ""),
        }
        for action in work.values():
            # What is imported and set up at the first use is not what is measured.
            action()
        for name in turns(tuple(work), rounds, tell):
            shutil.rmtree(averaged, ignore_errors=True)
            settle()
            drop_cache(place)
            found[name].append(timed(work[name]))
    models = PARENTS * sum(parameter.nbytes for parameter in workload.model.parameters())
    return {"parents": PARENTS, "average_bytes": models, "diff_bytes": 2 * workload.bytes} | {
        f"{name}_s": seconds for name, seconds in found.items()
    }


def read(store: cs.Store, selectors: Sequence[str], prefix: str) -> None:
    """Read all tensors of some checkpoints whose names begin so, as ``average`` and ``diff`` do: by blocks, on as many
    threads."""
    cache = BlockCache()
    for selector in selectors:
        with store.reader(selector, cache=cache) as reader:
            run(_blocks(reader, prefix), lambda block: _read(reader, block), threads=default_threads())


def _blocks(reader: TensorReader, prefix: str) -> list[list[tuple[str, int, int]]]:
    """What lies in each block: names, first byte and number of bytes."""
    found = []
    for name, row in reader.tensors.items():
        place = reader.places(name)[0]
        start, done = place.file.stream.begins[place.row], 0
        while name.startswith(prefix) and done < row.nbytes:
            length = min(row.nbytes - done, BLOCK_BYTES - (start + done) % BLOCK_BYTES)
            found.append(((place.file.key, (start + done) // BLOCK_BYTES), (name, done, length)))
            done += length
    found.sort()
    return [[piece for _, piece in group] for _, group in groupby(found, key=lambda it: it[0])]


def _read(reader: TensorReader, block: list[tuple[str, int, int]]) -> None:
    room = memoryview(bytearray(1 << 20))
    for name, begin, length in block:
        for at in range(0, length, len(room)):
            reader.read_into(name, begin + at, room[: min(len(room), length - at)])
