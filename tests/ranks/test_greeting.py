"""Ranks that begin to talk hear each other, whatever a job before them has left."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from ckptstore.engine.crew import Crew, RanksError
from ckptstore.engine.greeting import AbsentError, greet
from tests.ranks.boards import MemoryBoard, on_all


def greeted(messages: dict[str, bytes], size: int, come: Callable[[int], bool] = lambda rank: True) -> list[Any]:
    def one(rank: int) -> str:
        # The leader and the others come in any order.
        time.sleep(0.002 * (rank * 7 % 5))
        return greet(MemoryBoard(rank, size, messages), "job", 0.3, 0.4)

    return on_all(size, lambda rank: one(rank) if come(rank) else None)


@pytest.mark.parametrize("size", [2, 5])
def test_all_have_one_folder(size: int) -> None:
    """A new one each time, though everything of the times before is still there."""
    messages: dict[str, bytes] = {}
    folders = []
    for _ in range(10):
        found = set(greeted(messages, size))
        assert len(found) == 1
        folders += found
    assert len(set(folders)) == 10
    assert all(str(folder).startswith("job/") for folder in folders)


def test_another_number_of_ranks() -> None:
    messages: dict[str, bytes] = {}
    for size in (4, 2, 3):
        assert len(set(greeted(messages, size))) == 1


def test_whoever_is_missing() -> None:
    """Also where its greeting of the time before is there."""
    messages: dict[str, bytes] = {}
    greeted(messages, 3)
    first, second, _ = greeted(messages, 3, lambda rank: rank != 2)
    assert isinstance(first, AbsentError)
    assert first.ranks == [2]
    assert not isinstance(second, BaseException)
    _, second, third = greeted(messages, 3, lambda rank: rank != 0)
    for error in (second, third):
        assert isinstance(error, AbsentError)
        assert error.ranks == [0]


def test_a_crew_hears_no_old_answers() -> None:
    """A job that is started again asks the same question and has another answer."""
    messages: dict[str, bytes] = {}
    for answer in ("old", "new"):
        crews = [Crew(MemoryBoard(rank, 3, messages), timeout_s=30) for rank in range(3)]
        for crew in crews:
            # As in processes of their own, which all count from 0.
            crew._number = 0
        found = on_all(3, lambda rank: crews[rank].exchange("it", rank, lambda messages: answer))  # noqa: B023
        assert found == [answer] * 3


def test_a_missing_rank_is_named() -> None:
    crews = [Crew(MemoryBoard(rank, 3, {}), timeout_s=0.05) for rank in (0, 1)]
    with pytest.raises(RanksError, match="ranks 1, 2 of 3 hasn't come to a save"):
        crews[0].exchange("a save", 1, lambda messages: 1)
    with pytest.raises(RanksError, match="rank 0 hasn't come to a save"):
        crews[1].exchange("a save", 1, lambda messages: 1)
