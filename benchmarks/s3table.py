"""The README's table of object stores, made from what ``benchmarks.s3`` measured."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks import cells
from benchmarks.s3clients import PLAIN, fastest_plain

NAMES = {
    "ckptstore": "**ckptstore**, hashed and verified",
    "boto_whole": "boto3, one request",
    "boto_threads": "boto3, 16 MiB each by {} threads",
    "boto_transfer": "boto3's transfer manager, {} at a time",
    "obstore": "obstore, {} at a time",
    "s3fs_ranges": "s3fs `pipe_file`, `cat_ranges`, {} at a time",
    "s3fs_file": "s3fs file object",
    "torch": "`torch.save`, `torch.load` with an s3fs file",
    "dcp": "`torch.distributed.checkpoint` over fsspec",
}
SERVERS = {"seaweedfs": "SeaweedFS", "ceph": "Ceph RGW"}
VERBS = {"save": "save to", "load": "cold load from"}

HEAD = (
    "Real servers on the machine that the clients run on: they share its cores, so that whoever needs less of them is "
    "faster, which a network would hide. Plain clients move random bytes and check nothing; each is asked for as many "
    "requests at a time as are best for it. Everybody begins without a connection, loads with a cold page cache."
)

Measured = Mapping[str, Any]


def markdown(measured: Measured) -> str:
    """One table for each server and verb, and a line on the rest."""
    if not measured["servers"]:
        return ""
    tables = [
        _table(
            f"{VERBS[verb]} {SERVERS[name]}, {measured['bytes'] / 1e9:.2f} GB",
            found[verb],
            found["in_flight"][verb],
            measured["bytes"],
        )
        for name, found in measured["servers"].items()
        for verb in VERBS
        if verb in found
    ]
    return "\n\n".join([HEAD, *tables, *_others(measured)])


def _table(title: str, times: Mapping[str, Sequence[float]], in_flight: Mapping[str, int], size: int) -> str:
    ours, best = times["ckptstore"], fastest_plain(times)
    lines = [f"| {title} | seconds | MB/s | ckptstore is |", "|---|---|---|---|"]
    for name in sorted(times, key=lambda name: (name != "ckptstore", name not in PLAIN, name != best)):
        seconds = times[name]
        speed = f"{size / 1e6 / statistics.median(seconds):.0f}"
        ratio = "" if name == "ckptstore" else f"{_times(seconds, ours)} as fast"
        mark = " (the fastest plain client: the server's limit)" if name == best else ""
        lines.append(
            f"| {NAMES[name].format(in_flight.get(name))}{mark} | {cells.seconds(seconds)} | {speed} | {ratio} |"
        )
    return "\n".join(lines)


def _times(theirs: Sequence[float], ours: Sequence[float]) -> str:
    # Round by round, so that a machine whose speed drifts slows both sides of each ratio.
    return cells.times([their / our for their, our in zip(theirs, ours, strict=True)])


def _others(measured: Measured) -> Iterator[str]:
    if "listing" in measured:
        found = measured["listing"]
        yield (
            f"Listing {found['checkpoints']:,} checkpoints from nothing, {found['delay_s'] * 1e3:.0f} ms added to each "
            f"request: {cells.seconds(found['seconds'])}."
        )
    if "requests" in measured:
        one = measured["requests"]["one"]
        yield (
            f"One tensor of 2 MB out of that checkpoint: {one['GET']} requests after its commit record, and "
            f"{one['bytes'] / 1e6:.0f} MB."
        )
    if "memory" in measured:
        found = measured["memory"]
        yield (
            f"Peak memory beyond the state: {cells.megabytes(found['save_bytes'])} of a save, "
            f"{cells.megabytes(found['load_bytes'])} of a load."
        )
