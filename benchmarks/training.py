"""What a save adds to a training loop: GPT-2 on the CPU, blocks of steps with one save each and without."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from typing import Any

from benchmarks.rounds import timed
from benchmarks.savers import Saver, savers
from benchmarks.stepclock import StepClock
from benchmarks.workload import GPT2, Size, Workload
from ckptstore.tools.turns import Tell, turns

SAVERS = (
    "none",
    "write",
    "ckptstore_overlapped",
    "ckptstore_async",
    "dcp",
    "dcp_overlapped",
    "dcp_process",
    "torch",
)
_WARM_UP_STEPS = 3


def measure(
    folder: str,
    rounds: int,
    *,
    size: Size = GPT2,
    steps: int = 8,
    names: tuple[str, ...] = SAVERS,
    tell: Tell | None = None,
) -> dict[str, Any]:
    """For each round by saver, of a block of ``steps`` steps that begins with a save:

    * ``step_s``, ``cpu_s``: the seconds of each of its steps, what the save blocks included, and the core-seconds of
      this process in it;
    * ``busy``: how many of them passed while the save went on; the later ones are training alone again;
    * ``call_s``: until the call of the save returns;
    * ``fence_s``: what the optimizer's hooks, and what must be done by hand before the step, took in the first step;
    * ``reported_s``: how long the save blocked training as the library itself counts it, where it does;
    * ``late_s``: how long the save went on after the block. It belongs to the cost where it isn't about 0: take more
      steps.
    """
    workload = Workload(size)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with savers(folder, workload, names) as made, StepClock(workload.optimizer) as clock:
        _block(made[names[0]], workload, clock, _WARM_UP_STEPS, save=False)
        for name in turns(names, rounds, tell):
            found[name].append(_block(made[name], workload, clock, steps))
    times = {name: {key: [row[key] for row in rows] for key in rows[0]} for name, rows in found.items()}
    return {"bytes": workload.bytes, "steps": steps, "savers": times}


def _block(saver: Saver, workload: Workload, clock: StepClock, steps: int, *, save: bool = True) -> dict[str, Any]:
    step_s: list[float] = []
    cpu_s: list[float] = []
    fence_s: list[float] = []
    busy = 0
    cpu, last = time.process_time(), time.perf_counter()
    call_s = timed(saver.save) if save else 0.0
    for _ in range(steps):
        busy += saver.busy() or not step_s
        workload.forward_backward()
        by_hand_s = timed(saver.before_step)
        clock.step()
        fence_s.append(by_hand_s + clock.seconds)
        cpu_now, now = time.process_time(), time.perf_counter()
        step_s.append(now - last)
        cpu_s.append(cpu_now - cpu)
        cpu, last = cpu_now, now
    late_s = timed(saver.wait)
    reported_s = saver.reported_s() if save else None
    saver.tidy()
    return {
        "step_s": step_s,
        "cpu_s": cpu_s,
        "busy": busy,
        "call_s": call_s,
        "fence_s": fence_s[0],
        "reported_s": reported_s,
        "late_s": late_s,
    }


def added_s(measured: dict[str, Any], name: str, key: str = "step_s") -> list[float]:
    """What one save of ``name`` adds to ``key`` in each round: the steps that it lasts, less as many usual ones.

    The usual one is the median of those that follow in the same block: the speed of a shared machine drifts within
    minutes by more than a save takes.
    """
    return [sum(during) - len(during) * usual for during, usual in _rounds(measured, name, key)]


def slowed(measured: dict[str, Any], name: str) -> list[float]:
    """All steps in which a save went on, in usual steps of the same block."""
    return [second / usual for during, usual in _rounds(measured, name, "step_s") for second in during]


def _rounds(measured: dict[str, Any], name: str, key: str) -> Iterator[tuple[list[float], float]]:
    times = measured["savers"][name]
    for row, busy in zip(times[key], times["busy"], strict=True):
        # The two that any save may touch are counted for all, also for those that block and are done.
        during = max(2, busy)
        yield row[:during], statistics.median(row[during:] or row)


def median_step_s(measured: dict[str, Any]) -> float:
    """Of all steps of the blocks without a save."""
    return statistics.median([second for row in measured["savers"]["none"]["step_s"] for second in row])
