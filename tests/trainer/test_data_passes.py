"""Passes within an epoch: several, left early, over several sources, within each other, by loaders made anew."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, DistributedSampler

from ckptstore.errors import FormatError, IntegrityError, StateError
from ckptstore.trainer.data import Feeds
from tests.trainer.runs import (
    Interrupted,
    Numbers,
    Program,
    Run,
    drawn,
    run_killed,
    run_plain,
    run_resumed,
    run_whole,
    seeded,
    through_store,
)
from tests.trainer.test_data import check_everywhere, epochs_over

SIZE = 8


def shuffled(**options: Any) -> DataLoader[Any]:
    return DataLoader(Numbers(SIZE), shuffle=True, **{"batch_size": 3, **options})


def quiet(sentence: str) -> None:
    del sentence


def taken(feeds: Feeds, source: Any, count: int, name: str = "data") -> tuple[list[Any], Iterator[Any]]:
    """The first batches of a pass, all used, and the pass."""
    reading = feeds.batches(source, name)
    batches = []
    for _ in range(count):
        batches.append(next(reading))
        feeds.stepped()
    return batches, reading


def resumed(state: dict[str, Any]) -> Feeds:
    feeds = Feeds(quiet)
    feeds.load_state_dict(state, None)
    return feeds


def plain(batches: Any) -> list[Any]:
    return [batch.tolist() for batch in batches]


def test_a_loop_without_epochs_continues_in_its_pass() -> None:
    """Completed passes yield nothing after a resume, and the running one goes on."""

    def program(run: Run) -> None:
        loader = shuffled()
        while run.steps < 7 and len(run.events) < 7:
            for batch in run.feeds.batches(loader):
                run.step(batch.tolist())

    expected = run_plain(program)
    assert run_whole(program) == expected
    assert len(expected) == 9
    for steps in range(1, 9):
        again = run_resumed(program, run_killed(program, steps)).events
        common = min(len(again), 9 - steps)
        assert again[:common] == expected[steps : steps + common]
        assert common > 0


def test_a_pass_that_was_left_early_is_over() -> None:
    """Its consumer broke off, and the next pass of the epoch is continued after a resume."""

    def program(run: Run) -> None:
        loader = shuffled(batch_size=1)
        while run.epoch < 2:
            done = 0
            for batch in run.feeds.batches(loader):
                done = batch.item()
                if done == 0:
                    break
                run.step("first", done)
            for batch in run.feeds.batches(loader):
                run.step("second", batch.item())
            run.feeds.end_epoch()
            run.epoch += 1

    check_everywhere(program)


def test_two_sources_by_turns() -> None:
    """One pass after the other, and two at once."""

    def program(run: Run) -> None:
        left, right = shuffled(), shuffled(batch_size=2, generator=torch.Generator().manual_seed(5))
        while run.epoch < 2:
            for batch in run.feeds.batches(left, "left"):
                run.step("left", batch.tolist())
            for batch in run.feeds.batches(right, "right"):
                run.step("right", batch.tolist())
            for one, other in zip(run.feeds.batches(left, "left"), run.feeds.batches(right, "right"), strict=False):
                run.step("both", one.tolist(), other.tolist())
            run.feeds.end_epoch()
            run.epoch += 1

    check_everywhere(program)


def test_an_evaluation_within_a_pass_is_not_owed() -> None:
    """What was evaluated in the part that a resume leaves out isn't left out of the evaluations that follow."""

    def program(run: Run) -> None:
        loader, held = shuffled(batch_size=1), shuffled(batch_size=4)
        while run.epoch < 2:
            for batch in run.feeds.batches(loader):
                evaluated = plain(run.feeds.batches(held, "held")) if batch.item() % 3 == 0 else None
                run.step(batch.item(), evaluated)
            run.feeds.end_epoch()
            run.epoch += 1

    check_everywhere(program)


