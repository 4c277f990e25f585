"""Sources without indices: with a state of their own, or with nothing, which are read over."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ckptstore.errors import StateError
from ckptstore.trainer.data import Feeds
from tests.trainer.runs import Numbers, Program, Run, run_plain, run_whole
from tests.trainer.test_data import check_everywhere, epochs_over
from tests.trainer.test_data_passes import malformed, quiet, resumed, taken

SIZE = 8


class Counting(IterableDataset[int]):
    """Counts up, from where its state says; counts how often it was read."""

    def __init__(self) -> None:
        self.position = self.start = 0
        self.read = 0

    def __iter__(self) -> Iterator[int]:
        self.position, self.start = self.start, 0
        while self.position < SIZE:
            self.position += 1
            self.read += 1
            yield self.position

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.start = state["position"]


class Stream(IterableDataset[int]):
    """Draws what it gives, and has no state."""

    def __iter__(self) -> Iterator[int]:
        for index in range(SIZE):
            yield index * 100 + int(torch.randint(100, ()))


class Augmented(Dataset[float]):
    """Adds noise of a generator that is its own."""

    def __init__(self) -> None:
        self.noise = torch.Generator().manual_seed(1)

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> float:
        return index + float(torch.rand((), generator=self.noise))

    def state_dict(self) -> dict[str, Any]:
        return {"noise": self.noise.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.noise.set_state(state["noise"])


def events_over(make: Callable[[], Any], epochs: int = 2) -> Program:
    """The usual loop over whatever gives batches."""

    def program(run: Run) -> None:
        source = make()
        while run.epoch < epochs:
            for batch in run.feeds.batches(source):
                run.step(run.epoch, str(batch))
            run.feeds.end_epoch()
            run.epoch += 1

    return program


KINDS: dict[str, Callable[[], Any]] = {
    "own state": Counting,
    "loader over a stream with a state": lambda: DataLoader(Counting(), batch_size=3),
    "loader over a stream without": lambda: DataLoader(Stream(), batch_size=3),
    "loader over a data set with a state": lambda: DataLoader(Augmented(), batch_size=3, shuffle=True),
    "list": lambda: [[1, 2], [3, 4], [5]],
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_continues_after_every_step(name: str) -> None:
    """Two epochs, interrupted after each step."""
    check_everywhere(events_over(KINDS[name]))


def test_a_state_of_its_own_is_used_and_nothing_read_again() -> None:
    """It continues where its state says."""
    feeds = Feeds(quiet)
    taken(feeds, Counting(), 5)
    source = Counting()
    assert list(resumed(feeds.state_dict()).batches(source)) == [6, 7, 8]
    assert source.read == 3


def test_a_state_of_its_own_within_a_window_is_read_over_from_the_last_one_known() -> None:
    """Two batches were handed out that no completed step used."""
    feeds = Feeds(quiet)
    _, reading = taken(feeds, Counting(), 2)
    feeds.state_dict()
    next(reading)
    feeds.stepped()
    next(reading), next(reading)
    state = feeds.state_dict()["sources"]["data"]["running"]
    assert (state["batches"], state["at"]) == (3, 2)
    source = Counting()
    assert list(resumed(feeds.state_dict()).batches(source)) == [4, 5, 6, 7, 8]
    assert source.read == 6


def test_a_generators_result_is_read_over() -> None:
    """A list, or what a generator function gave."""
    feeds = Feeds(quiet)
    taken(feeds, iter(range(6)), 4)
    assert list(resumed(feeds.state_dict()).batches(iter(range(6)))) == [4, 5]


@pytest.mark.parametrize(
    ("make", "fact"),
    [
        (lambda: [1, 2], "has no state_dict and no indices; after a resume what was used is read again and dropped"),
        (lambda: DataLoader(Stream()), "has no state_dict and no indices; after a resume what was used is read again"),
        (lambda: DataLoader(Numbers(3), num_workers=1), "random augmentation there isn't continued within an epoch"),
        (lambda: DataLoader(Numbers(3), num_workers=1, in_order=False), "has in_order=False"),
        (lambda: DataLoader(Counting(), num_workers=1), "has a data set with a state, but in workers"),
    ],
)
def test_what_can_not_be_exact_is_said_once(make: Callable[[], Any], fact: str) -> None:
    """At the first pass."""
    said: list[str] = []
    feeds, source = Feeds(said.append), make()
    for _ in range(2):
        feeds.batches(source).__next__()
    assert len([sentence for sentence in said if fact in sentence]) == 1
    assert all(sentence.startswith("the source 'data' ") for sentence in said)


@pytest.mark.parametrize("make", [Counting, lambda: DataLoader(Numbers(3)), lambda: DataLoader(Counting())])
def test_what_is_exact_says_nothing(make: Callable[[], Any]) -> None:
    """There is nothing to be known."""
    said: list[str] = []
    list(Feeds(said.append).batches(make()))
    assert said == []


def test_a_state_that_is_not_taken_names_the_source() -> None:
    """Whatever it raises."""
    feeds = Feeds(quiet)
    taken(feeds, Counting(), 2)
    state = malformed(feeds.state_dict(), "sources/data/running/state", {"place": 1})
    with pytest.raises(StateError, match="the source 'data' doesn't take the state that was saved: KeyError"):
        next(resumed(state).batches(Counting()))


@pytest.mark.filterwarnings("ignore:'set_vital'")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("own", [False, True], ids=["global", "own generator"])
def test_a_stateful_data_loader_continues(workers: int, own: bool) -> None:
    """torchdata's, by its own state."""
    loaders = pytest.importorskip("torchdata.stateful_dataloader")

    def make() -> Any:
        generator = torch.Generator().manual_seed(4) if own else None
        options = {"batch_size": 3, "shuffle": True, "num_workers": workers, "generator": generator}
        return loaders.StatefulDataLoader(Numbers(SIZE), **options)

    check_everywhere(epochs_over(make, epochs=2), every=1 if workers == 0 else 2)


def test_a_stream_of_hugging_face_continues() -> None:
    """By itself and in a loader, by its own state; the next pass begins at the start."""
    datasets = pytest.importorskip("datasets")

    def stream() -> Any:
        return datasets.Dataset.from_dict({"x": list(range(SIZE))}).to_iterable_dataset(num_shards=2)

    for make in (stream, lambda: DataLoader(stream(), batch_size=3)):
        expected = run_plain(events_over(make))
        assert run_whole(events_over(make)) == expected
        check_everywhere(events_over(make))
