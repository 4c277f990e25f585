"""A pass that some ranks began is continued by any other number of them: no sample is lost, none is read twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import chain
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from ckptstore import RNG
from ckptstore.trainer.data import Feeds
from tests.trainer.fleets import (
    SIZE,
    USUAL,
    Batch,
    Fleet,
    Make,
    Options,
    State,
    loaders,
    own,
    plain,
    read,
    sampler,
    shared,
    together,
    uninterrupted,
)
from tests.trainer.runs import Numbers, drawn, seeded, through_store
from tests.trainer.test_data_kinds import Augmented
from tests.trainer.test_data_passes import quiet


class Leg(NamedTuple):
    """A part of a run: how many ranks, samples a batch, steps."""

    size: int
    batch_size: int
    steps: int


LEGS = st.lists(st.builds(Leg, st.integers(1, 5), st.integers(1, 4), st.integers(0, 4)), min_size=2, max_size=5)
OPTIONS = st.builds(
    Options,
    count=st.integers(0, 60),
    shuffle=st.booleans(),
    seed=st.integers(0, 9),
    epoch=st.integers(0, 3),
    drop_samples=st.booleans(),
    drop_batches=st.booleans(),
)


def run_legs(legs: list[Leg], options: Options) -> list[list[Batch]]:
    """One pass over all of them, of which the last one goes on to the end."""
    done: list[list[Batch]] = []
    states: list[State] | None = None
    for leg in legs:
        fleet = Fleet(leg.size, loaders(leg.batch_size, options), states)
        done += fleet.steps(None if leg is legs[-1] else leg.steps)
        states = fleet.states()
    return done


def beginning(legs: list[Leg]) -> Leg:
    """The leg that begins the pass."""
    return next((leg for leg in legs if leg.steps), legs[-1])


@given(legs=LEGS, options=OPTIONS)
@pytest.mark.filterwarnings("ignore:the source 'data' had .* samples a batch")
def test_whatever_the_ranks_every_sample_is_read_as_often_as_without_a_change(
    legs: list[Leg], options: Options
) -> None:
    """Each leg of the pass on another number of ranks, each with another batch size."""
    done = run_legs(legs, options)
    first = beginning(legs)
    expected = read(uninterrupted(first.size, loaders(first.batch_size, options._replace(drop_batches=False))))
    twice, lost = read(done) - expected, expected - read(done)
    # Only the ranks that end the pass may find that what is left isn't a multiple of them, or of all they take at once.
    dropped = max(leg.size * (leg.batch_size if options.drop_batches else 1) for leg in legs) - 1
    drops = options.drop_samples or options.drop_batches
    assert lost.total() <= (dropped if drops else 0)
    assert twice.total() <= (0 if drops else dropped)
    if not options.drop_batches and all(leg.size == legs[0].size for leg in legs):
        assert not twice
        assert not lost


@given(
    whole=st.sampled_from([4, 6, 12]), data=st.data(), options=OPTIONS, steps=st.lists(st.integers(0, 4), max_size=4)
)
def test_as_many_samples_at_a_time_make_the_same_batches(
    whole: int, data: st.DataObject, options: Options, steps: list[int]
) -> None:
    """Of all ranks together, up to the last one, which may need some samples twice."""
    sizes = st.sampled_from([size for size in range(1, whole + 1) if whole % size == 0])
    legs = [Leg(size, whole // size, count) for count in [*steps, 0] for size in [data.draw(sizes)]]
    first = beginning(legs)
    expected = together(uninterrupted(first.size, loaders(first.batch_size, options)))
    actual = together(run_legs(legs, options))
    full = [batch for batch in expected if len(batch) == whole]
    assert actual[: len(full)] == full
    last = tuple(Counter(chain.from_iterable(batches[len(full) :])) for batches in (actual, expected))
    if options.drop_samples or options.drop_batches:
        assert last[0] <= last[1]
    else:
        assert last[0] >= last[1]
        assert last[0].total() - last[1].total() < max(leg.size for leg in legs)


def test_four_two_three_and_one_ranks_in_one_pass() -> None:
    """By way of a store each time; a save without a step in between changes nothing."""
    options = Options(count=48)
    done: list[list[Batch]] = []
    states: list[State] | None = None
    for size, batch_size, steps in ((4, 3, 1), (2, 6, 1), (3, 4, 0), (3, 4, 1), (1, 12, 1)):
        fleet = Fleet(size, loaders(batch_size, options), states)
        done += fleet.steps(steps)
        states = [through_store(state) for state in fleet.states()]
    assert fleet.steps() == []
    assert together(done) == together(uninterrupted(4, loaders(3, options)))


@pytest.mark.parametrize("drop", [False, True])
def test_samples_that_do_not_suffice_for_all_come_twice_or_are_left_out(drop: bool) -> None:
    """Eight are left, for three ranks: the first one of them is read again, or two aren't read, and it is said."""
    options = Options(count=12, drop_samples=drop)
    fleet = Fleet(4, loaders(1, options))
    used = fleet.steps(1)
    expected = uninterrupted(4, loaders(1, options))
    left = list(chain.from_iterable(together(expected[1:])))
    third = Fleet(3, loaders(1, options), fleet.states())
    rest = third.steps()
    assert len(rest) == (2 if drop else 3)
    extra = read(used + rest) - read(expected)
    assert list(extra.elements()) == ([] if drop else [expected[1][0][0]])
    assert sorted(read(rest)) == sorted(left) or drop
    what = "2 are left out" if drop else "1 are read again"
    assert third.said[0] == (
        "the source 'data' goes on within its pass with 3 ranks, after 4 ranks; of its last 8 samples "
        f"{what}, so that all ranks read as many. Together they take 3 samples at a time, and took 4"
    )


