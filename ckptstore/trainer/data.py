"""Where a run stands in its data: which passes over which source are over, and what the running ones have used."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar
from weakref import WeakKeyDictionary, ref

from torch.utils.data import DataLoader

from ckptstore.errors import StateError
from ckptstore.trainer import resplit, starts
from ckptstore.trainer.indices import Twin, twin
from ckptstore.trainer.positions import Position, parse_all
from ckptstore.trainer.readings import (
    IndexReading,
    Reading,
    StatefulReading,
    dataset_state,
    is_map_style,
    is_stateful,
    restore_dataset,
)

T = TypeVar("T")


def _no_source() -> None:
    return None


class _Loaded:
    """A pass that was running when it was saved and isn't continued yet."""

    def __init__(self, position: Position, fields: dict[str, Any]) -> None:
        self.position, self.fields = position, fields

    def saved(self, batches: int, samples: int) -> dict[str, Any]:
        return self.fields


# Completed passes, the running one, and the batches and samples of it. A tuple, so that taking it over is one step.
Mark: TypeAlias = "tuple[int, Reading | _Loaded | None, int, int]"
_FRESH: Mark = (0, None, 0, 0)


class _Feed:
    """What is known of one name.

    Attributes:
        handed: the position after all batches that were handed out.
        used: the position after those that completed steps used.
        owed: calls that are to yield nothing, since their passes were completed before the resume.
        reading: the latest pass, and whether its consumer may still ask for batches.
        rest: what a pass that begins after a resume needs.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.handed: Mark = _FRESH
        self.used: Mark = _FRESH
        self.owed = 0
        self.reading: Reading | None = None
        self.live = False
        self.rest: dict[str, Any] | None = None
        self.source: Callable[[], Any] = _no_source
        self.first: str | None = None
        self.again = False

    def meet(self, source: Any) -> None:
        """Remember who is read, in which state its generators were at first, and whether it is the same again."""
        known = self.source()
        if known is not None:
            self.again = known is source
        if known is not source:
            self.first = starts.digest_of(starts.own_states(source))
            try:
                self.source = ref(source)
            except TypeError:
                self.source = _no_source

    def move(self, mark: Mark) -> None:
        """To a position with no further batch handed out; it holds for what was used where that was all."""
        if self.used is self.handed:
            self.used = mark
        self.handed = mark


class Feeds:
    """The positions of all sources that a run reads.

    Args:
        say: takes one sentence for people, once for each fact.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._said: set[str] = set()
        self._feeds: dict[str, _Feed] = {}
        self._last: _Feed | None = None
        self._twins: WeakKeyDictionary[DataLoader[Any], Twin] = WeakKeyDictionary()
        self._then: Mapping[str, Any] | None = None
        self._strict = False
        self._ranks = resplit.Ranks(0, 1, 1)

    def batches(
        self, source: Iterable[T], name: str = "data", *, between: Callable[[bool], None] = lambda last: None
    ) -> Iterator[T]:
        """The batches of one pass over ``source``, from the first one on that no completed step used.

        The source's own iterator is built when the first batch is asked for.

        Args:
            source: a loader, or anything else that gives batches.
            name: tells sources apart; the same name after a resume continues the same position.
            between: called before each batch is fetched, and once more before the end is found; told whether that is
                known to come.

        Raises:
            StateError: ``source`` can't be iterated. While iterating: the saved position doesn't fit it.
            FormatError: while iterating: the saved position is malformed.
            IntegrityError: while iterating: it can't be continued exactly, after ``check(strict=True)``.
        """
        if not hasattr(source, "__iter__") and not hasattr(source, "__getitem__"):
            raise StateError(f"the source {name!r} is a {type(source).__name__}, which can't be iterated", path=name)
        return self._read(source, name, between)

    def _read(self, source: Any, name: str, between: Callable[[bool], None]) -> Iterator[Any]:
        feed = self._feeds.setdefault(name, _Feed(name))
        if feed.owed:
            feed.owed -= 1
            self._set_then()
            return
        nested = any(other.live for other in self._feeds.values() if other is not feed)
        reading = self._begin(feed, source, nested)
        try:
            while True:
                between(reading.is_over())
                item = reading.fetch(feed.used is feed.handed)
                if not item:
                    break
                if feed.reading is reading:
                    feed.handed = (feed.handed[0], reading, reading.batches, reading.samples)
                    self._last, self._then = feed, None
                yield item.pop()
            if feed.handed[1] is reading:
                feed.move((feed.handed[0] + (not nested), None, 0, 0))
        finally:
            if feed.reading is reading:
                feed.live = False
            reading.close()

    def stepped(self) -> None:
        """All batches handed out so far were used by completed steps."""
        for feed in self._feeds.values():
            feed.used = feed.handed

    @property
    def names(self) -> Collection[str]:
        """Those of all sources that were read, or that a checkpoint knew."""
        return self._feeds.keys()

    @property
    def batch(self) -> int:
        """Batches used in the running pass of the source that was read last."""
        return 0 if self._last is None else self._last.used[2]

    def is_last(self) -> bool:
        """Whether the batch that was handed out last is known to be the last of its pass."""
        reading = None if self._last is None else self._last.reading
        return reading is not None and reading.is_over()

    def end_epoch(self) -> None:
        """The epoch is over: all passes start anew."""
        for feed in self._feeds.values():
            feed.handed = feed.used = _FRESH
            feed.owed, feed.live = 0, False

    def check(self, *, strict: bool) -> None:
        """Whether a pass that can't be continued exactly is an error from now on, instead of a warning."""
        self._strict = strict

    def state_dict(self) -> dict[str, Any]:
        """The position as of the last ``stepped()``, in values that ``Store.save`` can store."""
        return {
            "last": None if self._last is None else self._last.name,
            "sources": {name: self._saved(feed) for name, feed in self._feeds.items()},
        }

    def _saved(self, feed: _Feed) -> dict[str, Any]:
        passes, reading, batches, samples = feed.used
        if isinstance(reading, Reading) and reading.nested and not batches:
            # It began after the batch of another source that is used by now, and won't begin again after a resume.
            reading = None
        running = None if reading is None else reading.saved(batches, samples)
        return {"passes": passes, "running": running, "rest": self._rest(feed)}

    def _rest(self, feed: _Feed) -> dict[str, Any]:
        source = feed.source()
        if feed.rest is not None:
            return feed.rest
        return {
            "own": starts.own_states(source),
            "dataset": dataset_state(source),
            "first": feed.first,
            "again": feed.again,
            "kept": is_map_style(source) and source in self._twins,
        }

    def load_state_dict(self, state: dict[str, Any], then: Mapping[str, Any] | None) -> None:
        """Let the next calls of ``batches`` continue where ``state`` was taken.

        Args:
            state: what ``state_dict`` gave.
            then: the random state to be set when the iterators are built; without, it stays what it was before.

        Raises:
            FormatError: it is malformed; the message names the source. Nothing has changed then.
        """
        self.load_state_dicts([state], 0, 1, then)

    def load_state_dicts(
        self, states: Sequence[dict[str, Any]], rank: int, size: int, then: Mapping[str, Any] | None
    ) -> None:
        """Let the next calls of ``batches`` continue as one of any number of ranks.

        With as many ranks as saved each continues its own position. With more or fewer of them a pass that was running
        is dealt anew, once its loader is known: what all had left of it, one sample to each rank in turn, so that as
        many samples at a time make the same batches of all ranks together. That needs loaders with a
        ``DistributedSampler``; one rank may also have read, or read now, in order or with ``shuffle=True``. Later
        passes are those of the loaders themselves.

        Args:
            states: what ``state_dict`` gave on each of the ranks that saved.
            rank, size: which one of how many this is now.
            then: as in ``load_state_dict``.

        Raises:
            FormatError: one is malformed; the message names the source. Nothing has changed then.
            StateError: there is another number of ranks, and a source was within a pass that can't be dealt anew;
                ``batches`` raises it where that depends on the loader. Nothing has changed then.
        """
        last, positions = resplit.gathered([parse_all(state) for state in states], rank, size)
        self._ranks = resplit.Ranks(rank, size, len(states))
        for feed in self._feeds.values():
            feed.reading = None  # who still reads there doesn't count any more
        self._feeds = {name: _loaded(name, position) for name, position in positions.items()}
        self._last = None if last is None else self._feeds.get(last)
        self._twins.clear()
        self._then = then

    def _begin(self, feed: _Feed, source: Any, nested: bool) -> Reading:
        passes, before, _, _ = feed.handed
        if feed.reading is not None:
            feed.reading.supersede()
        if isinstance(before, Reading):
            passes += not before.nested  # its consumer left it early
        feed.meet(source)
        self._tell(source, feed.name)
        reading = self._reading(feed, source, before)
        reading.nested = nested
        if isinstance(before, _Loaded):
            self._continue(reading, before.position)
        else:
            _restore_rest(feed, source)
            reading.open()
        feed.rest = None
        feed.reading, feed.live, self._last = reading, True, feed
        feed.move((passes, reading, reading.batches, reading.samples))
        return reading

    def _reading(self, feed: _Feed, source: Any, before: object) -> Reading:
        saved = before.fields["kind"] if isinstance(before, _Loaded) else None
        reading: Reading
        if saved == Reading.kind:
            return Reading(source, feed.name)
        if is_stateful(source):
            reading = StatefulReading(source, feed.name, source)
        elif is_map_style(source):
            copied = twin(source, self._twins.get(source))
            if source.persistent_workers:
                self._twins[source] = copied
            reading = IndexReading(source, feed.name, copied, feed.rest is not None and feed.rest["kept"])
        elif _has_stateful_stream(source) and source.num_workers == 0:
            reading = StatefulReading(source, feed.name, source.dataset)
        else:
            reading = Reading(source, feed.name)
        if saved not in (None, reading.kind):
            raise StateError(
                f"the source {feed.name!r} can't be continued: it was read by its {saved} when it was saved, which "
                f"a {type(source).__name__} hasn't. Give the kind of source that was saved, or resume without the "
                "position in the data",
                path=feed.name,
            )
        return reading

    def _continue(self, reading: Reading, position: Position) -> None:
        state = starts.process_state() if self._then is None else self._then
        name, say = reading.name, self._say
        fields = resplit.fitted(position, reading.source, name, self._ranks, say, strict=self._strict)
        reading.reopen(fields, self._strict)
        starts.set_process_state(state, "rng")

    def _set_then(self) -> None:
        if self._then is not None:
            starts.set_process_state(self._then, "rng")

    def _tell(self, source: Any, name: str) -> None:
        for fact in _facts(source):
            sentence = f"the source {name!r} {fact}"
            if sentence not in self._said:
                self._said.add(sentence)
                self._say(sentence)