def test_an_evaluation_that_is_interrupted_within_a_pass_begins_anew_at_the_next() -> None:
    """Its position belongs to a part of the other pass that a resume leaves out."""
    feeds = Feeds(quiet)
    _, training = taken(feeds, shuffled(batch_size=1), 2)
    evaluation = feeds.batches(shuffled(batch_size=1), "held")
    next(evaluation)
    state = feeds.state_dict()
    assert state["sources"]["held"]["running"] is None
    assert state["sources"]["data"]["running"]["batches"] == 2
    assert len(list(resumed(state).batches(shuffled(batch_size=1), "held"))) == SIZE
    del training


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_dies_between_two_batches_continues(workers: int) -> None:
    """Before any batch, also of the evaluation after an epoch's training, which then begins anew."""

    def program(run: Run) -> None:
        loader, held = shuffled(num_workers=workers), shuffled(batch_size=5)
        while run.epoch < 2:
            for batch in run.feeds.batches(loader, between=run.between):
                run.step(batch.tolist())
            for batch in run.feeds.batches(held, "held", between=run.between):
                run.events.append(("held", batch.tolist()))
            run.feeds.end_epoch()
            run.epoch += 1

    expected = run_plain(program)
    for call in range(1, 14, 1 if workers == 0 else 3):
        killed = Run(die_at_call=call)
        seeded()
        with pytest.raises(Interrupted):
            program(killed)
        done = [event for event in killed.events if event[0] != "held"] + ["held"] * 2 * killed.epoch
        assert run_resumed(program, through_store(killed.saved)).events == expected[len(done) :], f"at call {call}"


def check_calls(program: Program, calls: int) -> None:
    """Resumed after dying at each of so many calls: the same as plain."""
    expected = run_plain(program)
    for call in range(1, calls + 1):
        killed = Run(die_at_call=call)
        seeded()
        with pytest.raises(Interrupted):
            program(killed)
        resumed_events = run_resumed(program, through_store(killed.saved)).events
        assert resumed_events == expected[len(killed.events) :], f"at call {call}"


def test_a_run_that_dies_after_a_pass_draws_what_follows() -> None:
    """The pass is over, so that nothing is built; the random state is set nevertheless."""

    def program(run: Run) -> None:
        loader = shuffled()
        while run.epoch < 2:
            drawn()
            for batch in run.feeds.batches(loader):
                run.step(batch.tolist())
            run.between(True)
            run.events.append(("after", drawn()))
            run.feeds.end_epoch()
            run.epoch += 1

    check_calls(program, 2)


def seeded_by(number: int, **options: Any) -> DataLoader[Any]:
    return shuffled(generator=torch.Generator().manual_seed(number), **options)


