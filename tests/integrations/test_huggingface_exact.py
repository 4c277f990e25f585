"""Interrupted anywhere and resumed, a Trainer's run has the losses, samples, weights and logs of one that wasn't."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

import ckptstore as cs
from tests.integrations.forking import Forker
from tests.integrations.huggingface_program import Options, notes

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {
        "save": "every(steps=2)",
        "arguments": {
            "gradient_accumulation_steps": 4,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "eval_on_start": True,
        },
        "more": {"mode": "async"},
    },
    "workers": {
        "save": "every(epochs=1) | at(4)",
        "arguments": {"dataloader_num_workers": 2, "eval_strategy": "steps", "eval_steps": 4, "num_train_epochs": 2},
    },
    "workers, accumulation": {
        "arguments": {
            "dataloader_num_workers": 2,
            "dataloader_persistent_workers": True,
            "gradient_accumulation_steps": 4,
        }
    },
    "by length, to a step": {
        "save": "every(steps=1)",
        "arguments": {
            "train_sampling_strategy": "group_by_length",
            "max_steps": 15,
            "include_num_input_tokens_seen": True,
        },
    },
    "the best, stopped early": {
        "save": "",
        "patience": 2,
        "arguments": {
            "num_train_epochs": 8,
            "eval_strategy": "steps",
            "eval_steps": 3,
            "save_strategy": "steps",
            "save_steps": 3,
            "load_best_model_at_end": True,
            "metric_for_best_model": "loss",
            "learning_rate": 0.1,
        },
    },
    "a stream": {"stream": True, "arguments": {"max_steps": 8}},
}
EXITS = {"exit": 9, "term": 143, "int": 130, "raise": 7}


@pytest.fixture(scope="module")
def forker() -> Iterator[Forker]:
    made = Forker("tests.integrations.huggingface_program")
    yield made
    made.close()


def windows(found: list[dict[str, Any]]) -> dict[int, list[tuple[list[int], str]]]:
    """What each step read and lost; the last time, where it was done twice."""
    steps: dict[int, list[tuple[list[int], str]]] = {}
    last = None
    for note in found:
        if "step" not in note:
            last = None
            continue
        if note["step"] != last:
            steps[note["step"]] = []
        steps[note["step"]].append((note["index"], note["loss"]))
        last = note["step"]
    return steps


def newest_step(folder: Path) -> int | None:
    saved = cs.open(folder / "store").checkpoints()
    return saved[-1].step if saved else None


def check_same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert windows(found) == windows(expected)
    assert found[-1]["end"] == expected[-1]["end"]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("variant", VARIANTS)
def test_interrupted_at_every_step(variant: str, tmp_path: Path, full: bool, forker: Forker) -> None:
    """In each way and at each place in turn; with ``--full`` at each step in every way."""
    made = Options("", **VARIANTS[variant])
    whole = replace(made, folder=str(tmp_path / "whole"))
    Path(whole.folder).mkdir()
    assert forker.run(asdict(whole)) == 0
    expected = notes(whole)
    total = expected[-1]["end"]["step"]
    ways, offset = list(EXITS), list(VARIANTS).index(variant)
    evaluated = sorted({line["step"] for line in expected[-1]["end"]["log"] if "eval_loss" in line})
    cases = [(at, where) for at in range(total) for where in ("step", "backward")]
    cases += [(at, "evaluation") for at in evaluated]
    for number, (at, where) in enumerate(cases):
        if where == "step" and at == 0:
            continue
        chosen = ways if full else [ways[(number + offset) % len(ways)]]
        if not full and (where, [at]) == ("evaluation", evaluated[1:2]) and variant in ("plain", "accumulation"):
            # What is half evaluated is not saved.
            chosen = ["raise"]
        elif not full and (number + offset) % 20:
            continue
        for way in chosen:
            folder = tmp_path / f"{way}-{at}-{where}"
            folder.mkdir()
            case = replace(made, folder=str(folder), check=True)
            ended = forker.run(asdict(replace(case, end_by=way, end_at=at, where=where)))
            assert [note["broken"] for note in notes(case) if "broken" in note] == [at], "the fault did not fire"
            assert ended == EXITS[way]
            newest = newest_step(folder)
            # A signal lets the step end, with its evaluation, and saves it.
            assert way not in ("term", "int") or newest == (at + 1 if where == "backward" else at)
            assert forker.run(asdict(case)) == 0
            assert [note["resumed"] for note in notes(case) if "resumed" in note] == [None, newest]
            check_same(notes(case), expected)


def test_nothing_is_changed_by_being_there(tmp_path: Path, forker: Forker) -> None:
    """A run with the callback has the losses and weights of ``trainer.train()`` alone."""
    arguments = {"gradient_accumulation_steps": 2, "dataloader_num_workers": 1}
    ends = []
    for plain in (True, False):
        folder = tmp_path / str(plain)
        folder.mkdir()
        options = Options(str(folder), plain=plain, arguments=arguments)
        assert forker.run(asdict(options)) == 0
        ends.append(notes(options))
    check_same(*ends)
