"""The README's tables of many ranks: saves and loads by several processes, and what a thousand would cost rank 0."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks import cells

Measured = Mapping[str, Any]


def markdown(results: Measured) -> str:
    """Tables of what ``results`` has; empty if that is nothing."""
    parts = [_side_by_side(results["ranks"])] if "ranks" in results else []
    parts += [_growth(results["scale"])] if "scale" in results else []
    return "\n\n".join(["### Many ranks", *parts]) if parts else ""


def _side_by_side(measured: Measured) -> str:
    ours, dcp = (measured["subjects"][name] for name in ("ckptstore", "dcp"))
    savers, loaders = measured["savers"], measured["loaders"]
    what = f"{measured['bytes'] / 1e9:.2f} GB sharded by rows, on a local disk"
    rows = [f"| {what} | **ckptstore** | DCP's own, with fsync | as fast |", "|---|---|---|---|"]
    verbs = {"save_s": f"saved by {savers} ranks", "load_s": f"loaded by {loaders} ranks, cold, each block verified"}
    for key, what in verbs.items():
        factor = cells.ratio(dcp[key], ours[key])
        rows.append(f"| {what} | {cells.seconds(ours[key])} | {cells.seconds(dcp[key])} | {factor:.2f} x |")
    stored = [f"{one['stored_bytes'] / measured['bytes']:.4f} x" for one in (ours, dcp)]
    rows.append(f"| bytes on storage, of those of the state | {stored[0]} | {stored[1]} | |")
    return "\n".join(rows)


def _growth(measured: Measured) -> str:
    head = ["ranks", "state", "first agreement", "every later one", "messages of the first", "part of a rank"]
    head += ["manifest", "commit on rank 0", "of that its processor", "its requests"]
    head += ["before a load by as many", "by more or fewer"]
    rows = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    rows += [_point(point) for point in measured["points"]]
    first = (
        f"Simulated: rank 0's own code, on a storage that answers after {measured['latency_s'] * 1e3:.0f} ms with "
        f"{measured['bytes_per_s'] / 1e6:.0f} MB/s a request and keeps records only; {measured['tensors']:,} tensors, "
        "10 GB a rank. `python -m benchmarks scale`."
    )
    return "\n".join([first, "", *rows])


def _point(point: Measured) -> str:
    size = point["state_bytes"]
    requests = sum(point["commit_requests"].values())
    shown = [
        f"{point['ranks']:,}",
        f"{size / 1e12:.2f} TB",
        f"{point['plan_first_s']:.2f} s",
        f"{point['plan_again_s'] * 1e3:.0f} ms",
        f"{point['tables_bytes'] / 1e6:.1f} MB",
        f"{point['part_bytes'] / 1e6:.2f} MB",
        f"{point['manifest_bytes'] / 1e3:.1f} KB",
        f"{point['commit_s']:.2f} s",
        f"{point['commit_cpu_s']:.2f} s",
        f"{requests:,}",
        f"{point['load_s']:.2f} s, {sum(point['load_requests'].values())} requests",
        f"{point['other_load_s']:.1f} s, {sum(point['other_load_requests'].values()):,} requests",
    ]
    return f"| {' | '.join(shown)} |"
