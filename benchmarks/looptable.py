"""Rows of the README's second table about whole training loops: what saves add to them, and what no save adds."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks import cells, trainer
from benchmarks.cells import row

NAMES = {
    "dcp": "`dcp.async_save`",
    "dcp_overlapped": "`dcp.async_save`, staged in a thread, waited for by hand",
    "torch": "`torch.save`, not synced",
    "lightning": "Lightning, not synced",
    "huggingface": "Hugging Face, not synced",
}
_MODES = ("overlapped", "async")

Measured = Mapping[str, Any]


def trainer_rows(measured: dict[str, Any]) -> Iterator[str]:
    """What a save adds to training, by which steps, for how long it blocks, when it is durable, and how big it is."""
    loops = measured["loops"]
    added = {name: trainer.added_s(measured, name) for name in loops}
    slow = {name: trainer.slowed(measured, name) for name in loops}
    lists = ("blocked_s", "durable_s")
    # One number a round: of its saves the median.
    blocked, durable = ({name: _medians(runs, key) for name, runs in loops.items()} for key in lists)
    longest = {name: [cells.p99(steps)] for name, steps in slow.items()}
    middle = {name: [statistics.median(steps)] for name, steps in slow.items()}
    base_s = statistics.median([second for run in loops["none"] for second in run["base_s"]])
    still = trainer.usual(measured, "none")
    no_save = {
        "added": f"no save: {cells.seconds(added['none'])}",
        "longest": f"no save: {cells.times([cells.p99(still)])}",
        "middle": f"no save: {cells.times([statistics.median(still)])}",
    }
    for mode in _MODES:
        ours = f"`Checkpointer`, `{mode}`"
        what = f"{ours}: a save adds to a loop with steps of {base_s:.1f} s"
        yield from _row(what, mode, added, cells.seconds, no_save["added"])
        yield from _row(f"{ours}: a save keeps the loop waiting", mode, blocked, cells.seconds)
        what = f"{ours}: the median step during a save, in usual steps"
        yield from _row(what, mode, middle, cells.times, no_save["middle"])
        what = f"{ours}: the longest 1 % of the steps during a save"
        yield from _row(what, mode, longest, cells.times, no_save["longest"])
        yield from _row(f"{ours}: until a save is durable", mode, durable, cells.seconds)
    written = {name: [float(run["written_bytes"]) for run in runs] for name, runs in loops.items()}
    limit = f"the state: {measured['bytes'] / 1e6:.0f} MB"
    yield from _row("`Checkpointer`: bytes that a save writes", _MODES[0], written, cells.megabytes, limit)


def idle_rows(measured: Measured) -> Iterator[str]:
    """What a step without a save costs."""
    for name, spent in measured["step_us"].items():
        what = f"`Checkpointer`: a step that saves nothing, batches from a {name}"
        yield row(what, spent, {}, _microseconds)


def _row(
    what: str, mode: str, values: Mapping[str, Sequence[float]], show: cells.Show, limit: str = ""
) -> Iterator[str]:
    ours = values.get(f"ckptstore_{mode}")
    if ours:
        rivals = {title: values[name] for name, title in NAMES.items() if values.get(name)}
        yield row(what, ours, rivals, show, limit=limit)


def _medians(runs: Sequence[Measured], key: str) -> list[float]:
    return [statistics.median(run[key]) for run in runs if None not in run[key]]


def _microseconds(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.1f} µs ({min(values):.1f} to {max(values):.1f})"