@pytest.mark.parametrize("anew", [False, True], ids=["one loader", "a loader for each epoch"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_dies_between_two_epochs_continues(anew: bool, workers: int) -> None:
    """Kept workers are built anew, and a generator stands where it was, unless it belongs to a new loader."""

    def program(run: Run) -> None:
        options = {"num_workers": workers, "persistent_workers": workers > 0 and not anew}
        loader = seeded_by(0, **options)
        while run.epoch < 4:
            if anew:
                loader = seeded_by(run.epoch, **options)
            for batch in run.feeds.batches(loader):
                run.step(batch.tolist())
            run.feeds.end_epoch()
            run.epoch += 1
            run.between(True)

    check_calls(program, 3)


def test_loading_that_draws_from_two_sources_at_once() -> None:
    """What the first one drew for its batch isn't taken back when the second one is continued."""

    class Noisy(Numbers):
        def __getitem__(self, index: int) -> Any:
            return index + drawn()[2]

    def program(run: Run) -> None:
        left, right = DataLoader(Noisy(SIZE), batch_size=2), DataLoader(Noisy(SIZE), batch_size=3)
        while run.epoch < 2:
            for one, other in zip(run.feeds.batches(left, "left"), run.feeds.batches(right, "right"), strict=False):
                run.step(one.tolist(), other.tolist())
            run.feeds.end_epoch()
            run.epoch += 1

    # Not compared with a plain loop: there zip builds both iterators before the first batch is loaded.
    expected = run_whole(program)
    assert len(expected) == 6
    for steps in range(1, 6):
        assert run_resumed(program, run_killed(program, steps)).events == expected[steps:], f"after {steps} steps"


def test_generators_of_every_kind_that_samplers_own() -> None:
    """NumPy's and Python's as well, wherever the sampler keeps them."""

    class Own:
        def __init__(self) -> None:
            self.new, self.old, self.python = np.random.default_rng(1), np.random.RandomState(2), random.Random(3)

        def __len__(self) -> int:
            return SIZE

        def __iter__(self) -> Iterator[int]:
            for _ in range(SIZE):
                yield (int(self.new.integers(SIZE)) + self.old.randint(SIZE) + self.python.randrange(SIZE)) % SIZE

    check_everywhere(epochs_over(lambda: DataLoader(Numbers(SIZE), batch_size=3, sampler=Own())))


def test_without_a_random_state_to_set_it_stays_what_it_was() -> None:
    """Building the iterator draws nothing that is seen."""
    feeds = Feeds(quiet)
    taken(feeds, shuffled(), 1)
    again = resumed(feeds.state_dict())
    seeded(11)
    expected = torch.rand(3)
    seeded(11)
    for _ in again.batches(shuffled()):
        assert torch.equal(torch.rand(3), expected)
        break


@given(
    count=st.integers(1, 30),
    before=st.integers(1, 7),
    after=st.integers(1, 7),
    used=st.integers(0, 8),
    seed=st.integers(),
)
@pytest.mark.filterwarnings("ignore:the source")
def test_every_sample_is_read_once_whatever_the_sizes(
    count: int, before: int, after: int, used: int, seed: int
) -> None:
    """Twice interrupted, each time with another batch size."""
    torch.manual_seed(seed % 2**32)
    read: list[int] = []
    feeds = Feeds(quiet)
    for size in (before, after, before):
        loader = DataLoader(Numbers(count), batch_size=size, shuffle=True)
        reading = feeds.batches(loader)
        for _, batch in zip(range(used), reading, strict=False):
            read += batch.tolist()
            feeds.stepped()
        feeds = resumed(feeds.state_dict())
    read += [
        index
        for batch in feeds.batches(DataLoader(Numbers(count), batch_size=after, shuffle=True))
        for index in batch.tolist()
    ]
    assert sorted(read) == list(range(count))


def test_a_loader_made_anew_each_epoch() -> None:
    """With a generator of its own each: after a resume it isn't overwritten by the last one's."""

    def program(run: Run) -> None:
        while run.epoch < 3:
            loader = shuffled(generator=torch.Generator().manual_seed(run.epoch))
            for batch in run.feeds.batches(loader):
                run.step(batch.tolist())
            run.feeds.end_epoch()
            run.epoch += 1

    check_everywhere(program)


def test_a_save_between_epochs_continues_the_loaders_own_generator() -> None:
    """Nothing of the next epoch was read, yet its order depends on where the generators stand."""
    feeds, loader = Feeds(quiet), shuffled(generator=torch.Generator().manual_seed(3))
    for _ in range(2):
        taken(feeds, loader, 3)[1].close()
        feeds.end_epoch()
    state = feeds.state_dict()
    expected = plain(feeds.batches(loader))

    again = resumed(state)
    assert plain(again.batches(shuffled(generator=torch.Generator().manual_seed(3)))) == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_used_up_passes_yield_nothing_and_call_between_once(workers: int) -> None:
    """The end wasn't found yet when it was saved."""
    feeds, loader = Feeds(quiet), shuffled(num_workers=workers)
    taken(feeds, loader, 3)
    state = feeds.state_dict()
    calls: list[bool] = []

    again = resumed(state)
    assert list(again.batches(shuffled(num_workers=workers), between=calls.append)) == []
    assert calls == [True]
    assert len(list(again.batches(loader))) == 3


@pytest.mark.parametrize("source", [shuffled(), shuffled(num_workers=2), [1, 2, 3]])
def test_between_is_called_before_each_batch_and_before_the_end(source: Any) -> None:
    """Also before it is found that there is no batch, and it is told when that is known."""
    calls: list[Any] = []
    for _ in Feeds(quiet).batches(source, between=calls.append):
        calls.append("batch")
    assert calls == [False, "batch"] * 3 + [True]


def test_skipping_loads_nothing() -> None:
    """The data set is only asked for what remains."""
    feeds = Feeds(quiet)
    taken(feeds, shuffled(batch_size=1), 5)
    loader = shuffled(batch_size=1)
    remaining = [batch.item() for batch in resumed(feeds.state_dict()).batches(loader)]
    assert len(remaining) == 3
    assert loader.dataset.asked == remaining


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8])
def test_another_batch_size_loses_no_sample(size: int) -> None:
    """A batch that was used in part gives the rest of it."""
    seeded()
    feeds = Feeds(quiet)
    used, reading = taken(feeds, shuffled(), 1)
    state = feeds.state_dict()
    rest = [index for batch in plain(reading) for index in batch]
    again = resumed(state)
    if size == 3:
        batches = plain(again.batches(shuffled(batch_size=size)))
    else:
        with pytest.warns(UserWarning, match=f"'data' had 3 samples a batch when it was saved and has {size} now"):
            batches = plain(again.batches(shuffled(batch_size=size)))
    assert [index for batch in batches for index in batch] == rest
    assert len(rest) + 3 * len(used) == SIZE


