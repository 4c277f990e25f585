"""All ranks are killed at a step, and go on exactly: every loss, sample and random number of every rank."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import ckptstore as cs
from tests.ranks.trained import Shared, notes, reference, run
from tests.trainer.processes import check_same

STEPS = 12


def made(folder: Path, **more: object) -> Shared:
    options = Shared(str(folder / "store"), str(folder / "notes"), check=True, more={"rank_timeout": 60})
    return replace(options, **more)  # type: ignore[arg-type]


def saved(options: Shared, size: int = 2) -> list[tuple[int, list[str]]]:
    """Steps and reasons of all checkpoints, every byte of them proven, each by all ranks."""
    with cs.open(options.url) as store:
        report = store.verify()
        assert report.ok, report
        found = store.checkpoints()
    assert {checkpoint.world_size for checkpoint in found} <= {size}
    return [(checkpoint.step, list(checkpoint.reasons)) for checkpoint in found]


CASES = [
    ("ddp", "overlapped", "backward", 5),
    ("ddp", "async", "evaluation", 8),
    ("fsdp", "overlapped", "step", 7),
    ("fsdp", "sync", "backward", 2),
]
ALL = [
    (wrap, mode, where, step)
    for wrap in ("ddp", "fsdp")
    for mode in ("overlapped", "async", "sync")
    for where, steps in (("step", range(1, STEPS)), ("backward", range(STEPS)), ("evaluation", (4, 8, 12)))
    for step in steps
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Shared]:
    """Runs that nothing interrupts."""
    folders = {wrap: tmp_path_factory.mktemp(wrap) for wrap in ("ddp", "fsdp")}
    return {wrap: reference(made(folder, wrap=wrap), folder, 2) for wrap, folder in folders.items()}


@pytest.mark.parametrize(
    ("wrap", "mode", "where", "step"),
    [pytest.param(*case, marks=() if case in CASES else pytest.mark.full) for case in ALL],
)
def test_killed_anywhere(wrap: str, mode: str, where: str, step: int, tmp_path: Path, whole: dict[str, Shared]) -> None:
    """Evaluations aren't in step: there one rank may see that the other is gone, and waits for it a while."""
    options = made(tmp_path, wrap=wrap, mode=mode, save="every(steps=2)" if mode == "sync" else "every(steps=3)")
    options = replace(options, more={"rank_timeout": 5})
    ended = run(replace(options, end_by="kill", end_at=step, where=where), 2)
    assert ended == [-9, -9] or (where == "evaluation" and -9 in ended)
    assert run(options, 2) == [0, 0]
    for rank in range(2):
        check_same(notes(options, rank), notes(whole[wrap], rank))
    saved(options)


def test_each_rank_draws_its_own(whole: dict[str, Shared]) -> None:
    """Else the test above would prove little."""
    drawn = [[note["drawn"] for note in notes(whole["ddp"], rank) if "drawn" in note] for rank in range(2)]
    assert len(drawn[0]) == len(drawn[1]) == 3
    assert not set(drawn[0]) & set(drawn[1])


def test_one_rank_is_killed(tmp_path: Path, whole: dict[str, Shared]) -> None:
    """The other one ends by itself, and what was saved before is there."""
    options = made(tmp_path, save="every(steps=1)", end_by="kill", end_at=6, breaks=1)
    ended = run(replace(options, more={"rank_timeout": 3}), 2)
    assert ended[1] == -9
    assert ended[0] != 0
    steps = [step for step, _ in saved(options)]
    assert steps in ([1, 2, 3, 4], [1, 2, 3, 4, 5])
    assert run(replace(options, end_by=None), 2) == [0, 0]
    for rank in range(2):
        check_same(notes(options, rank), notes(whole["ddp"], rank))
