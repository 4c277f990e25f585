"""Run the benchmarks in a folder (by default ./runs/bench), print them, and keep them as JSON.

    python -m benchmarks [gpt2] [many] [listing] [--folder F] [--rounds N] [--readme]

With --readme the table in README.md is written anew from what was measured.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import listing, tensors
from benchmarks.table import markdown, write_readme

HERE = Path(__file__).parent


def throughput(state: Callable[[], Any], rivals: tuple[str, ...]) -> Callable[[str, int], dict[str, Any]]:
    """A benchmark that saves and loads ``state()`` with each rival in turn."""

    def run(folder: str, rounds: int) -> dict[str, Any]:
        from ckptstore.tools.throughput import measure_state

        results = measure_state(folder, state(), rounds, rivals, progress=_tell)
        return {r.subject: {"bytes": r.size_bytes, "save_s": r.save_s, "load_s": r.load_s} for r in results}

    return run


BENCHMARKS: dict[str, Callable[[str, int], dict[str, Any]]] = {
    "gpt2": throughput(tensors.gpt2_adamw, ("raw", "ckptstore", "torch", "safetensors", "dcp")),
    "many": throughput(tensors.many, ("ckptstore", "torch", "safetensors")),
    "listing": lambda folder, rounds: listing.measure(folder, rounds=rounds),
}


def _tell(what: str, done: int, total: int) -> None:
    print(f"  {done + 1}/{total} {what}", file=sys.stderr)


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("names", nargs="*", choices=[*BENCHMARKS, []], help="which; all where none is named")
    parser.add_argument("--folder", default="runs/bench", help="on the storage that shall be measured")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--readme", action="store_true", help="write the table in README.md")
    asked = parser.parse_args()
    Path(asked.folder).mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"cores": os.cpu_count(), "machine": platform.machine(), "rounds": asked.rounds}
    for name in asked.names or BENCHMARKS:
        print(name, file=sys.stderr)
        results[name] = BENCHMARKS[name](asked.folder, asked.rounds)
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    table = markdown(results)
    print(table)
    if asked.readme:
        write_readme(table)


if __name__ == "__main__":
    main()
