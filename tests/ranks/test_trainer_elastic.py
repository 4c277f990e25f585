"""A run that goes on with another number of ranks: each sample once, and the same losses as far as sums allow."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest

from tests.ranks.test_trainer_exact import made
from tests.ranks.trained import Shared, notes, reference, run

PER_EPOCH = 4


def steps(options: Shared, size: int) -> dict[int, tuple[float, list[int]]]:
    """Of each step the mean loss of all ranks, and the samples of all; the last time it was done."""
    found: dict[int, dict[int, tuple[float, list[int]]]] = defaultdict(dict)
    for rank in range(size):
        for note in notes(options, rank):
            if "step" in note:
                [(samples, loss)] = note["window"]
                found[note["step"]][rank] = float.fromhex(loss), samples
    return {
        step: (sum(loss for loss, _ in each.values()) / len(each), sorted(n for _, some in each.values() for n in some))
        for step, each in found.items()
    }


@pytest.mark.parametrize(
    ("before", "after", "step", "wraps"),
    [
        (4, 2, 5, "ddp ddp"),
        (2, 4, 6, "ddp ddp"),
        (4, 3, 5, "fsdp fsdp"),
        pytest.param(4, 2, 6, "fsdp ddp", marks=pytest.mark.full),
        pytest.param(4, 1, 7, "ddp ddp", marks=pytest.mark.full),
        pytest.param(1, 4, 6, "ddp ddp", marks=pytest.mark.full),
        pytest.param(3, 2, 4, "ddp fsdp", marks=pytest.mark.full),
        pytest.param(4, 1, 7, "fsdp ddp", marks=pytest.mark.full),
    ],
)
def test_another_number_of_ranks(before: int, after: int, step: int, wraps: str, tmp_path: Path) -> None:
    wrap, other = wraps.split()
    options = made(tmp_path, exactly=True, save="every(steps=1)", mode="sync", wrap=wrap)
    expected = steps(reference(options, tmp_path, before), before)
    assert len(expected) == 3 * PER_EPOCH
    first = replace(options, end_by="kill", end_at=step, out=f"{options.out}-before")
    assert run(first, before) == [-9] * before
    options = replace(options, wrap=other)
    assert run(options, after) == [0] * after
    done, redone = steps(first, before), steps(options, after)
    # Step ``step`` is saved before the next batch is fetched: it may be lost.
    assert min(redone) in (step, step + 1)
    assert max(redone) == 3 * PER_EPOCH
    whole = {number: done[number] for number in range(1, min(redone))} | redone
    for number, (loss, samples) in whole.items():
        assert math.isclose(loss, expected[number][0], rel_tol=1e-4), f"step {number}"
        assert len(samples) == 12
        assert samples == expected[number][1], f"step {number}"
    for epoch in range(3):
        read = [n for number in range(PER_EPOCH) for n in whole[epoch * PER_EPOCH + number + 1][1]]
        assert sorted(read) == list(range(48)), f"epoch {epoch}"


def test_new_ranks_draw_other_numbers(tmp_path: Path) -> None:
    """Those that weren't there before have random numbers of their own, and the others go on with theirs."""
    options = made(tmp_path, exactly=True, save="every(epochs=1)", check=False)
    whole = reference(options, tmp_path, 2)
    assert run(replace(options, end_by="kill", end_at=5), 2) == [-9] * 2
    assert run(options, 4) == [0] * 4
    drawn = [[note["drawn"] for note in notes(options, rank) if note.get("after") == 8] for rank in range(4)]
    assert len({number for [number] in drawn}) == 4
    for rank in range(2):
        assert drawn[rank] == [note["drawn"] for note in notes(whole, rank) if note.get("after") == 8]
