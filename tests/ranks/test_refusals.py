"""Something is wrong with one of four ranks: the save fails on all, by name, and the next one succeeds."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TypeAlias

import pytest
import torch

import ckptstore as cs
from tests.ranks.processes import run
from tests.ranks.scenarios import FAIL, TIMEOUT_S, run_all
from tests.ranks.test_kills import state

Outcomes: TypeAlias = tuple[Path, list[dict[str, tuple[str, str, float]]]]

SLOW = ("one_does_not_come", "one_is_slow", "rank_0_says_nothing")


@pytest.fixture(scope="module")
def outcomes(
    tmp_path_factory: pytest.TempPathFactory, full: bool
) -> tuple[Path, list[dict[str, tuple[str, str, float]]]]:
    folder = tmp_path_factory.mktemp("refusals")
    names = [name for name in FAIL if full or name not in SLOW]
    return folder, run(4, run_all, str(folder), names)


@pytest.mark.parametrize("name", FAIL)
def test_it_fails_on_all_ranks(name: str, outcomes: Outcomes, full: bool) -> None:
    folder, found = outcomes
    if name not in found[0]:
        pytest.skip("complete enumeration: make test-all")
    words = FAIL[name][1]
    for rank, one in enumerate(found):
        kind, text, took = one[name]
        assert kind in ("SaveFailedError", "StateError", "StorageError"), (rank, kind, text)
        assert took < 3 * TIMEOUT_S + 8, rank
    assert any(re.search(words, one[name][1]) for one in found), [one[name] for one in found]
    told = sum(bool(re.search(r"rank 2|ranks? 0|'w'|r00002|disk of rank 0", one[name][1])) for one in found)
    assert told >= 3, [one[name] for one in found]
    with cs.open(folder / name) as store:
        catalogue = store.catalogue()
        assert [c.step for c in catalogue.checkpoints] == [1, 3]
        began = {entry.key.split("/")[1] for entry in store._storage.list("checkpoints/")}
        assert began <= {c.id for c in catalogue.checkpoints} | {str(id) for id in catalogue.condemned}
        assert store.verify().ok
        for rank in range(4):
            assert torch.equal(store.load(rank=rank)["own"]["x"], state(3, rank)["own"]["x"])
