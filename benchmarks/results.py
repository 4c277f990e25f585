"""What was measured, as JSON: each benchmark under its name, the newest run of it."""

from __future__ import annotations

import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

PATH = Path(__file__).parent / "results.json"
_DIGITS = 6
"""Of seconds: a microsecond."""


def read(path: Path = PATH) -> dict[str, Any]:
    """What earlier runs on this kind of machine found; of another kind, nothing: the two can't stand in one table."""
    machine = {"cores": os.cpu_count(), "machine": platform.machine()}
    if not path.exists():
        return machine
    found: dict[str, Any] = json.loads(path.read_text())
    other = {key: found.get(key) for key in machine}
    if other != machine:
        print(f"{path} is of another machine ({other}, this one is {machine}): it is begun anew", file=sys.stderr)
        return machine
    return found


def merge(name: str, measured: dict[str, Any], rounds: int, path: Path = PATH) -> dict[str, Any]:
    """Put what ``name`` measured in so many rounds in the place of its last run; all results."""
    results = read(path)
    results |= {"rounds": results.get("rounds", {}) | {name: rounds}, name: _rounded(measured)}
    path.write_text(json.dumps(results, indent=1) + "\n")
    return results


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, _DIGITS)
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    return [_rounded(part) for part in value] if isinstance(value, list | tuple) else value
