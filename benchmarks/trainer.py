"""What saving adds to whole training loops, the frameworks' own among them; each time in a new process."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from benchmarks.loops import LOOPS, installed
from benchmarks.rounds import settle, stored_bytes
from benchmarks.savers import quiet
from benchmarks.workload import GPT2, Size
from ckptstore.tools.turns import Tell, turns

_WARM_UP_STEPS = 3

Run = dict[str, Any]
Once = Callable[[str, str, Size, int, int], Run]


def in_new_process(name: str, folder: str, size: Size, saves: int, every: int) -> Run:
    """``once`` there: nothing is warm, and memory that others have left behind doesn't count."""
    asked = [name, folder, json.dumps(dataclasses.asdict(size)), str(saves), str(every)]
    command = [sys.executable, "-m", "benchmarks.trainer", *asked]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, cwd=Path(__file__).parent.parent)
    measured: Run = json.loads(done.stdout)
    return measured


def measure(
    folder: str,
    rounds: int,
    *,
    size: Size = GPT2,
    saves: int = 2,
    every: int = 6,
    names: tuple[str, ...] = tuple(LOOPS),
    once: Once = in_new_process,
    tell: Tell | None = None,
) -> dict[str, Any]:
    """For each round by loop, of ``saves`` saves, one each ``every`` steps:

    * ``base_s``: the seconds of ``every`` steps of the same loop without saves, just before;
    * ``step_s``: of all steps from the first of the saves until ``every`` steps after the last one;
    * ``blocked_s``: for how long each save kept training waiting, counted by ckptstore itself: the call, and the next
      step's wait for it; of the others the call, what must be waited for by hand, and the end of the save before;
    * ``durable_s``: until each save was durable; None where nobody waits for the storage;
    * ``written_bytes``: that one save takes on storage.
    """
    found: dict[str, list[Run]] = {name: [] for name in installed(names)}
    for name in turns(tuple(found), rounds, tell):
        found[name].append(once(name, os.path.join(os.path.abspath(folder), name), size, saves, every))
        settle()
    state_bytes = next(iter(found.values()))[0]["bytes"]
    measured = {"bytes": state_bytes, "saves": saves, "every": every, "loops": found}
    for name in found:
        if late := max(late_s(measured, name)):
            print(f"{name}: a save went on for {late:.1f} s after its steps; take more of them", file=sys.stderr)
    return measured


def once(name: str, folder: str, size: Size, saves: int, every: int) -> Run:
    """Train in this process, first without saves, then with them.

    The first save is left out, as it imports and allocates; so is one at the very end, which no step follows.

    Raises:
        RuntimeError: the loop didn't do what it was asked for.
    """
    with quiet(), LOOPS[name](folder, size) as loop, Marks(loop.workload.optimizer) as marks:
        loop.train(_WARM_UP_STEPS + every)
        base_s = marks.taken()[_WARM_UP_STEPS - 1 :]
        saved = loop.train_saving((saves + 2) * every, every)
        step_s = marks.taken()[2 * every - 1 :]
        settle()
        steps = [times.step for times in saved]
        if steps != list(range(every, (saves + 2) * every + 1, every)) or len(step_s) != saves * every:
            raise RuntimeError(f"{name} saved after steps {steps}, and {len(step_s)} steps were measured")
        return {
            "bytes": loop.workload.bytes,
            "base_s": base_s,
            "step_s": step_s,
            "blocked_s": [times.blocked_s for times in saved[1:-1]],
            "durable_s": [times.durable_s for times in saved[1:-1]],
            "written_bytes": stored_bytes(folder) // len(saved),
        }


class Marks:
    """When each step of an optimizer was done, whoever's loop it is in."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._marks: list[float] = []

    def __enter__(self) -> Self:
        self._hook = self._optimizer.register_step_post_hook(lambda *_: self._marks.append(time.perf_counter()))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hook.remove()

    def taken(self) -> list[float]:
        """Seconds from each step's end to the next one's, and begin anew."""
        marks, self._marks = self._marks, []
        return [after - before for before, after in pairwise(marks)]


def added_s(measured: dict[str, Any], name: str) -> list[float]:
    """What one save of ``name`` adds to the training time in each round, all steps until the next one taken together.

    Less as many steps of the same loop without saves.
    """
    rows = measured["loops"][name]
    return [
        (sum(row["step_s"]) - len(row["step_s"]) * statistics.fmean(row["base_s"])) / measured["saves"] for row in rows
    ]


def slowed(measured: dict[str, Any], name: str) -> list[float]:
    """All steps in which a save went on, in usual steps of the same loop without saves just before."""
    return [
        second / statistics.median(row["base_s"])
        for row in measured["loops"][name]
        for second in _during(row, measured["every"])
    ]


def usual(measured: dict[str, Any], name: str) -> list[float]:
    """All steps without saves, in the same unit: what ``slowed`` would be if saving cost nothing."""
    rows = measured["loops"][name]
    return [second / statistics.median(row["base_s"]) for row in rows for second in row["base_s"]]


def late_s(measured: dict[str, Any], name: str) -> list[float]:
    """For how long the last save of each round went on after the last step that is charged to it.

    Its cost isn't all seen where this is over 0: take more steps between two saves.
    """
    rows = measured["loops"][name]
    every = measured["every"]
    return [max(0.0, (row["durable_s"][-1] or 0.0) - sum(row["step_s"][-every:])) for row in rows]


def _during(row: Run, every: int) -> Iterator[float]:
    """Of each save the step after it began, and those that begin before it is over."""
    for index, (blocked_s, durable_s) in enumerate(zip(row["blocked_s"], row["durable_s"], strict=True)):
        left_s = max(blocked_s, durable_s or 0.0)
        for place, second in enumerate(row["step_s"][index * every : (index + 1) * every]):
            if place and left_s <= 0:
                break
            yield second
            left_s -= second


def main() -> None:
    """What ``measure`` starts: prints a JSON object."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("folder")
    parser.add_argument("size", type=json.loads)
    parser.add_argument("saves", type=int)
    parser.add_argument("every", type=int)
    asked = parser.parse_args()
    with contextlib.redirect_stdout(sys.stderr):
        # Some frameworks print.
        measured = once(asked.name, asked.folder, Size(**asked.size), asked.saves, asked.every)
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
