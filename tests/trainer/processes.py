"""Runs of ``program.py`` in processes of their own, started from one that has torch already."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tests.forked import CONTEXT, preload
from tests.trainer import program
from tests.trainer.program import Options

preload("tests.trainer.program")
TIMEOUT_S = 120


def start(options: Any, main: Callable[[dict[str, Any]], None] = program.main) -> Any:
    """A process that runs it, by the ``main`` of the program that the options are of."""
    process = CONTEXT.Process(target=main, args=(asdict(options),))
    process.start()
    return process


def finish(process: Any) -> int:
    """How it ended."""
    process.join(TIMEOUT_S)
    hangs = process.exitcode is None
    if hangs:
        process.kill()
        process.join()
    assert not hangs, "it hangs"
    return int(process.exitcode)


def run(options: Any, *, main: Callable[[dict[str, Any]], None] = program.main, **changes: Any) -> int:
    """Run it to its end; how it ended."""
    return finish(start(replace(options, **changes), main))


def reference(options: Options, folder: Path) -> list[dict[str, Any]]:
    """What a run notes that nothing interrupts, and that saves nothing on its way."""
    out = folder / "reference"
    changes = {"url": str(folder / "reference-store"), "out": str(out), "save": "at(0)", "end_by": None, "check": False}
    assert run(options, **changes) == 0
    return program.notes(out)


def steps(notes: list[dict[str, Any]]) -> dict[int, Any]:
    """What each step read and lost; the last time, where it was done twice."""
    return {note["step"]: note["window"] for note in notes if "step" in note}


def check_same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Each step, whichever process did it, each evaluation and the end are as in the run without interruption."""
    wanted = steps(expected)
    for note in found:
        if "step" in note:
            assert note["window"] == wanted[note["step"]], f"step {note['step']}"
    assert steps(found).keys() == wanted.keys()
    evaluations = {note["evaluated"]: note["losses"] for note in expected if "evaluated" in note}
    for note in found:
        if "evaluated" in note:
            assert note["losses"] == evaluations[note["evaluated"]], f"evaluation after step {note['evaluated']}"
    assert found[-1] == expected[-1]
