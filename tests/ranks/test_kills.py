"""One of four ranks is killed at each moment of a save: all others fail, or all succeed, and nothing is mixed."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

import ckptstore as cs
from ckptstore.engine.commit import read_fate
from ckptstore.format.records import CondemnedRecord
from tests.ranks.killing import CASES, SUCCESS, Moment, arm
from tests.ranks.processes import Failure, Ranks

TIMEOUT_S = 5.0
UNHEARD = "at a save: rank 0, or the launcher, is gone"
SAMPLE = 16
"""Of so many cases one is run, unless all are wanted."""


def state(step: int, rank: int) -> dict[str, Any]:
    """Two files for each rank: what is its own, and what all have."""
    return {
        "shared": {"w": torch.full((3, 4), float(step))},
        "own": {"x": torch.full((5,), 10.0 * step + rank)},
        "head": {f"h{rank}": torch.full((2,), 100.0 * step + rank)},
        "step": step,
    }


def save_twice(url: str, moment: Moment | None, mode: str) -> tuple[str, str, float]:
    """Save step 1, then step 2, in which one rank is killed; what came of that, and how long it took."""
    rank = distributed.get_rank()
    with cs.open(url, rank_timeout=TIMEOUT_S) as store:
        store.save(state(1, rank), step=1)
        if moment is not None:
            arm(moment)
        began = time.monotonic()
        try:
            saved: Any = store.save(state(2, rank), step=2, mode=mode)  # type: ignore[call-overload]
            found = ("saved", (saved if mode == "sync" else saved.result()).id)
        except cs.SaveFailedError as error:
            found = ("failed", str(error))
        return *found, time.monotonic() - began


def _number(case: tuple[int, str, Moment]) -> int:
    return CASES.index(case)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"rank {case[0]} {case[1]}")
def test_a_rank_is_killed(case: tuple[int, str, Moment], tmp_path: Path, full: bool) -> None:
    victim, name, moment = case
    number = _number(case)
    if not full and number % SAMPLE != 3:
        pytest.skip("complete enumeration: make test-all")
    mode = "sync" if number % 2 else "async"
    each = [moment if rank == victim else None for rank in range(4)]
    ranks = Ranks(4, _save_twice_as, str(tmp_path), mode, each=each)
    found = ranks.results()
    assert found[victim] is None, "it was not killed"
    survivors = {rank: one for rank, one in enumerate(found) if rank != victim}
    for rank, one in survivors.items():
        assert not isinstance(one, Failure | None), f"rank {rank}: {one}"
        # Rank 0 waits so long, the others a little longer.
        assert one[2] < 2 * TIMEOUT_S + 7, f"rank {rank} took {one[2]} s"
    ends = {one[0] for one in survivors.values()}
    assert ends == ({"saved"} if name in SUCCESS else {"failed"}), survivors
    if ends == {"failed"}:
        assert any(f"rank {victim}" in one[1] for one in survivors.values()), survivors
    # Rank 0 may be gone before any other has heard which id it is: then nobody else can commit it, or condemn it.
    unheard = victim == 0 and all(UNHEARD in one[1] for one in survivors.values())
    check_store(tmp_path, 2 if ends == {"saved"} else 1, may_be_open=unheard)


def _save_twice_as(url: str, mode: str, moment: Moment | None) -> tuple[str, str, float]:
    return save_twice(url, moment, mode)


def check_store(path: Path, step: int, *, may_be_open: bool) -> None:
    """The newest checkpoint is whole and of one step, on any number of ranks; the other id never will be one."""
    with cs.open(path) as store:
        catalogue = store.catalogue()
        assert [c.step for c in catalogue.checkpoints] == list(range(1, step + 1))
        began = {entry.key.split("/")[1] for entry in store._storage.list("checkpoints/")}
        condemned = {str(id) for id in catalogue.condemned}
        left = began - {c.id for c in catalogue.checkpoints} - condemned
        assert may_be_open or not left, "an id whose fate is open"
        for id in catalogue.condemned:
            fate = read_fate(store._storage, id)
            assert isinstance(fate, CondemnedRecord)
            assert re.search(r"rank \d", fate.reason), "for whoever looks later"
        assert store.verify().ok
        for rank in range(4):
            loaded = store.load(rank=rank)
            expected = state(step, rank)
            for part in ("shared", "own", "head"):
                for key, value in expected[part].items():
                    assert torch.equal(loaded[part][key], value), (part, rank)
        # And the next run saves on top of it, and has what is left condemned and removed.
        assert store.save({"x": 1}, step=9).step == 9
        store.prune()
        assert not {entry.key for entry in store._storage.list("checkpoints/") if entry.key.split("/")[1] in left}
