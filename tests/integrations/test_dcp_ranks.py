"""Four real ranks save and load by way of ``torch.distributed.checkpoint``; what they check is in ``dcp_program``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import ckptstore as cs
from tests.integrations import dcp_program
from tests.integrations.forking import Forker

RANKS = range(dcp_program.SIZE)
pytestmark = pytest.mark.timeout(dcp_program.LIMIT_S + 60)


@pytest.fixture(scope="module")
def forker() -> Iterator[Forker]:
    made = Forker("tests.integrations.dcp_program")
    yield made
    made.close()


def run(forker: Forker, folder: Path, **fields: object) -> list[int]:
    """How it ended on each rank."""
    assert forker.run({"folder": str(folder), **fields}) == 0
    ended: list[int] = json.loads((folder / "ended").read_text())
    return ended


def test_four_ranks(forker: Forker, tmp_path: Path) -> None:
    """Every check ends well on every rank. They share one group of processes, whose start takes longer than they do."""
    ended = run(forker, tmp_path)
    notes = [json.loads((tmp_path / f"notes-{rank}").read_text()) for rank in RANKS]
    failed = {(name, rank): text for rank, each in enumerate(notes) for name, text in each.items() if text is not None}
    # The first one is the cause of the others.
    assert not failed, "\n".join(f"{name} on rank {rank}: {text}" for (name, rank), text in failed.items())
    assert [list(each) for each in notes] == [list(dcp_program.CHECKS) for _ in RANKS]
    assert ended == [0 for _ in RANKS]


@pytest.mark.parametrize(
    ("victim", "where"), [(2, "before"), (1, "written"), (0, "before"), (0, "written"), (0, "committed")]
)
def test_a_rank_that_is_gone(victim: int, where: str, forker: Forker, tmp_path: Path) -> None:
    """All ranks are told; the checkpoint is whole or not there at all, and the next run saves and collects the rest."""
    ended = run(forker, tmp_path, victim=victim, where=where)
    assert ended == [9 if rank == victim else 3 for rank in RANKS]
    latest = 2 if where == "committed" else 1
    with cs.open(tmp_path / "store") as store:
        assert [saved.step for saved in store.checkpoints()] == [1, 2][:latest]
        assert torch.equal(store.load()["w"], dcp_program.numbers(8, 3, start=latest))
        store.save({"n": 3}, step=3)
        assert bool(store.prune(grace_s=0).leftovers) == (where != "committed")
        store.rollback("step:1")
        assert torch.equal(store.load()["w"], dcp_program.numbers(8, 3, start=1))
        assert store.verify().ok
