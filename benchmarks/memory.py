"""The memory that one save takes, at its peak and from then on, each time in a new process."""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.savers import SAVERS as MADE
from benchmarks.savers import quiet
from benchmarks.workload import GPT2, TINY, Size, Workload
from ckptstore.tools.turns import Tell, turns

SAVERS = ("ckptstore_overlapped", "ckptstore_async", "dcp", "dcp_overlapped", "torch")
_STATUS = Path("/proc/self/status")
# Written to clear_refs, it makes the peak that the kernel remembers (VmHWM) the memory of this moment.
_RESET_PEAK = "5"


def measure(
    folder: str, rounds: int, *, size: Size = GPT2, names: tuple[str, ...] = SAVERS, tell: Tell | None = None
) -> dict[str, Any]:
    """Resident bytes of the process over those before its first save, by saver, one number a round.

    ``peak_bytes`` is the most during that save, ``kept_bytes`` what is still there when it is durable.
    """
    found: dict[str, dict[str, list[int]]] = {name: {"peak_bytes": [], "kept_bytes": []} for name in names}
    for name in turns(names, rounds, tell):
        for key, value in _in_new_process(name, folder, size).items():
            found[name][key].append(value)
    return {"bytes": Workload(size).bytes, "savers": found}


def _in_new_process(name: str, folder: str, size: Size) -> dict[str, int]:
    asked = [name, folder, json.dumps(dataclasses.asdict(size))]
    command = [sys.executable, "-m", "benchmarks.memory", *asked]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, cwd=Path(__file__).parent.parent)
    measured: dict[str, int] = json.loads(done.stdout)
    return measured


def once(name: str, folder: str, size: Size) -> dict[str, int]:
    """Save once in this process, after a tiny save has imported and started all that a save needs."""
    with MADE[name](os.path.join(folder, f"{name}-first"), Workload(TINY)) as first:
        first.save()
        first.wait()
    workload = Workload(size)
    with MADE[name](os.path.join(folder, name), workload) as saver:
        before = fresh_peak()
        saver.save()
        saver.read()
        saver.wait()
        return {"peak_bytes": resident("VmHWM") - before, "kept_bytes": resident("VmRSS") - before}


def fresh_peak() -> int:
    """Give what is free back to the system, forget the peak so far, and tell the bytes that are left."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
    return resident("VmRSS")


def resident(field: str) -> int:
    """A field of /proc/self/status in bytes: ``VmRSS`` now, ``VmHWM`` at the peak; shared memory is in both."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def main() -> None:
    """What ``measure`` starts: prints a JSON object."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("folder")
    parser.add_argument("size", type=json.loads)
    asked = parser.parse_args()
    with quiet():
        measured = once(asked.name, os.path.abspath(asked.folder), Size(**asked.size))
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
