"""One pass over a source, by what the source is: indices that can be skipped, a state of its own, or neither."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

from torch.utils.data import DataLoader, IterableDataset

from ckptstore.errors import IntegrityError, StateError
from ckptstore.trainer import orders, starts
from ckptstore.trainer.indices import Twin, digest

Fields = dict[str, Any]


class Reading:
    """One pass: what was handed out, and how it is continued in another process. This kind is read over.

    Attributes:
        batches, samples: handed out so far.
        start: the random state at the pass's start.
        nested: it began within a pass over another source.
    """

    kind: ClassVar[str] = "plain"

    def __init__(self, source: Any, name: str) -> None:
        self.source = source
        self.name = name
        self.batches = 0
        self.samples = 0
        self.start: Fields = {}
        self.nested = False
        self._iterator: Iterator[Any] = iter(())

    def open(self) -> None:
        """Start a new pass, from the random state as it is."""
        self.start = starts.capture(self.source)
        self._iterator = iter(self.source)

    def reopen(self, saved: Fields, strict: bool) -> None:
        """Continue a pass at the first batch that wasn't used, and leave any random state behind.

        Raises:
            FormatError, StateError: what was saved is malformed or doesn't fit.
            IntegrityError: it can't be continued exactly, and ``strict``.
        """
        self.batches, self.samples, self.start = saved["batches"], saved["samples"], saved["start"]
        starts.restore(self.start, self.source, self.name)
        self._continue(saved, strict)

    def _continue(self, saved: Fields, strict: bool) -> None:
        self._iterator = iter(self.source)
        self._read_over(saved["batches"])

    def _read_over(self, count: int) -> None:
        for _ in range(count):
            if next(self._iterator, self) is self:
                return

    def fetch(self, clean: bool) -> list[Any]:
        """The next batch, in a list that the caller empties so that nothing here holds it; empty at the end.

        Args:
            clean: all batches handed out so far were used.
        """
        try:
            batch = [next(self._iterator)]
        except StopIteration:
            return []
        self.batches += 1
        return batch

    def is_over(self) -> bool:
        """Whether all batches were handed out, as far as that is known before another one is asked for."""
        try:
            return self.batches >= len(self.source)
        except (TypeError, NotImplementedError):
            return False

    def close(self) -> None:
        """No batch will be asked for any more."""
        self._iterator = iter(())

    def supersede(self) -> None:
        """Another pass over the source begins."""

    def saved(self, batches: int, samples: int) -> Fields:
        """The position after so many used batches and samples; ``reopen`` continues there."""
        return {
            "kind": self.kind,
            "batches": batches,
            "samples": samples,
            "start": self.start,
            "length": length(self.source),
            "batch_size": batch_size(self.source),
        }


class StatefulReading(Reading):
    """A pass over what has a state of its own, which is used as it is."""

    kind = "state"

    def __init__(self, source: Any, name: str, holder: Any) -> None:
        super().__init__(source, name)
        self._holder = holder
        self._at = 0
        self._state: Any = None
        self._own: Fields | None = None
        self._open = self._resumed = False

    def open(self) -> None:
        super().open()
        self._open = True

    def _continue(self, saved: Fields, strict: bool) -> None:
        self._at, self._state, self._own = saved["at"], saved["state"], saved["own"]
        if self._state is not None:
            load_state(self._holder, self._state, self.name)
        self._iterator = iter(self.source)
        if self._own is not None:  # who takes its state may draw in another order than who went that way
            starts.restore_own(self._own, self.source, self.name)
        self._read_over(saved["batches"] - self._at)
        self._open = self._resumed = True

    def supersede(self) -> None:
        # From now on the state is that of the other pass.
        self._open = False
        if self._resumed and getattr(self._holder, "_starting_state_dict", None) is not None:
            # A stream of Hugging Face's would begin every further pass where it was resumed.
            self._holder._starting_state_dict = None

    def saved(self, batches: int, samples: int) -> Fields:
        # Before its first batch an object may still tell the end of the pass before; from the start no state is needed.
        if self._open and 0 < batches == self.batches:
            self._at, self._state = batches, self._holder.state_dict()
            self._own = starts.own_states(self.source)
        return super().saved(batches, samples) | {"at": self._at, "state": self._state, "own": self._own}


class IndexReading(Reading):
    """A pass over a map-style loader, through a copy of it: what was used is skipped by its indices."""

    kind = "indices"

    def __init__(self, loader: DataLoader[Any], name: str, copied: Twin, kept: bool) -> None:
        super().__init__(loader, name)
        self._twin: DataLoader[Any] | None = copied.loader
        self._indices = copied.indices
        self._indices.forget()
        self._indices.first = self._note
        self._order: Fields | None = None
        self._kept = copied.loader._iterator is not None
        self._reset = self._kept or (kept and loader.persistent_workers)
        self._unused: Any = None
        self._check: Callable[[], None] = _nothing
        self._waiting: Fields | None = None

    def open(self) -> None:
        self.start = starts.capture(self.source)
        self._build()

    def _build(self) -> None:
        # Kept workers go on without the number that new ones draw: it is taken back where they are new only here.
        rewinding = self._reset and not self._kept
        self._indices.entering = self._rewind if rewinding else None
        assert self._twin is not None
        self._iterator = iter(self._twin)
        stream = self._indices.stream
        if rewinding and stream is not None and not stream.begun:
            self._rewind()
            stream.restart(self._indices.begin())

    def _note(self) -> None:
        if self._indices.instead is None:
            self._order = orders.noted(self.source)

    def _rewind(self) -> None:
        starts.restore(self.start, self.source, self.name)

    def _continue(self, saved: Fields, strict: bool) -> None:
        self._reset = saved["reset"]
        self._indices.skip = saved["samples"]
        order = saved.get("order")
        if order is not None and order["splits"]:
            # The sampler's own order begins with the next pass.
            self._order = order
            part = orders.dealt(orders.told(order, self.name), order["share"])
            self._indices.instead = orders.batches(self.source, part)
        self._check = lambda: self._compare(saved, strict)
        _warn_of_differences(saved, self.source, self.name)
        self._build()
        if saved["dataset"] is not None:
            restore_dataset(saved["dataset"], self.source, self.name)
        if self._indices.stream is not None:
            self._indices.stream.skip()
            self._check()
        else:
            # Its __iter__ is a generator function: all is built when the first batch is asked for.
            self._indices.entering, self._indices.ready = self._enter, self._leave

    def _enter(self) -> None:
        if self._waiting is None:
            self._waiting = starts.process_state()
            self._rewind()
        elif self._reset:
            self._rewind()

    def _leave(self) -> None:
        assert self._waiting is not None
        self._check()
        starts.set_process_state(self._waiting, self.name)

    def _compare(self, saved: Fields, strict: bool) -> None:
        if saved["next"] is None or saved["batch_size"] != batch_size(self.source):
            return
        assert self._indices.stream is not None
        found = self._indices.stream.peek()
        actual = None if found is None else digest(found)
        if actual != saved["next"]:
            other_order(saved, actual, self.name, strict)

    def fetch(self, clean: bool) -> list[Any]:
        batch = super().fetch(clean)
        stream = self._indices.stream
        if batch and stream is not None:
            self.samples += stream.handed()
            if clean:
                self._unused = stream.last
        if batch and self._indices.instead is not None and (stream is None or stream.amiss):
            raise StateError(
                f"the source {self.name!r} can't be continued by another number of ranks: its loader takes other "
                "samples than its sampler gives. Resume without the position in the data (restore=Parts(data=False))",
                path=self.name,
            )
        return batch

    def is_over(self) -> bool:
        stream = self._indices.stream
        if stream is None or not stream.foreseeable:
            return super().is_over()
        return self.batches > 0 and stream.peek() is None

    def close(self) -> None:
        # Who owns the loader decides how long its workers live.
        self._iterator, self._twin = iter(()), None

    def saved(self, batches: int, samples: int) -> Fields:
        fields = super().saved(batches, samples)
        stream = self._indices.stream
        if batches and (stream is None or stream.amiss):
            return fields | {"kind": Reading.kind}
        following = self._unused
        if batches == self.batches:
            following = stream.peek() if stream is not None and stream.foreseeable else None
        return fields | {
            "reset": self._reset,
            "next": None if following is None else digest(following),
            "dataset": dataset_state(self.source),
            "order": self._order,
        }


def other_order(saved: Fields, actual: str | None, name: str, strict: bool) -> None:
    """The next samples aren't those that were saved.

    Raises:
        IntegrityError: where ``strict``; else it is a warning.
    """
    message = (
        f"the source {name!r} can't be continued exactly: after {saved['batches']} batches its next samples "
        "aren't those that would have come when it was saved. Its sampler doesn't give the same order again, or "
        "the data set is another one"
    )
    if strict:
        raise IntegrityError(message, key=name, expected=saved["next"], actual=actual)
    warnings.warn(message, stacklevel=2)


def _nothing() -> None:
    return


def _warn_of_differences(saved: Fields, source: Any, name: str) -> None:
    for key, now, what in (
        ("length", length(source), "samples"),
        ("batch_size", batch_size(source), "samples a batch"),
    ):
        if saved[key] != now:
            warnings.warn(
                f"the source {name!r} had {saved[key]} {what} when it was saved and has {now} now; its pass is "
                f"continued after the {saved['samples']} samples that were used",
                stacklevel=2,
            )


def length(source: Any) -> int | None:
    """How many samples the data set has, where it tells."""
    try:
        return len(source.dataset)
    except (AttributeError, TypeError, NotImplementedError):
        return None


def batch_size(source: Any) -> int | None:
    """How many samples a loader's batch has, where it tells."""
    for owner in (source, getattr(source, "batch_sampler", None), getattr(source, "sampler", None)):
        size = getattr(owner, "batch_size", None)
        if type(size) is int:
            return size
    return None


