"""Questions put to rank 0: all get its answer, or the same error."""

from __future__ import annotations

from typing import Any

import pytest

from ckptstore.engine.crew import Crew, Each, RanksError
from ckptstore.errors import SaveFailedError, StateError, StorageError
from tests.ranks.boards import MemoryBoard, boards, on_all


def crews(size: int, timeout_s: float = 30.0) -> list[Crew]:
    return [Crew(board, timeout_s=timeout_s, folder="test") for board in boards(size)]


def test_all_get_the_answer_to_all_messages() -> None:
    crew = crews(3)
    for _ in range(3):
        found = on_all(3, lambda rank: crew[rank].exchange("it", [rank], lambda messages: {"all": messages}))
        assert found == [{"all": [[0], [1], [2]]}] * 3


def test_each_gets_its_own() -> None:
    crew = crews(3)
    assert on_all(3, lambda rank: crew[rank].exchange("it", rank, lambda m: Each(n * n for n in m))) == [0, 1, 4]


def test_a_list_is_one_answer() -> None:
    crew = crews(2)
    assert on_all(2, lambda rank: crew[rank].exchange("it", rank, lambda messages: messages)) == [[0, 1], [0, 1]]


def test_messages_are_forgotten() -> None:
    """A run of weeks doesn't fill the memory of whoever keeps them."""
    crew = crews(4)
    for _ in range(20):
        on_all(4, lambda rank: crew[rank].exchange("it", rank, lambda messages: None))
        (name,) = {one.name() for one in crew}
        for one in crew:
            one.report(name, {"x": 1})
        assert crew[0].reports(name, bad=lambda m: False) == {rank: {"x": 1} for rank in range(4)}
        crew[0].announce(name, "done")
        assert [one.outcome(name) for one in crew[1:]] == ["done"] * 3
    board = crew[0].board
    assert isinstance(board, MemoryBoard)
    assert len(board.messages) <= 16


def test_whoever_is_missing_is_named_to_all() -> None:
    crew = crews(4, timeout_s=0.2)

    def come(rank: int) -> Any:
        return crew[rank].exchange("a save", rank, lambda messages: 1) if rank != 2 else None

    found = on_all(4, come)
    assert found[2] is None
    for rank in (0, 1, 3):
        assert isinstance(found[rank], RanksError)
        assert found[rank].ranks == [2]
        assert "rank 2 of 4 hasn't come to a save" in str(found[rank])


def test_rank_0_is_missing() -> None:
    crew = crews(3, timeout_s=0.1)
    found = on_all(3, lambda rank: crew[rank].exchange("a save", 1, lambda m: 1) if rank else None)
    assert [str(error) for error in found[1:]] == ["rank 0 hasn't come to a save within 2.2 s"] * 2


def test_who_comes_late_gets_the_error_of_the_others_and_all_go_on() -> None:
    crew = crews(3, timeout_s=0.2)
    first = on_all(3, lambda rank: crew[rank].exchange("a save", 1, lambda m: 1) if rank < 2 else None)
    assert all(isinstance(error, RanksError) for error in first[:2])
    with pytest.raises(RanksError, match="rank 2 of 3"):
        crew[2].exchange("a save", 1, lambda m: 1)
    assert on_all(3, lambda rank: crew[rank].exchange("a save", 1, lambda m: 7)) == [7] * 3


def test_all_must_do_the_same() -> None:
    crew = crews(2)
    found = on_all(2, lambda rank: crew[rank].exchange(["a save", "a load"][rank], 1, lambda m: 1))
    assert [str(error) for error in found] == ["rank 1 is at a load, rank 0 at a save: all must do the same"] * 2


@pytest.mark.parametrize("who", [0, 1])
def test_one_has_an_error(who: int) -> None:
    crew = crews(2)

    def come(rank: int) -> Any:
        error = StateError("no such thing", path="x") if rank == who else None
        return crew[rank].exchange("a save", 1, lambda m: pytest.fail("asked"), error=error)

    found = on_all(2, come)
    for error in found:
        assert isinstance(error, RanksError)
        told = error.as_error(SaveFailedError)
        assert type(told) is StateError
        assert str(told) == f"rank {who}: no such thing"


def test_rank_0_can_not_decide() -> None:
    """Ours, or a bug: nobody waits in vain."""

    def fail(messages: list[Any]) -> Any:
        raise StorageError("the disk is gone")

    def crash(messages: list[Any]) -> Any:
        raise ZeroDivisionError("oh")

    crew = crews(2)
    found = on_all(2, lambda rank: crew[rank].exchange("it", 1, fail))
    assert [type(error.as_error(SaveFailedError)) for error in found] == [StorageError] * 2  # type: ignore[union-attr]
    found = on_all(2, lambda rank: crew[rank].exchange("it", 1, crash))
    assert isinstance(found[0], ZeroDivisionError)
    assert isinstance(found[1], RanksError)
    assert "rank 0 has failed: ZeroDivisionError('oh')" in str(found[1])


def test_the_board_is_gone() -> None:
    class Gone(MemoryBoard):
        def put(self, key: str, data: bytes) -> None:
            raise StorageError("connection reset")

    crew = Crew(Gone(1, 2, {}), timeout_s=5, folder="test")
    with pytest.raises(RanksError, match="at a save: connection reset"):
        crew.exchange("a save", 1, lambda m: 1)
