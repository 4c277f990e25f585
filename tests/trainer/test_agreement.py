"""Where ranks meet: all at one boundary, whoever wants it and whatever is slow, and training sends no messages."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptstore.errors import SaveFailedError
from ckptstore.trainer import agreement
from ckptstore.trainer.agreement import Agreement
from tests.ranks.boards import MemoryBoard, boards
from tests.trainer.turns import Turns


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here goes by a clock, on however slow a machine."""
    monkeypatch.setattr(agreement, "_PATIENCE_S", 1e9)


class SlowBoard(MemoryBoard):
    """Before and after each call another thread may run. No training thread may call it."""

    turns: Turns
    trains: Callable[[], bool]

    def put(self, key: str, data: bytes) -> None:
        self._pass()
        super().put(key, data)
        self.turns.turn()

    def get(self, key: str) -> bytes | None:
        self._pass()
        found = super().get(key)
        self.turns.turn()
        return found

    def _pass(self) -> None:
        assert not self.trains(), "a training thread calls the board"
        self.turns.turn()


@dataclass
class Rank:
    """One rank of a simulated run.

    Attributes:
        begun, position: steps that it has begun, and boundaries that it has come to.
        met: where it met the others for what was asked, and what rank 0 wanted then.
        passed: how often it looked at a boundary.
    """

    agreement: Agreement
    begun: int = 0
    position: int = 0
    met: list[int] = field(default_factory=list)
    passed: int = 0
    over: bool = False


class Run:
    """Ranks that train in lockstep, whose threads take turns as the test chooses.

    Args:
        wants: at which turn of its watch thread rank 0 wants to meet, again and again.
        jumps: positions that have no boundary, as where a loop is left early.
    """

    def __init__(
        self, size: int, steps: int, ahead: list[int], wants: set[int], jumps: set[int], choose: Callable[[int], int]
    ) -> None:
        self.steps, self.wants, self.jumps = steps, wants, jumps
        self.turns = Turns(choose, agreement)
        self.ticks, self.wanted, self.answered = 0, 0, 0
        self.training = threading.local()
        messages: dict[str, bytes] = {}
        self.ranks = [self.rank(number, size, messages, ahead[number]) for number in range(size)]

    def rank(self, number: int, size: int, messages: dict[str, bytes], ahead: int) -> Rank:
        board = SlowBoard(number, size, messages)
        board.turns, board.trains = self.turns, lambda: hasattr(self.training, "rank")
        ours = Agreement(
            board,
            "run",
            position=lambda: self.ranks[number].position,
            ahead=lambda: ahead,
            wants=lambda: 1 if self.wanted > self.answered else None,
            told=lambda wanted: None,
            gone=lambda rank: None,
            timeout_s=1e6,
            pause=lambda seconds: self.turns.turn(),
        )
        return Rank(ours)

    def go(self) -> None:
        pairs = [(lambda r=rank: self.train(r), lambda r=rank: self.watch(r)) for rank in self.ranks]  # type: ignore[misc]
        self.turns.run(*(function for pair in pairs for function in pair))

    def train(self, rank: Rank) -> None:
        self.training.rank = rank
        for step in range(1, self.steps + 1):
            rank.begun = step
            # A step is done when all have sent their gradients.
            while any(other.begun < step for other in self.ranks):
                self.turns.turn()
            rank.position = step
            self.turns.turn()
            if step not in self.jumps:
                self.boundary(rank)
        if rank is self.ranks[0]:
            rank.agreement.finish()
            self.closed = True
        while not self.closed:
            self.turns.turn()
        rank.over = True

    closed = False

    def boundary(self, rank: Rank) -> None:
        rank.passed += 1
        if not rank.agreement.is_time(rank.position):
            return
        rank.met.append(rank.position)
        self.turns.turn()
        if rank is self.ranks[0]:
            self.answered = self.wanted
            self.turns.turn()
        rank.agreement.end_meeting()

    def watch(self, rank: Rank) -> None:
        while not rank.over:
            self.turns.turn()
            if rank is self.ranks[0]:
                self.ticks += 1
                self.wanted += self.ticks in self.wants
            rank.agreement.tick()