def is_stateful(thing: Any) -> bool:
    """Whether it has a state of its own."""
    return callable(getattr(thing, "state_dict", None)) and callable(getattr(thing, "load_state_dict", None))


def is_map_style(source: Any) -> bool:
    """Whether it is a loader that asks for its samples by indices."""
    return isinstance(source, DataLoader) and not isinstance(source.dataset, IterableDataset)


def dataset_state(source: Any) -> Any:
    """The state of a map-style loader's data set (as of random augmentation), where it has one in this process."""
    if is_map_style(source) and source.num_workers == 0 and is_stateful(source.dataset):
        return source.dataset.state_dict()
    return None


def restore_dataset(state: Any, source: Any, name: str) -> None:
    """The inverse of ``dataset_state``.

    Raises:
        StateError: the data set has no state any more, or doesn't take it.
    """
    if not is_map_style(source) or not is_stateful(source.dataset):
        raise StateError(f"the data set of {name!r} had a state when it was saved and has none now", path=name)
    load_state(source.dataset, state, name)


def load_state(holder: Any, state: Any, name: str) -> None:
    """Give something its own state back.

    Raises:
        StateError: it doesn't take it.
    """
    try:
        holder.load_state_dict(state)
    except Exception as error:
        raise StateError(f"the source {name!r} doesn't take the state that was saved: {error!r}", path=name) from error