def test_what_one_split_would_have_left_out_is_there_for_the_next() -> None:
    """Three ranks that read nothing don't change what four go on with."""
    for drop in (False, True):
        options = Options(count=20, drop_samples=drop)
        fleet = Fleet(4, loaders(1, options))
        fleet.steps(1)
        third = Fleet(3, loaders(1, options), fleet.states())
        assert [len(next(reading)) for reading in third.readings] == [1, 1, 1]
        back = Fleet(4, loaders(1, options), third.states())
        assert together(back.steps()) == together(uninterrupted(4, loaders(1, options))[1:])


@pytest.mark.parametrize(("workers", "persistent"), [(0, False), (2, False), (2, True)])
def test_workers_and_the_passes_after(workers: int, persistent: bool) -> None:
    """The next pass is that of the loader itself."""
    options = Options(count=16)
    make = loaders(2, options, num_workers=workers, persistent_workers=persistent)
    fleet = Fleet(1, make)
    done = fleet.steps(3)
    pair = Fleet(2, make, fleet.states())
    done += pair.steps()
    assert read(done) == Counter(range(16))
    for loader in pair.loaders:
        loader.sampler.set_epoch(2)
    pair.begin()
    assert pair.steps() == uninterrupted(2, loaders(2, options._replace(epoch=2)))


def test_workers_that_were_kept_and_are_gone() -> None:
    """The number that new workers draw is taken back, and what was dealt begins anew with it."""
    fleet = Fleet(2, loaders(2, num_workers=1, persistent_workers=True))
    fleet.steps()
    fleet.begin()
    done = fleet.steps(2)
    assert all(state["sources"]["data"]["running"]["reset"] for state in fleet.states())
    for make in (loaders(1), loaders(1, num_workers=1, persistent_workers=True)):
        again = Fleet(4, make, fleet.states())
        assert [feeds.batch for feeds in again.feeds] == [2] * 4
        list(chain.from_iterable(again.feeds[rank].batches(again.loaders[rank]) for rank in range(4)))
        again.begin()
        assert together(done + again.steps()) == together(uninterrupted(2, loaders(2)))


def test_an_interruption_at_every_step_of_what_was_dealt() -> None:
    """With as many ranks each continues its own part, batch for batch."""
    fleet = Fleet(2, loaders(2))
    fleet.steps(2)
    whole = Fleet(3, loaders(2), fleet.states()).steps()
    assert len(whole) == 3
    for steps in range(4):
        third = Fleet(3, loaders(2), fleet.states())
        third.steps(steps)
        states = [through_store(state) for state in third.states()]
        again = Fleet(3, loaders(2), states)
        assert again.steps() == whole[steps:]
        assert len(again.said) == (0 if steps else 3)