def test_what_was_handed_out_and_not_stepped_comes_again() -> None:
    """A window of gradient accumulation that wasn't completed is read again."""
    feeds = Feeds(quiet)
    _, reading = taken(feeds, shuffled(batch_size=1), 3)
    ahead = [next(reading).item(), next(reading).item()]
    state = feeds.state_dict()
    assert feeds.batch == 3
    again = resumed(state)
    assert again.batch == 3
    assert [batch.item() for batch in again.batches(shuffled(batch_size=1))][:2] == ahead


def test_a_state_that_is_not_continued_yet_is_saved_as_it_was() -> None:
    """Two interruptions with nothing read in between."""
    feeds = Feeds(quiet)
    taken(feeds, shuffled(), 1)
    list(feeds.batches(shuffled(), "other"))
    state = feeds.state_dict()
    assert resumed(state).state_dict() == state


def other_order(state: dict[str, Any]) -> None:
    """The random state at the start, changed: what a sampler does that isn't reproducible."""
    state["sources"]["data"]["running"]["start"]["random"]["torch"] = torch.Generator().manual_seed(99).get_state()


@pytest.mark.parametrize("used", [2, 3])
def test_another_order_is_told_by_the_next_samples(used: int) -> None:
    """The saved digest of the next samples isn't that of what comes."""
    seeded()
    feeds = Feeds(quiet)
    _, reading = taken(feeds, shuffled(batch_size=1), used)
    state = feeds.state_dict()
    assert state["sources"]["data"]["running"]["next"] is not None
    other_order(state)
    with pytest.warns(UserWarning, match="the source 'data' can't be continued exactly"):
        list(resumed(state).batches(shuffled(batch_size=1)))
    strict = resumed(state)
    strict.check(strict=True)
    with pytest.raises(IntegrityError, match="the source 'data' can't be continued exactly"):
        list(strict.batches(shuffled(batch_size=1)))
    del reading


def test_another_data_set_is_told_by_its_length() -> None:
    """It is longer now."""
    feeds = Feeds(quiet)
    taken(feeds, DataLoader(Numbers(8)), 2)
    with pytest.warns(UserWarning, match="had 8 samples when it was saved and has 9 now"):
        rest = list(resumed(feeds.state_dict()).batches(DataLoader(Numbers(9))))
    assert len(rest) == 7


def test_no_batch_is_kept() -> None:
    """While the consumer computes, nothing but the consumer holds its batch."""
    feeds, alive = Feeds(quiet), []
    for batch in feeds.batches(shuffled()):
        alive.append(weakref.ref(batch))
        feeds.stepped()
        feeds.state_dict()
        del batch
        gc.collect()
        assert alive[-1]() is None
    assert len(alive) == 3


