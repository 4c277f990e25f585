"""Interrupted anywhere and resumed, a run has the losses, samples, weights and random numbers of one that wasn't."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.processes import check_same, reference, run
from tests.trainer.program import Options, notes

VARIANTS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "sgd, accumulation, one cycle": {"optimizer": "sgd", "accumulation": 4, "scheduler": "onecycle"},
    "workers": {"workers": 2},
    "workers, accumulation": {"workers": 2, "accumulation": 4, "optimizer": "sgd"},
    "async": {"mode": "async", "scheduler": "onecycle"},
    "at each step": {"save": "every(steps=1)"},
    "at epochs and the best": {"save": "every(epochs=1) | on_best(val_loss)"},
}
EXITS = {"exit": 9, "kill": -9, "term": 143, "int": 130, "raise": 7}


def options(folder: Path, variant: str) -> Options:
    return Options(str(folder / "store"), str(folder / "notes"), **VARIANTS[variant])


@pytest.mark.parametrize("variant", VARIANTS)
def test_interrupted_at_every_step(variant: str, tmp_path: Path, full: bool) -> None:
    """In each way and at each place in turn; with ``--full`` at each step of three epochs in every way."""
    made = options(tmp_path, variant)
    expected = reference(made, tmp_path)
    total = max(note["step"] for note in expected if "step" in note)
    ways = list(EXITS)
    cases = [(at, where) for at in range(total) for where in ("step", "backward")]
    cases += [(note["evaluated"], "evaluation") for note in expected if "evaluated" in note]
    offset = list(VARIANTS).index(variant)
    for number, (at, where) in enumerate(cases):
        if where == "step" and at == 0:
            continue
        chosen = ways if full else [ways[(number + offset) % len(ways)]]
        if not full and (number + offset) % (23 if made.workers else 13):
            continue
        for way in chosen:
            case = replace(
                made,
                url=str(tmp_path / f"store-{way}-{at}-{where}"),
                out=str(tmp_path / f"notes-{way}-{at}-{where}"),
                check=True,
            )
            ended = run(case, end_by=way, end_at=at, where=where)
            found = notes(case.out)
            assert [note["broken"] for note in found if "broken" in note] == [at], "the fault did not fire"
            assert ended == EXITS[way]
            assert run(case) == 0
            check_same(notes(case.out), expected)