def test_with_as_many_ranks_it_is_the_position_of_the_same_rank() -> None:
    """Nothing is dealt, and nothing said."""
    fleet = Fleet(2, loaders(3))
    fleet.steps(2)
    states = fleet.states()
    again = Fleet(2, loaders(3), states)
    for rank, feeds in enumerate(again.feeds):
        alone = Feeds(quiet)
        alone.load_state_dict(states[rank], None)
        assert feeds.state_dict() == alone.state_dict() == states[rank]
    assert again.steps() == uninterrupted(2, loaders(3))[2:]
    assert again.said == []


def test_a_save_before_the_pass_is_continued_can_be_continued_by_any_number() -> None:
    """What was gathered of all ranks isn't lost with the ranks that are gone."""
    fleet = Fleet(4, loaders(1))
    fleet.steps(2)
    pair = Fleet(2, loaders(2), fleet.states())
    for size, batch_size in ((4, 1), (2, 2), (1, 4)):
        then = Fleet(size, loaders(batch_size), [through_store(state) for state in pair.states()])
        assert together(then.steps()) == together(uninterrupted(4, loaders(1))[2:])


def test_batches_that_no_step_used_come_again() -> None:
    """A window of accumulation that wasn't complete, on all ranks."""
    fleet = Fleet(2, loaders(2))
    fleet.steps(2)
    ahead = [[next(reading).tolist() for reading in fleet.readings] for _ in range(2)]
    again = Fleet(4, loaders(1), fleet.states())
    assert again.feeds[3].batch == 2
    assert together(again.steps(2)) == together(ahead)
    assert again.feeds[3].batch == 4


def test_the_last_batch_is_known_whatever_the_loader_has_in_all() -> None:
    """Eight ranks have three batches a pass, of which this one is the sixth."""
    fleet = Fleet(2, loaders(1))
    fleet.steps(5)
    many = Fleet(8, loaders(1), fleet.states())
    known = []
    while many.step():
        known.append(many.feeds[0].is_last())
    assert known == [False, True]


def in_batches(size: int) -> Make:
    def make(rank: int, ranks: int) -> DataLoader[int]:
        share = sampler(USUAL, rank, ranks)
        return DataLoader(share.dataset, batch_sampler=BatchSampler(share, size, drop_last=False))

    return make


@pytest.mark.parametrize(("one", "other"), [(in_batches(4), in_batches(2)), (loaders(None), loaders(None))])
def test_a_batch_sampler_around_it_and_no_batches_at_all(one: Make, other: Make) -> None:
    """The sampler is found."""
    fleet = Fleet(2, one)
    done = fleet.steps(2)
    done += Fleet(4, other, fleet.states()).steps()
    assert read(done) == Counter(range(SIZE))


def test_several_sources_each_by_its_name() -> None:
    """One is within a pass, another one is through with two."""
    feeds = [Feeds(quiet) for _ in range(2)]
    make, other = loaders(3), loaders(2, Options(count=8))
    seen: Counter[int] = Counter()
    for rank, each in enumerate(feeds):
        for _ in range(2):
            list(each.batches(other(rank, 2), "small"))
        reading = each.batches(make(rank, 2), "large")
        seen.update(next(reading).tolist())
        each.stepped()
    states = [through_store(each.state_dict()) for each in feeds]
    for rank in range(3):
        each = Feeds(quiet)
        each.load_state_dicts(states, rank, 3, None)
        assert [list(each.batches(other(rank, 3), "small")) for _ in range(2)] == [[], []]
        assert len(list(each.batches(other(rank, 3), "small"))) == 2
        seen.update(index for batch in each.batches(make(rank, 3), "large") for index in batch.tolist())
    assert seen == Counter(range(SIZE))


ALONE: dict[str, Callable[[], DataLoader[int]]] = {
    "in order": plain,
    "shuffled": lambda: plain(shuffle=True),
    "shuffled, workers": lambda: plain(shuffle=True, num_workers=2),
    "generator": lambda: plain(shuffle=True, generator=own()),
    "generator of the sampler": lambda: plain(sampler=RandomSampler(range(SIZE), generator=own())),
    "one by one": lambda: plain(shuffle=True, batch_size=None),
    "in lists": lambda: DataLoader(
        Lists(), batch_size=None, sampler=BatchSampler(RandomSampler(range(SIZE)), 4, drop_last=False)
    ),
}


