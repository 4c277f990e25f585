"""The README's second table: saving beside training, memory, frozen weights, verifying, growth, compression."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks import cells, looptable, training
from benchmarks.cells import row

HEAD = "| what | **ckptstore** | others | ckptstore / other | the machine's limit |\n|---|---|---|---|---|"
NAMES = {
    "dcp": "`dcp.async_save`",
    "dcp_overlapped": "`dcp.async_save`, staged in a thread, waited for by hand",
    "dcp_process": "the same, written by a process",
    "torch": "`torch.save` + fsync",
    "torchsnapshot": "torchsnapshot, not synced",
    "safetensors": "safetensors + fsync",
}
CODECS = {"float-zstd": "float-zstd", "zstd:1": "zstd 1", "zstd:3": "zstd 3", "zipnn": "ZipNN"}
FROZEN = NAMES | {"dcp": "`dcp.save`"}
_IN_PLACE = ("dcp_overlapped", "dcp_process", "torch")
_BY_COPY = ("dcp", "torchsnapshot", "torch")

Measured = Mapping[str, Any]


def markdown(results: Measured) -> str:
    """The table of what ``results`` has; empty if that is nothing."""
    makers = {
        "blocked": _blocked,
        "training": _training,
        "trainer": looptable.trainer_rows,
        "idle": looptable.idle_rows,
        "memory": _memory,
        "frozen": _frozen,
        "verify": _verify,
        "tools": _tools,
        "toolmemory": _tool_memory,
        "growth": _growth,
        "codec": _codec,
    }
    rows = [line for name, make in makers.items() if name in results for line in make(results[name])]
    return "\n".join([HEAD, *rows]) if rows else ""


def _blocked(measured: Measured) -> Iterator[str]:
    savers = measured["savers"]
    waits = {name: _sum(times["call_s"], times["fence_s"]) for name, times in savers.items()}
    copy = f"one copy in memory: {cells.seconds(waits['copy'])}"
    pick = {"overlapped": _IN_PLACE, "async": _BY_COPY}
    for mode, rivals in pick.items():
        ours = waits[f"ckptstore_{mode}"]
        limit = copy if mode == "async" else ""
        yield row(f"a save keeps training waiting, `{mode}`", ours, _named(waits, rivals), cells.seconds, limit=limit)


def _training(measured: Measured) -> Iterator[str]:
    savers = [name for name in measured["savers"] if name != "none"]
    usual = training.median_step_s(measured)
    added = {name: training.added_s(measured, name) for name in savers}
    cores = {name: training.added_s(measured, name, "cpu_s") for name in savers}
    slow = {name: [cells.p99(training.slowed(measured, name))] for name in savers}
    noise = cells.seconds(training.added_s(measured, "none"))
    limits = [cells.seconds(added["write"]), cells.times(slow["write"]), cells.seconds(cores["write"])]
    wait, stretch, work = (f"writing as many bytes: {limit}" for limit in limits)
    for mode, rivals in (("overlapped", ("dcp", *_IN_PLACE)), ("async", ("dcp", "torch"))):
        ours = f"ckptstore_{mode}"
        what = f"a save adds to training with steps of {usual:.1f} s, `{mode}`"
        yield row(what, added[ours], _named(added, rivals), cells.seconds, limit=f"{wait}<br>no save: {noise}")
        what = f"the longest 1 % of the steps during a save, in usual steps, `{mode}`"
        yield row(what, slow[ours], _named(slow, rivals), cells.times, limit=stretch)
    waits = {name: _sum(times["call_s"], times["fence_s"]) for name, times in measured["savers"].items()}
    what = "of these, it keeps training waiting, `overlapped`"
    yield row(what, waits["ckptstore_overlapped"], _named(waits, ("dcp", *_IN_PLACE)), cells.seconds)
    what = "core-seconds that a save adds, `overlapped`"
    # A process of its own is not seen by this clock.
    rivals = ("dcp", "dcp_overlapped", "torch")
    yield row(what, cores["ckptstore_overlapped"], _named(cores, rivals), cells.seconds, limit=work)


def _memory(measured: Measured) -> Iterator[str]:
    peaks = {name: bytes["peak_bytes"] for name, bytes in measured["savers"].items()}
    limit = f"the state: {measured['bytes'] / 1e6:.0f} MB"
    for mode, rivals in (("overlapped", ("dcp_overlapped", "torch")), ("async", ("dcp",))):
        if ours := peaks.get(f"ckptstore_{mode}"):
            what = f"peak memory that a save adds, `{mode}`"
            yield row(what, ours, _named(peaks, rivals), cells.megabytes, limit=limit)


def _frozen(measured: Measured) -> Iterator[str]:
    savers = measured["savers"]
    share = measured["changing_bytes"] / measured["bytes"]
    ours = savers["ckptstore"]
    rivals = [name for name in savers if name != "ckptstore"]
    written = {name: times["later_bytes"] for name, times in savers.items()}
    later = {name: times["later_s"] for name, times in savers.items()}
    what = f"{1 - share:.0%} frozen (LoRA): a later checkpoint takes"
    names = {FROZEN[name]: written[name] for name in rivals}
    note = f", {cells.ratio(written['ckptstore'], ours['first_bytes']):.1%} of the first"
    limit = f"what changed: {measured['changing_bytes'] / 1e6:.1f} MB"
    yield row(what, written["ckptstore"], names, cells.megabytes, limit=limit, note=note)
    names = {FROZEN[name]: later[name] for name in rivals}
    note = f", {cells.ratio(later['ckptstore'], ours['first_s']):.0%} of the first"
    yield row("the same: seconds", later["ckptstore"], names, cells.seconds, note=note)


def _verify(measured: Measured) -> Iterator[str]:
    ours, raw, hashed = ([measured["bytes"] / s for s in measured[f"{key}_s"]] for key in ("verify", "raw", "hash"))
    limit = (
        f"plain direct reads: {cells.gigabytes_s(raw)}; verify is {cells.ratio(ours, raw):.2f} x as fast<br>"
        f"hashing alone, from memory: {cells.gigabytes_s(hashed)}; {cells.ratio(ours, hashed):.2f} x"
    )
    yield row("`store.verify()`, cold", ours, {}, cells.gigabytes_s, limit=limit)


def _tools(measured: Measured) -> Iterator[str]:
    sides = {
        f"`ckptstore average` of {measured['parents']} models, cold": ("average", "read_five"),
        "`ckptstore diff` of two states, all of which differs, cold": ("diff", "read_two"),
    }
    for what, (name, reading) in sides.items():
        size = f"{measured[f'{name}_bytes'] / 1e9:.2f} GB"
        just = {f"just reading the {size}": measured[f"{reading}_s"]}
        yield row(what, measured[f"{name}_s"], just, cells.seconds)


def _tool_memory(measured: Measured) -> Iterator[str]:
    for name, peaks in measured["peak_bytes"].items():
        what = f"memory of `{name}`, {measured['bytes'] / 1e9:.2f} GB a checkpoint"
        yield row(what, peaks, {}, cells.megabytes)


def _growth(measured: Measured) -> Iterator[str]:
    yield from _grown(*_ends(measured["by_bytes"], "bytes"), lambda point: f"{point['bytes'] / 1e9:.1f} GB")
    yield from _grown(*_ends(measured["by_tensors"], "tensors"), lambda point: f"{point['tensors']:,} tensors of 1 KiB")


def _ends(points: Sequence[Measured], key: str) -> tuple[Measured, Measured]:
    """A tenth of the largest, or what is nearest to it, and the largest: below, the fixed cost of a save is seen."""
    last = points[-1]
    return min(points, key=lambda point: abs(math.log(10 * point[key] / last[key]))), last


def _grown(first: Measured, last: Measured, size: Callable[[Measured], str]) -> Iterator[str]:
    for verb in ("save", "load"):
        before, ours = (point["savers"]["ckptstore"][f"{verb}_s"] for point in (first, last))
        rivals = {NAMES[name]: times[f"{verb}_s"] for name, times in last["savers"].items() if name != "ckptstore"}
        measured = {name: values for name, values in rivals.items() if values}
        note = f", {statistics.median(ours) / statistics.median(before):.1f} x that of {size(first)}"
        yield row(f"{size(last)}: a {verb} takes", ours, measured, cells.seconds, note=note)


def _codec(measured: Measured) -> Iterator[str]:
    for kind, found in measured.items():
        left = {CODECS[name]: [subject["ratio"]] for name, subject in found["subjects"].items()}
        limit = f"entropy of the exponents: {found['bound']:.1%}"
        yield row(f"`float-zstd` leaves of {kind}", left.pop(CODECS["float-zstd"]), left, cells.shares, limit=limit)
    kind = "weights bf16"
    for verb in ("encode", "decode"):
        found = measured[kind]
        speeds = {CODECS[name]: _speeds(subject[f"{verb}_s"], found) for name, subject in found["subjects"].items()}
        what = f"`float-zstd` {verb}s {kind}, two threads"
        yield row(what, speeds.pop(CODECS["float-zstd"]), speeds, cells.gigabytes_s)


def _speeds(seconds: Mapping[str, Sequence[float]], found: Measured) -> list[float]:
    return [2 * found["block_bytes"] / s for s in seconds["2"]]


def _named(values: Mapping[str, Sequence[float]], names: Sequence[str]) -> dict[str, Sequence[float]]:
    return {NAMES[name]: values[name] for name in names if name in values}


def _sum(first: Sequence[float], second: Sequence[float]) -> list[float]:
    return [a + b for a, b in zip(first, second, strict=True)]
