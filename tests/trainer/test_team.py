"""What rank 0 says reaches the others in order, and nobody waits for one that has ended."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from ckptstore.engine.crew import Crew
from ckptstore.errors import CheckpointError, DivergedError, NotFoundError, SaveFailedError
from ckptstore.trainer import team
from ckptstore.trainer.team import Team, raised, told_of
from tests.ranks.boards import MemoryBoard, boards


def made(board: MemoryBoard, timeout_s: float = 60, **more: Callable[..., Any]) -> Team:
    given: dict[str, Any] = {
        "position": lambda: 0,
        "ahead": lambda: 1,
        "wants": lambda: None,
        "told": lambda wanted: None,
        "asks": list,
        "heed": lambda kind, what: None,
        **more,
    }
    return Team(Crew(board, timeout_s=timeout_s, folder="job"), **given)


def test_what_is_said_is_heard_in_order() -> None:
    """Also where one side is faster, and numbers that JSON has no words for."""
    zero, one = map(made, boards(2))
    zero.say("begin", facts={"loss": math.inf})
    zero.say("done")
    assert one.hear() == {"what": "begin", "facts": {"loss": math.inf}}
    assert one.hear()["what"] == "done"
    thread = threading.Timer(0.02, lambda: zero.say("late"))
    thread.start()
    assert one.hear() == {"what": "late"}
    thread.join()


def test_messages_are_forgotten() -> None:
    """What all have read; never what one has yet to read."""
    zero, one, two = boards(3)
    first, second, third = made(zero), made(one), made(two)

    def kept() -> set[int]:
        return {int(key.rpartition("/")[2]) for key in zero.messages if "/said/" in key}

    for _ in range(3 * team.READ_EVERY):
        first.say("done")
    for _ in range(2 * team.READ_EVERY):
        second.hear()
    for _ in range(team.READ_EVERY):
        third.hear()
    for _ in range(team.READ_EVERY):
        first.say("done")
    assert kept() == set(range(team.READ_EVERY + 1, 4 * team.READ_EVERY + 1))
    for each in (second, third, third):
        for _ in range(team.READ_EVERY):
            each.hear()
    for _ in range(team.READ_EVERY):
        first.say("done")
    assert kept() == set(range(3 * team.READ_EVERY + 1, 5 * team.READ_EVERY + 1))


def test_rank_0_says_nothing() -> None:
    """After its deadline whoever waits gives up."""
    _, one = boards(2)
    with pytest.raises(SaveFailedError, match="rank 1 waits for rank 0, which hasn't come for"):
        made(one, timeout_s=0.001).hear()


def test_rank_0_has_much_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """No time counts while it is seen at a meeting."""
    monkeypatch.setattr(team, "CALLER_PAUSE_S", 0.001)
    zero, one = boards(2)
    first, second = made(zero), made(one, timeout_s=0.05)
    first.agreement.begin_meeting()
    ends = time.monotonic() + 0.3

    def work() -> None:
        while time.monotonic() < ends:
            first.tick()
            time.sleep(0.002)
        first.say("done")

    thread = threading.Thread(target=work)
    thread.start()
    assert second.hear()["what"] == "done"
    assert time.monotonic() >= ends
    thread.join()


def test_rank_0_has_ended() -> None:
    """What it said before still counts."""
    zero, one = map(made, boards(2))
    zero.say("done")
    zero.leave(KeyError("x"))
    assert one.hear()["what"] == "done"
    with pytest.raises(SaveFailedError, match="rank 0 has ended: KeyError: 'x'"):
        one.hear()


def test_asking() -> None:
    """Each rank may; what two ask for alike is heard at least once, after either has asked."""
    zero, one, two = boards(3)
    heard: list[tuple[str, str]] = []
    first = made(zero, heed=lambda kind, what: heard.append((kind, what)))
    asking = [[("save", "SIGUSR1"), ("stop", "15")], [("save", "SIGUSR1")]]
    second, third = made(one, asks=lambda: asking[0]), made(two, asks=lambda: asking[1])
    first.tick()
    second.tick()
    third.tick()
    first.tick()
    assert heard == [("save", "SIGUSR1"), ("stop", "15")]
    first.tick()
    assert len(heard) == 2
    asking[0] = []
    third.tick()
    first.tick()
    assert heard[2:] == [("save", "SIGUSR1")]


@pytest.mark.parametrize(
    "error", [DivergedError("gone", id="a", step=3), NotFoundError("no such"), SaveFailedError("full"), SystemExit(143)]
)
def test_errors_reach_the_others(error: BaseException) -> None:
    """As they are."""
    found = raised(told_of(error))
    assert type(found) is type(error)
    assert str(found) == str(error)
    if isinstance(error, CheckpointError):
        assert vars(found) == vars(error)


def test_other_errors_reach_the_others() -> None:
    """Of rank 0's own, as of a listener."""
    found = raised(told_of(ValueError("no")))
    assert isinstance(found, SaveFailedError)
    assert str(found) == "rank 0 has ended: ValueError: no"