class Lists(Numbers):
    """Takes several indices at once."""

    def __init__(self) -> None:
        super().__init__(SIZE)

    def __getitem__(self, index: Any) -> Any:
        return torch.tensor(index)


@pytest.mark.parametrize("name", ALONE)
def test_one_rank_without_a_distributed_sampler_is_continued_by_more(name: str) -> None:
    """The order is told again, whatever generator it was drawn from; also after an interruption of the one rank."""
    seeded()
    expected = uninterrupted(1, lambda rank, size: ALONE[name]())
    seeded()
    fleet = Fleet(1, lambda rank, size: ALONE[name]())
    fleet.steps(1)
    fleet = Fleet(1, lambda rank, size: ALONE[name](), fleet.states())
    fleet.steps(1)
    seeded(8)
    pair = Fleet(2, loaders(None if name == "one by one" else 2), [through_store(state) for state in fleet.states()])
    left, at_once = [index for (batch,) in expected[2:] for index in batch], 2 if name == "one by one" else 4
    assert together(pair.steps()) == [sorted(left[at : at + at_once]) for at in range(0, len(left), at_once)]


@pytest.mark.parametrize("shuffle", [False, True])
def test_one_rank_goes_on_with_a_plain_loader(shuffle: bool) -> None:
    """It reads all that is left of what four ranks began, and shuffles from the next pass on."""
    fleet = Fleet(4, loaders(1))
    fleet.steps(2)
    alone = Fleet(1, lambda rank, size: plain(shuffle=shuffle), [through_store(state) for state in fleet.states()])
    done = alone.steps(2)
    assert together(done) == together(uninterrupted(4, loaders(1))[2:4])
    again = Fleet(1, lambda rank, size: plain(shuffle=shuffle), alone.states())
    assert together(again.steps()) == together(uninterrupted(4, loaders(1))[4:])
    again.begin()
    assert read(again.steps()) == Counter(range(SIZE))
    back = Fleet(4, loaders(1), alone.states())
    assert together(back.steps()) == together(uninterrupted(4, loaders(1))[4:])


def test_the_pass_keeps_the_order_it_was_begun_in() -> None:
    """Another seed holds from the next pass on."""
    fleet = Fleet(2, loaders(2))
    fleet.steps(3)
    other = Options(seed=77, epoch=1)
    third = Fleet(3, loaders(2, other), fleet.states())
    assert read(third.steps()) == read(uninterrupted(2, loaders(2))[3:])
    third.begin()
    assert third.steps() == uninterrupted(3, loaders(2, other))


def test_ranks_that_read_the_same_samples() -> None:
    """What counts is how many loaders differ, not how many ranks there are."""
    fleet = Fleet(4, shared(2, 2))
    done = fleet.steps(2)
    assert done[0][0] == done[0][1] != done[0][2]
    expected = uninterrupted(2, loaders(2))[2:]

    def once(steps: list[list[Batch]], each: int) -> list[Batch]:
        return together([step[::each] for step in steps])

    states = fleet.states()
    assert once(Fleet(4, shared(2, 2), states).steps(), 2) == together(expected)
    assert once(Fleet(4, loaders(1), states).steps(), 1) == together(expected)
    assert once(Fleet(2, loaders(2), states).steps(), 1) == together(expected)
    assert once(Fleet(2, shared(4, 2), states).steps(), 2) == together(expected)
    assert once(Fleet(6, shared(2, 3), states).steps(), 3) == together(expected)


def test_ranks_that_were_numbered_anew_find_their_own() -> None:
    """As many ranks, of which others read the same samples."""
    fleet = Fleet(4, shared(2, 2))
    fleet.steps(2)
    again = Fleet(4, lambda rank, size: loaders(2)(rank % 2, 2), fleet.states())
    assert together([step[:2] for step in again.steps()]) == together(uninterrupted(2, loaders(2))[2:])


