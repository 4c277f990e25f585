"""What stands in for the sampler of a map-style loader: it counts, skips and looks ahead, and loads nothing."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from torch.utils.data import DataLoader

from ckptstore.format.digest import BLOCK_DIGEST, block_digest
from ckptstore.trainer import starts


class Stream:
    """The batches of indices of one pass, on their way from the sampler to the consumer.

    Attributes:
        last: the batch of indices whose samples were handed out last.
        foreseeable: looking ahead is known to draw no random numbers of the process.
        amiss: the loader handed out more batches than it asked for.
    """

    def __init__(self, owner: Indices) -> None:
        self._batches = owner.begin()
        self._batched = owner.batched
        self._skip = owner.skip
        self._first = owner.first
        self._ready = owner.ready
        self._ahead: deque[Any] = deque()
        self._sent: deque[Any] = deque()
        self._pulled = 0
        self.last: Any = None
        self.foreseeable = owner.instead is not None
        self.amiss = False

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Any:
        self.skip()
        batch = self._ahead.popleft() if self._ahead else self._pull()
        self._sent.append(batch)
        return batch

    @property
    def begun(self) -> bool:
        """Whether the sampler was asked for indices."""
        return self._pulled > 0

    def restart(self, batches: Iterator[Any]) -> None:
        """Take the indices from another iterator of the sampler."""
        self._batches = batches

    def _pull(self) -> Any:
        if not self._pulled:
            self._first()
        self._pulled += 1
        if self._pulled == 2:  # a sampler that shuffles has done so for the first batch
            before = starts.fingerprint()
            batch = next(self._batches)
            self.foreseeable = before == starts.fingerprint()
        else:
            batch = next(self._batches)
        return batch if hasattr(batch, "__len__") or not self._batched else list(batch)

    def skip(self) -> None:
        """Leave out the samples that were used; of a batch that was used in part the rest remains."""
        try:
            while self._skip > 0:
                batch = self._pull()
                size = self._size(batch)
                if size > self._skip:
                    self._ahead.append(batch[self._skip :])
                self._skip -= size
        except StopIteration:
            self._skip = 0
        ready, self._ready = self._ready, None
        if ready is not None:
            ready()

    def peek(self) -> Any:
        """The next batch of indices that isn't handed out; None where there is none."""
        self.skip()
        if self._sent:
            return self._sent[0]
        if not self._ahead:
            try:
                self._ahead.append(self._pull())
            except StopIteration:
                return None
        return self._ahead[0]

    def handed(self) -> int:
        """The samples of the next batch reached the consumer: how many they are."""
        if not self._sent:
            self.amiss = True
            return 0
        self.last = self._sent.popleft()
        return self._size(self.last)

    def _size(self, batch: Any) -> int:
        # Without batching a sampler's item is one key, whatever it is; lists are what data sets take as many keys.
        return len(batch) if self._batched or isinstance(batch, list) else 1


class Indices:
    """A sampler that gives what ``sampler`` gives, from the first sample on that isn't to be skipped.

    Attributes:
        stream: the pass that was begun last.
        instead: batches for the next pass, in the place of the sampler's.
        skip: number of samples that the next pass leaves out.
        entering: called before the sampler is asked for a pass.
        first: called before it is asked for its first indices.
        ready: called when all that is to be skipped is.
    """

    def __init__(self, sampler: Iterable[Any], batched: bool) -> None:
        self.sampler = sampler
        self.batched = batched
        self.forget()

    def forget(self) -> None:
        """What was set for a pass doesn't hold for the next one."""
        self.stream: Stream | None = None
        self.instead: Iterable[Any] | None = None
        self.skip = 0
        self.entering: Callable[[], None] | None = None
        self.first: Callable[[], None] = _nothing
        self.ready: Callable[[], None] | None = None

    def __iter__(self) -> Stream:
        if self.entering is not None:
            self.entering()
        self.stream = Stream(self)
        return self.stream

    def begin(self) -> Iterator[Any]:
        """The batches of a pass, from the start."""
        return iter(self.sampler if self.instead is None else self.instead)

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "sampler":
            raise AttributeError(name)
        return getattr(self.sampler, name)


def _nothing() -> None:
    return


class Twin(NamedTuple):
    """A copy of a loader, and the indices that it reads through."""

    loader: DataLoader[Any]
    indices: Indices


def twin(loader: DataLoader[Any], previous: Twin | None) -> Twin:
    """A copy of the loader; it goes on with the workers that ``previous`` kept."""
    made = copy.copy(loader)
    fields = vars(made)
    # The loader refuses to have its samplers set after it was made.
    slot = "sampler" if loader.batch_sampler is None else "batch_sampler"
    indices = Indices(fields[slot], slot == "batch_sampler") if previous is None else previous.indices
    fields[slot] = indices
    fields["_iterator"] = None if previous is None else previous.loader._iterator
    return Twin(made, indices)


def digest(batch: Any) -> str:
    """A digest of one batch of indices, whatever kind of numbers or keys they are."""
    keys = batch if isinstance(batch, list) else [batch] if not hasattr(batch, "tolist") else batch.tolist()
    text = ",".join(map(str, keys)) if isinstance(keys, list) else str(keys)
    return block_digest(BLOCK_DIGEST, text.encode("utf-8", "surrogatepass"))