def _loaded(name: str, position: Position) -> _Feed:
    feed = _Feed(name)
    running = position.running
    if running is None:
        feed.handed = (position.passes, None, 0, 0)
    else:
        feed.handed = (position.passes, _Loaded(position, running), running["batches"], running["samples"])
    feed.used, feed.owed, feed.rest = feed.handed, position.passes, position.rest
    feed.again = position.rest["again"]
    return feed


def _restore_rest(feed: _Feed, source: Any) -> None:
    """What the source owns stands where it was, unless it seems to be made anew for each pass."""
    rest = feed.rest
    if rest is None or not (rest["again"] or rest["first"] == feed.first):
        return
    starts.restore_own(rest["own"], source, feed.name)
    if rest["dataset"] is not None:
        restore_dataset(rest["dataset"], source, feed.name)


def _has_stateful_stream(source: Any) -> bool:
    return isinstance(source, DataLoader) and not is_map_style(source) and is_stateful(source.dataset)


def _facts(source: Any) -> Iterator[str]:
    """What can't be exact after a resume with this source."""
    if is_stateful(source):
        return
    workers = source.num_workers if isinstance(source, DataLoader) else 0
    if is_map_style(source):
        if workers:
            yield "loads in workers: random augmentation there isn't continued within an epoch"
        if workers and not source.in_order:
            yield "has in_order=False: which batches were used isn't known, so that a resume can't be exact"
    elif not _has_stateful_stream(source):
        yield "has no state_dict and no indices; after a resume what was used is read again and dropped"
    elif workers:
        yield (
            "has a data set with a state, but in workers, where it can't be asked for: after a resume what was used is "
            "read again and dropped, which may not be exact"
        )