def test_ranks_that_were_numbered_anew_find_their_own_of_what_was_dealt() -> None:
    """The same, where others began the pass."""
    one = Fleet(1, loaders(4))
    one.steps(1)
    fleet = Fleet(4, shared(2, 2), one.states())
    fleet.steps(1)
    again = Fleet(4, lambda rank, size: loaders(2)(rank % 2, 2), fleet.states())
    assert together([step[:2] for step in again.steps()]) == together(uninterrupted(1, loaders(4))[2:])


def test_the_position_of_one_rank_stands_for_all_where_only_that_was_saved() -> None:
    """The others trained with it."""
    fleet = Fleet(4, loaders(1))
    fleet.steps(3)
    for size, batch_size in ((4, 1), (2, 2)):
        again = Fleet(size, loaders(batch_size), fleet.states()[:1])
        assert together(again.steps()) == together(uninterrupted(4, loaders(1))[3:])


def test_ranks_that_used_unlike_numbers_of_samples_lose_none() -> None:
    """One ran out of data and another one was ahead."""
    feeds, seen = [Feeds(quiet) for _ in range(3)], Counter[int]()
    for rank, each in enumerate(feeds):
        reading = each.batches(loaders(1)(rank, 3))
        for _ in range(1 + 2 * rank):
            seen.update(next(reading).tolist())
            each.stepped()
    again = Fleet(5, loaders(1), [each.state_dict() for each in feeds])
    assert again.feeds[4].batch == 5
    assert read(again.steps()) == Counter(range(SIZE)) - seen


def test_the_random_state_is_the_one_to_be_set_and_new_ranks_keep_generators_of_their_own() -> None:
    """Ranks that are new don't draw what others draw."""

    def make(rank: int, size: int) -> DataLoader[int]:
        return loaders(2, generator=own(rank))(rank, size)

    fleet = Fleet(2, make)
    fleet.steps(2)
    states = fleet.states()
    saved = [loader.generator.get_state() for loader in fleet.loaders]
    seeded(11)
    then, expected = RNG().state_dict(), drawn()
    RNG().load_state_dict(then)
    third = Fleet(3, make, states, then)
    for reading in third.readings:
        next(reading)
        assert drawn() == expected
    starts = [state["sources"]["data"]["running"]["start"] for state in third.states()]
    assert torch.equal(third.loaders[0].generator.get_state(), saved[0])
    assert torch.equal(third.loaders[1].generator.get_state(), saved[1])
    assert not torch.equal(third.loaders[2].generator.get_state(), saved[0])
    assert starts[0]["own"].keys() == starts[1]["own"].keys() == {"generator"}
    assert starts[2]["own"] == {}
    assert torch.equal(
        starts[0]["random"]["torch"], states[0]["sources"]["data"]["running"]["start"]["random"]["torch"]
    )
    assert torch.equal(starts[2]["random"]["torch"], then["torch"])


def test_a_generator_that_all_ranks_had_in_common_is_that_of_new_ones() -> None:
    """At the end of an epoch, for the next one."""

    def make(rank: int, size: int) -> DataLoader[int]:
        return plain(shuffle=True, generator=own())

    fleet = Fleet(2, make)
    fleet.steps()
    for feeds in fleet.feeds:
        feeds.end_epoch()
    states = fleet.states()
    fleet.begin()
    expected = fleet.steps()
    assert Fleet(3, make, states).steps() == [[*step, step[0]] for step in expected]


def test_a_data_set_with_a_state_keeps_it_where_its_rank_was_there() -> None:
    """A new rank's augmentation is that of its own program."""

    def make(rank: int, size: int) -> DataLoader[int]:
        share, data = sampler(Options(count=8), rank, size), Augmented()
        data.noise.manual_seed(rank)
        return DataLoader(data, batch_size=1, sampler=share)

    fleet = Fleet(2, make)
    fleet.steps(1)
    noise = [loader.dataset.noise.get_state() for loader in fleet.loaders]
    again = Fleet(3, make, fleet.states())
    last = again.loaders[2].dataset.noise.get_state()
    for rank, expected in enumerate([*noise, last]):
        generator = torch.Generator()
        generator.set_state(expected)
        assert float(next(again.readings[rank])) % 1 == pytest.approx(
            float(torch.rand((), generator=generator)), abs=1e-5
        )