@given(
    size=st.integers(2, 4),
    steps=st.integers(1, 60),
    ahead=st.lists(st.integers(1, 3), min_size=4, max_size=4),
    wants=st.one_of(st.sets(st.integers(1, 40), max_size=4), st.just(set(range(1, 200)))),
    jumps=st.sets(st.integers(1, 25), max_size=3),
    bias=st.lists(st.sampled_from([1, 3, 10, 30, 100]), min_size=8, max_size=8),
    seed=st.integers(0, 1 << 32),
)
def test_all_meet_at_one_boundary(
    size: int, steps: int, ahead: list[int], wants: set[int], jumps: set[int], bias: list[int], seed: int
) -> None:
    """However the threads of the ranks are interleaved: where one meets, all do, and what was asked for is minded."""
    dice = random.Random(seed)
    # Some threads are much slower than others.
    run = Run(size, steps, ahead, wants, jumps, lambda count: dice.choices(range(count), bias[:count])[0])
    run.go()
    first = run.ranks[0]
    assert all(rank.met == first.met for rank in run.ranks)
    assert all(rank.passed == steps - len([s for s in jumps if s <= steps]) for rank in run.ranks)
    # Each request led to a meeting, or came too late for one.
    assert run.answered == run.wanted or max(first.met, default=0) <= steps
    assert len(first.met) <= len(wants)


@pytest.mark.parametrize("size", [2, 4])
def test_something_is_met_for(size: int) -> None:
    """The simulation does come to meetings, several in one run."""
    dice = random.Random(1)
    run = Run(size, 400, [2] * size, {5, 40, 80}, set(), lambda count: dice.randrange(count))
    run.go()
    assert len(run.ranks[0].met) == 3
    assert all(rank.met == run.ranks[0].met for rank in run.ranks)
    assert run.answered == run.wanted == 3


def test_a_faster_thread_is_not_overtaken() -> None:
    """A hold that the training thread has gone past while it was set is set anew, farther ahead."""
    here = [0]

    def position() -> int:
        here[0] += 3
        return here[0]

    other = boards(2)[1]
    fast = made(other, position=position, ahead=lambda: 1)
    other.put("run/round/1", b"[0]")
    fast.tick()
    hold = int(other.messages["run/hold/1/1"])
    # Looked at more than twice: the first holds were passed.
    assert here[0] > 6
    assert hold > here[0]


def made(board: MemoryBoard, timeout_s: float = 60, **more: Callable[..., object]) -> Agreement:
    given = {"position": lambda: 5, "ahead": lambda: 2, "wants": lambda: "a save", **more}
    given = {"told": lambda wanted: None, "gone": lambda rank: None, **given}
    return Agreement(board, "run", timeout_s=timeout_s, **given)  # type: ignore[arg-type]


def test_a_round_in_words() -> None:
    """Rank 0 begins, the others hold, the farthest hold is where they meet; its messages are forgotten."""
    zero, one, two = boards(3)
    heard: list[str] = []
    first, second, third = made(zero), made(one, ahead=lambda: 9), made(two, told=heard.append)
    assert not first.is_time(1 << 60)
    first.tick()
    second.tick()
    third.tick()
    assert heard == ["a save"]
    first.tick()
    second.tick()
    third.tick()
    assert [each.is_time(13) for each in (first, second, third)] == [False] * 3
    # Not every position has a boundary.
    assert [each.is_time(position) for each, position in ((first, 14), (second, 14), (third, 15))] == [True] * 3
    assert not first.is_time(1 << 60)
    assert list(zero.messages) == ["run/meet/1"]


@pytest.mark.parametrize(
    ("why", "text"),
    [(None, "rank 2 of 3 hasn't answered"), ("ValueError: no", "rank 2 of 3 has ended: ValueError: no")],
)
def test_a_rank_that_never_answers(why: str | None, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that train end with an error that names it, at the boundary that they may not pass."""
    monkeypatch.setattr(agreement, "_PATIENCE_S", 0.0)
    zero, one, _ = boards(3)
    first = made(zero, timeout_s=0.0 if why is None else 60, gone=lambda rank: why if rank == 2 else None)
    second = made(one)
    first.tick()
    second.tick()
    first.tick()
    second.tick()
    for each in (first, second):
        with pytest.raises(SaveFailedError, match=text):
            each.is_time(7)


def test_rank_0_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits for its answer is told."""
    monkeypatch.setattr(agreement, "_PATIENCE_S", 0.0)
    _, one = boards(2)
    held = made(one, gone=lambda rank: "KeyError: 'x'")
    one.put("run/round/1", b"[0]")
    held.tick()
    with pytest.raises(SaveFailedError, match="rank 0 of 2 has ended: KeyError: 'x'"):
        held.is_time(7)


def test_nobody_answers_a_hold() -> None:
    """Rank 0 is gone in the midst of it."""
    _, one = boards(2)
    held = made(one, timeout_s=-2.0)
    one.put("run/round/1", b"[0]")
    held.tick()
    assert not held.is_time(6)
    with pytest.raises(SaveFailedError, match="the ranks haven't agreed within"):
        held.is_time(7)


def test_no_round_begins_at_the_end() -> None:
    """Once rank 0 has finished, or while it meets the others anyway."""
    zero, _ = boards(2)
    first = made(zero)
    first.begin_meeting()
    first.tick()
    assert not zero.messages
    first.end_meeting()
    first.finish()
    first.tick()
    assert not zero.messages
