"""The weights of several checkpoints as one: their mean, weighted or exponential, saved as a checkpoint of its own."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import accumulate

import torch

from ckptstore.engine.catalogue import Checkpoint
from ckptstore.engine.tensorreader import BlockCache, TensorReader
from ckptstore.engine.workers import Progress
from ckptstore.errors import FormatError, IntegrityError, SaveFailedError
from ckptstore.opening import open
from ckptstore.store import Store
from ckptstore.tools.merging import Mean, result_type
from ckptstore.tools.parents import chosen

_LONG_NAMES = 200
_REASON_LENGTH = 1000

Target = Store | str | os.PathLike[str] | None


def average(
    store: Store,
    selectors: Sequence[str] = (),
    *,
    last: int | None = None,
    best: str | None = None,
    weights: Sequence[float] | None = None,
    ema: float | None = None,
    only: Sequence[str] | None = None,
    target: Target = None,
    dtype: torch.dtype | str | None = None,
    progress: Progress | None = None,
) -> Checkpoint:
    """Average the weights of checkpoints, and save the result as a checkpoint that names them.

    It has the weights alone, with the step and epoch of the newest, and no metrics. Floating-point and complex tensors
    are averaged in fp32, in fp64 where one of them is, and rounded once, at the end, to the nearest, ties to even.
    All else is the newest's: integers, as counters and positions, and plain values. Tied tensors stay tied. Running
    statistics of normalizations are averaged like weights; to have them right, run some batches through the result, as
    ``swa_utils.update_bn`` does.

    The mean runs from the oldest to the newest, ``mean += share * (weights - mean)``, as torch's
    ``swa_utils.get_swa_multi_avg_fn`` does, whose results it has to the bit in fp32. With ``ema`` the share is
    ``1 - ema`` from the second one on, as in ``swa_utils.get_ema_multi_avg_fn``: so the oldest of n weighs
    ``ema ** (n - 1)``, nearly all where ``ema`` is close to 1 and they are few.

    Memory is bounded, whatever the size and the number of checkpoints.

    Args:
        store: where they are.
        selectors: which; at least two.
        last: instead: as many of the newest.
        best: instead: as many of the best by a metric, as "val_loss:3".
        weights: a positive number for each of ``selectors``, in their order, or oldest first; only their ratios count.
            None: all the same.
        ema: decay of an exponential moving average, between 0 and 1, instead of weights.
        only: patterns of what is averaged, as ``["model/*"]``. None: all modules, or "model" where there are none.
        target: a store, open for writing, or its URL: made where there is none. None: ``store`` itself. To save there
            takes it over, as any save by another process: a run that saves there ends with a ``StaleWriterError``, and
            the result, which has only weights, is ``latest``.
        dtype: what floating-point tensors are rounded to, as "bf16". None: as in the newest.
        progress: called with (bytes done, bytes in all) of the result, from any thread.

    Returns:
        The new checkpoint.

    Raises:
        FormatError: an option that can't be.
        NotFoundError: no such checkpoint, or fewer than two.
        StateError: they don't fit each other: all tensors that don't are named.
        IntegrityError: one of them is damaged; nothing was saved.
        SaveFailedError, CommitUnknownError, StaleWriterError, UnavailableError: as ``Store.save``.
    """
    parents = chosen(store, selectors, last=last, best=best)
    order = sorted(range(len(parents)), key=lambda number: parents[number].order)
    given = _weights(len(parents), weights, ema)
    ordered = [given[number] for number in order]
    parents = [parents[number] for number in order]
    shares = shares_of(ordered) if ema is None else [1.0, *[1 - ema] * (len(parents) - 1)]
    rounded = result_type(dtype)
    with opened(store, target) as place, reading(store, parents) as readers:
        mean = Mean(readers, shares, only, rounded)
        what = reason(parents, ordered if weights is not None else None, ema)
        return save(place, mean, parents[-1], what + origin(store, place), whole=only is None, progress=progress)


def _weights(count: int, weights: Sequence[float] | None, ema: float | None) -> list[float]:
    """What each of them weighs, where ``ema`` doesn't say it."""
    if weights is not None and ema is not None:
        raise FormatError("weights and ema can't both be given: an exponential average weighs by age")
    if ema is not None and (type(ema) not in (int, float) or not 0 < ema < 1):
        raise FormatError(f"ema={ema!r} must be a number between 0 and 1, as 0.9")
    if weights is None:
        return [1.0] * count
    if len(weights) != count:
        raise FormatError(f"there are {len(weights)} weights for {count} checkpoints")
    if not all(map(_is_weight, weights)):
        raise FormatError(f"weights={list(weights)!r:.100} must be positive numbers; leave out what shall not count")
    return [float(weight) for weight in weights]


def shares_of(weights: Sequence[float]) -> list[float]:
    """The share of each in the mean of itself and those before it: of equal numbers that is the number, to the bit."""
    return [own / sofar for own, sofar in zip(weights, accumulate(weights), strict=True)]


def _is_weight(number: object) -> bool:
    return isinstance(number, int | float) and 0 < number < math.inf


def reason(parents: Sequence[Checkpoint], weights: Sequence[float] | None, ema: float | None) -> str:
    """What an average is of, as its commit record says it."""
    names = [parent.id for parent in parents]
    if len(names) > _LONG_NAMES:
        # The beginning of an id names it within its store.
        names = ["-".join(name.split("-")[:2]) for name in names]
    if weights is None:
        ids = ", ".join(names)
        return f"average of {ids}" if ema is None else f"exponential average ({ema:g}) of {ids}"
    total = sum(weights)
    each = (f"{name} ({weight / total:.4g})" for name, weight in zip(names, weights, strict=True))
    return f"weighted average of {', '.join(each)}"


def _in_lines(reason: str) -> list[str]:
    """A reason in as many as it takes: each has its limit in the commit record."""
    return textwrap.wrap(reason, _REASON_LENGTH, subsequent_indent="and of ", break_on_hyphens=False)


def origin(store: Store, target: Store) -> str:
    """Where its parents are, if they are elsewhere."""
    return "" if target is store else f", from {store.url}"


@contextmanager
def opened(store: Store, target: Target) -> Iterator[Store]:
    """The store in which the result is saved.

    Raises:
        FormatError: it is ``store``, under its URL.
    """
    if target is None or isinstance(target, Store):
        yield store if target is None else target
        return
    with open(target, ranks="one") as place:
        if place.url == store.url:
            raise FormatError(
                f"{place.url} is where the checkpoints are: to save there, too, leave the target out (--here)"
            )
        yield place


@contextmanager
def reading(store: Store, parents: Sequence[Checkpoint]) -> Iterator[list[TensorReader]]:
    """A reader of each, with memory that they share."""
    cache = BlockCache()
    with ExitStack() as stack:
        yield [stack.enter_context(store.reader(parent.id, cache=cache)) for parent in parents]


def save(
    place: Store, mean: Mean, newest: Checkpoint, reason: str, *, whole: bool, progress: Progress | None
) -> Checkpoint:
    """Save a mean as what comes after ``newest``; ``whole``: it has all modules.

    Raises:
        IntegrityError: a parent is damaged.
    """
    state = mean.streamed(newest.parameters if whole else 0)
    try:
        return place.save_streamed(
            state, step=newest.step, epoch=newest.epoch, reasons=_in_lines(reason), progress=progress
        )
    except SaveFailedError as error:
        if isinstance(error.__cause__, IntegrityError):
            # The parent is what is wrong; that nothing was saved follows from it.
            raise error.__cause__ from None
        raise
