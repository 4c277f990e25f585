"""Passes that another number of ranks can't continue: each is refused by what it is, and never read wrongly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, RandomSampler

from ckptstore.errors import FormatError, IntegrityError, StateError
from ckptstore.trainer.data import Feeds
from tests.trainer.fleets import (
    SIZE,
    USUAL,
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
    two_steps,
    uninterrupted,
)
from tests.trainer.runs import Numbers, seeded
from tests.trainer.test_data_kinds import Counting, Stream
from tests.trainer.test_data_passes import malformed, quiet

OWN: dict[str, Make] = {
    "in order": lambda rank, size: plain(),
    "shuffled": lambda rank, size: plain(shuffle=True, generator=own(rank)),
    "stream": lambda rank, size: DataLoader(Stream(), batch_size=2),
    "with a state": lambda rank, size: Counting(),
    "list": lambda rank, size: list(range(rank, SIZE, size)),
    "batches of its own": lambda rank, size: DataLoader(Numbers(SIZE), batch_sampler=[[1, 2], [3], [5, 6]]),
    "replacing": lambda rank, size: plain(sampler=RandomSampler(range(SIZE), replacement=True)),
}


@pytest.mark.parametrize("name", OWN)
def test_what_ranks_read_by_their_own_means_can_not_be_dealt_anew(name: str) -> None:
    """It is refused at once, by a message with the ways out; with as many ranks it goes on."""
    seeded()
    fleet = Fleet(2, OWN[name])
    fleet.steps(2) if not isinstance(fleet.loaders[0], list | Counting) else [fleet.step() for _ in range(2)]
    states = fleet.states()
    match = (
        r"the source 'data' can't be continued within its pass: 2 ranks read it when it was saved, 3 ranks would go on "
        r"now, and what each of them reads is its own affair: only where loaders have a DistributedSampler is it dealt "
        r"anew. Resume with 2 ranks, from the end of an epoch, or without the position in the data "
        r"\(restore=Parts\(data=False\)\)"
    )
    for rank, feeds in enumerate([Feeds(quiet) for _ in range(3)]):
        with pytest.raises(StateError, match=match) as caught:
            feeds.load_state_dicts(states, rank, 3, None)
        assert caught.value.path == "data"
        assert feeds.state_dict() == Feeds(quiet).state_dict()
    assert len(Fleet(2, OWN[name], states).steps()) >= 1


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("steps", ["none of a pass", "a whole pass", "an epoch"])
def test_without_a_running_pass_any_number_of_ranks_goes_on(name: str, steps: str) -> None:
    """Whatever the source."""
    seeded()
    fleet = Fleet(2, OWN[name])
    if steps == "none of a pass":
        assert all(next(reading) is not None for reading in fleet.readings)
    else:
        fleet.steps()
    if steps == "an epoch":
        for feeds in fleet.feeds:
            feeds.end_epoch()
    for size in (1, 3):
        again = Fleet(size, OWN[name], fleet.states())
        if steps == "a whole pass":
            assert again.steps() == []
            again.begin()
        assert len(again.steps()) >= 3


def refused(states: list[State], size: int, make: Make, why: str) -> None:
    """All of the ranks find it when the pass is continued."""
    for reading in Fleet(size, make, states).readings:
        with pytest.raises(StateError, match=f"can't be continued within its pass: .*{why}"):
            next(reading)


def test_loaders_that_can_not_be_given_samples_are_refused() -> None:
    """Each rank would read all of them, or what else it wants; and the data set must be the same."""
    refused(two_steps(), 3, lambda rank, size: plain(), "and its loader has no DistributedSampler")
    own_batches = "the batches of its loader aren't those of a sampler that can be given samples"
    for size in (1, 3):
        refused(two_steps(), size, OWN["batches of its own"], own_batches)
    refused(two_steps(), 3, loaders(2, Options(count=23)), "its data set had 24 samples and has 23")
    with pytest.raises(StateError, match="it was read by its indices when it was saved, which a list hasn't"):
        Fleet(3, OWN["list"], two_steps()).step()


def test_a_part_that_was_dealt_is_not_given_to_batches_of_another_kind() -> None:
    """Also where there are as many ranks."""
    third = Fleet(3, loaders(2), two_steps())
    third.steps(1)
    refused(third.states(), 3, OWN["batches of its own"], "the batches of its loader aren't those of a sampler")


def test_ranks_that_do_not_fit_together_are_refused() -> None:
    """They were in different passes, had different orders, or not all of them are there."""

    def load(states: list[State], why: str) -> None:
        with pytest.raises(StateError, match=f"3 ranks would go on now, and {why}"):
            Feeds(quiet).load_state_dicts(states, 0, 3, None)

    one = two_steps()[0]
    ended = Feeds(quiet)
    list(ended.batches(loaders(2)(1, 2)))
    ended.stepped()
    load([one, ended.state_dict()], "they stood in different passes over it")
    load([one, two_steps(make=loaders(2, Options(seed=4)))[1]], "the ranks that saved didn't share one order")
    load([one, one], "the ranks that saved weren't at one place in it")
    same = Fleet(4, shared(2, 2))
    same.steps(2)
    next(same.readings[3])
    same.feeds[3].stepped()
    load(same.states(), "the ranks that saved weren't at one place in it")
    load(two_steps(4)[:2], "the ranks that saved weren't at one place in it")


def test_a_source_that_only_some_read_is_refused_unless_it_is_rank_0() -> None:
    """What only rank 0 reads goes on there."""
    pair = [Feeds(quiet) for _ in range(2)]
    for rank, feeds in enumerate(pair):
        next(feeds.batches(plain(), f"data{rank}"))
        feeds.stepped()
    first, second = (feeds.state_dict() for feeds in pair)
    with pytest.raises(StateError, match=r"the source 'data0' .* only 1 of those that saved read it"):
        Feeds(quiet).load_state_dicts([second, first], 0, 3, None)
    nothing = Feeds(quiet).state_dict()
    for rank in range(3):
        feeds = Feeds(quiet)
        feeds.load_state_dicts([first, nothing], rank, 3, None)
        assert len(list(feeds.batches(plain(), "data0"))) == (6 if rank else 5)


def test_a_loader_that_takes_other_samples_than_it_is_given_is_found() -> None:
    """Its loop asks for nothing, or gives more than it asked for."""

    class Deaf(DataLoader[int]):
        def __iter__(self) -> Any:
            return iter([torch.tensor([1]), torch.tensor([2])])

    class Echo(DataLoader[int]):
        def __iter__(self) -> Any:
            for batch in super().__iter__():
                yield batch
                yield batch

    for kind, count in ((Deaf, 0), (Echo, 1)):

        def make(rank: int, size: int, kind: type[DataLoader[int]] = kind) -> DataLoader[int]:
            share = sampler(USUAL, rank, size)
            return kind(share.dataset, batch_size=2, sampler=share)

        reading = Fleet(3, make, two_steps()).readings[0]
        for _ in range(count):
            next(reading)
        with pytest.raises(StateError, match="'data' can't be continued by another number of ranks: its loader takes"):
            next(reading)


@pytest.mark.parametrize("rank", [0, 1])
def test_another_order_than_the_saved_one_is_told_by_any_ranks_next_samples(rank: int) -> None:
    """A warning, and an error after a check."""
    states = two_steps()
    states[rank]["sources"]["data"]["running"]["next"] = "0" * 64
    with pytest.warns(UserWarning, match="the source 'data' can't be continued exactly: after 2 batches"):
        Fleet(3, loaders(2), states).step()
    for feeds, loader in zip(Fleet(3, loaders(2), states).feeds, map(loaders(2), range(3), [3] * 3), strict=True):
        feeds.check(strict=True)
        with pytest.raises(IntegrityError, match="the source 'data' can't be continued exactly"):
            next(feeds.batches(loader))


@pytest.mark.parametrize("batch_size", [3, 5])
def test_next_samples_of_a_batch_that_was_used_in_part(batch_size: int) -> None:
    """After a change of the batch size, with as many ranks as before, the rest of a batch comes first."""
    fleet = Fleet(2, loaders(batch_size), two_steps())
    with pytest.warns(UserWarning, match="samples a batch"):
        assert [len(next(reading)) for reading in fleet.readings] == [-4 % batch_size] * 2
    states = fleet.states()
    assert all(state["sources"]["data"]["running"]["next"] is not None for state in states)
    again = Fleet(1, loaders(2), states)
    again.feeds[0].check(strict=True)
    assert read(again.steps()) == read(uninterrupted(2, loaders(2))[2:])


def test_without_a_noted_order_as_many_ranks_go_on() -> None:
    """So it is in older checkpoints."""
    states = two_steps()
    for state in states:
        del state["sources"]["data"]["running"]["order"]
    assert Fleet(2, loaders(2), states).steps() == uninterrupted(2, loaders(2))[2:]
    with pytest.raises(StateError, match="2 ranks read it when it was saved"):
        Fleet(3, loaders(2), states)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("", [1]),
        ("sampler", "magic"),
        ("length", -1),
        ("replicas", 0),
        ("replicas", 1 << 40),
        ("seed", 0.5),
        ("seed", 1 << 64),
        ("shuffle", 1),
        ("drop_last", None),
        ("splits", 5),
        ("splits", [[]]),
        ("splits", [[1, -1]]),
        ("splits", [2]),
        ("share", 3),
        ("share", None),
        ("share/replica", 2),
        ("share/replicas", 0),
        ("share/drop", "no"),
    ],
)
def test_a_malformed_order_names_its_source(path: str, value: Any) -> None:
    """At loading, by any number of ranks."""
    states = two_steps()
    malformed(states[1], f"sources/data/running/order/{path}".rstrip("/"), value)
    for size in (2, 3):
        with pytest.raises(FormatError, match="the position in the source 'data' is malformed"):
            Fleet(size, loaders(2), states)


def test_a_malformed_generator_names_its_source() -> None:
    """When the pass is continued."""
    states = two_steps(1, lambda rank, size: plain(shuffle=True))
    malformed(states[0], "sources/data/running/order/generator", torch.zeros(3))
    with pytest.raises(StateError, match="data/order/generator"):
        Fleet(3, loaders(2), states).step()


def test_ranks_that_get_distributed_samplers_in_a_pass_of_which_nothing_was_used() -> None:
    """It may as well begin anew; where something was used each of them had read all by itself."""
    fleet = Fleet(2, lambda rank, size: plain())
    assert all(len(next(reading)) == 4 for reading in fleet.readings)
    assert Fleet(2, loaders(4), fleet.states()).steps() == uninterrupted(2, loaders(4))
    refused(two_steps(2, lambda rank, size: plain()), 2, loaders(4), "what each of them reads is its own affair")