def malformed(state: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """The state with one value changed."""
    node = state
    *parents, last = path.split("/")
    for key in parents:
        node = node[key]
    node[last] = value
    return state


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("sources", 3),
        ("last", ["data"]),
        ("sources/data", []),
        ("sources/data/passes", -1),
        ("sources/data/passes", True),
        ("sources/data/rest", None),
        ("sources/data/rest/own", 1),
        ("sources/data/rest/first", 1),
        ("sources/data/rest/kept", "yes"),
        ("sources/data/running", "all"),
        ("sources/data/running/kind", "magic"),
        ("sources/data/running/kind", []),
        ("sources/data/running/batches", 1.5),
        ("sources/data/running/samples", None),
        ("sources/data/running/length", "8"),
        ("sources/data/running/start", {}),
        ("sources/data/running/start/epochs", {"sampler": "1"}),
        ("sources/data/running/reset", 0),
        ("sources/data/running/next", 5),
    ],
)
def test_a_malformed_state_names_its_source_and_changes_nothing(path: str, value: Any) -> None:
    """Whatever is wrong, at loading."""
    feeds = Feeds(quiet)
    taken(feeds, shuffled(), 2)
    state = malformed(feeds.state_dict(), path, value)
    again = Feeds(quiet)
    with pytest.raises(FormatError, match="'data'" if "/" in path else "positions in the data"):
        again.load_state_dict(state, None)
    assert again.state_dict() == Feeds(quiet).state_dict()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("torch", torch.zeros(3, dtype=torch.uint8)),
        ("torch", "none"),
        ("python", {"version": 3}),
        ("numpy", {"bit_generator": "MT19937", "state": {"key": np.zeros(3, np.uint32), "pos": 0}}),
    ],
)
def test_a_malformed_random_state_names_its_source(path: str, value: Any) -> None:
    """It is found when the pass is continued."""
    feeds = Feeds(quiet)
    taken(feeds, shuffled(), 2)
    state = malformed(feeds.state_dict(), f"sources/data/running/start/random/{path}", value)
    with pytest.raises((FormatError, StateError), match="data/start/random"):
        next(resumed(state).batches(shuffled()))


def test_names_that_are_never_asked_for_do_no_harm() -> None:
    """They are saved on as they were."""
    feeds = Feeds(quiet)
    taken(feeds, shuffled(), 2, "gone")
    state = feeds.state_dict()
    again = resumed(state)
    assert len(list(again.batches(shuffled(), "data"))) == 3
    assert again.state_dict()["sources"]["gone"] == state["sources"]["gone"]


def test_another_kind_of_source_is_refused() -> None:
    """Indices mean nothing to a list."""
    feeds = Feeds(quiet)
    taken(feeds, shuffled(), 2)
    with pytest.raises(StateError, match="the source 'data' can't be continued: it was read by its indices"):
        next(resumed(feeds.state_dict()).batches([1, 2, 3]))


def test_what_can_not_be_iterated_is_refused_at_once() -> None:
    """Before anything is read."""
    with pytest.raises(StateError, match="the source 'data' is a int, which can't be iterated"):
        Feeds(quiet).batches(3)  # type: ignore[arg-type]


def test_the_epoch_of_a_distributed_sampler_is_restored() -> None:
    """Also where the loop sets it by a count of its own that a resume doesn't know."""
    feeds, data = Feeds(quiet), Numbers(SIZE)
    sampler: DistributedSampler[int] = DistributedSampler(data, num_replicas=2, rank=1)
    sampler.set_epoch(5)
    _, reading = taken(feeds, DataLoader(data, sampler=sampler), 2)
    state, expected = feeds.state_dict(), plain(reading)
    fresh: DistributedSampler[int] = DistributedSampler(data, num_replicas=2, rank=1)
    again = resumed(state)
    assert plain(again.batches(DataLoader(data, sampler=fresh))) == expected
    assert fresh.epoch == 5


def test_fewer_workers_than_were_kept() -> None:
    """An order drawn from the loader's own generator stays the same without the workers that had been kept."""
    make = lambda workers: shuffled(  # noqa: E731
        generator=torch.Generator().manual_seed(3), num_workers=workers, persistent_workers=workers > 0
    )
    program = epochs_over(lambda: make(2), epochs=2)
    expected = run_plain(program)
    saved = run_killed(program, 4)
    rest = run_resumed(epochs_over(lambda: make(0), epochs=2), saved)
    assert [event[:2] for event in rest.events] == [event[:2] for event in expected[4:]]
