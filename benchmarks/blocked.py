"""How long a save keeps training from going on, where nothing else wants the cores or the disk."""

from __future__ import annotations

import time
from typing import Any

from benchmarks.rounds import timed
from benchmarks.savers import Saver, installed, savers
from benchmarks.stepclock import StepClock
from benchmarks.workload import GPT2, Size, Workload
from ckptstore.tools.turns import Tell, turns

SAVERS = (
    "copy",
    "ckptstore_overlapped",
    "ckptstore_async",
    "dcp",
    "dcp_overlapped",
    "dcp_process",
    "torch",
    "torchsnapshot",
)


def measure(
    folder: str, rounds: int, *, size: Size = GPT2, names: tuple[str, ...] = SAVERS, tell: Tell | None = None
) -> dict[str, Any]:
    """Seconds of each round, by saver.

    * ``call_s``: until the call returns;
    * ``read_s``: until the state is read, counted from the call (by ckptstore: until it is durable, there is no sign
      of it earlier). A step that comes before waits for the rest;
    * ``fence_s``: what ``optimizer.step()`` and what must be done before it still wait for after that;
    * ``total_s``: until the save is durable, counted from the call, a step in between included.
    """
    workload = Workload(size)
    names = installed(names)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    with savers(folder, workload, names) as made, StepClock(workload.optimizer) as clock:
        for name in turns(names, rounds, tell):
            found[name].append(_once(made[name], workload, clock))
    times = {name: {key: [row[key] for row in rows] for key in rows[0]} for name, rows in found.items()}
    return {"bytes": workload.bytes, "savers": times}


def _once(saver: Saver, workload: Workload, clock: StepClock) -> dict[str, float]:
    begin = time.perf_counter()
    saver.save()
    call_s = time.perf_counter() - begin
    saver.read()
    read_s = time.perf_counter() - begin
    by_hand_s = timed(saver.before_step)
    clock.step()
    saver.wait()
    total_s = time.perf_counter() - begin
    saver.tidy()
    return {
        "call_s": call_s,
        "read_s": read_s,
        "fence_s": by_hand_s + clock.seconds,
        "total_s": total_s,
    }
