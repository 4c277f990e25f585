"""Greedy soup: the average of those checkpoints that make it better, by whatever their user measures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch

from ckptstore.engine.catalogue import Checkpoint
from ckptstore.engine.tensorreader import TensorReader
from ckptstore.engine.workers import Progress
from ckptstore.errors import FormatError
from ckptstore.store import Store
from ckptstore.tools.average import Target, opened, origin, reading, reason, save, shares_of
from ckptstore.tools.merging import Mean, result_type
from ckptstore.tools.parents import chosen


def greedy_soup(
    store: Store,
    selectors: Sequence[str] = (),
    score: Callable[[Any], float] | None = None,
    *,
    mode: Literal["max", "min"] = "max",
    last: int | None = None,
    best: str | None = None,
    only: Sequence[str] | None = None,
    target: Target = None,
    dtype: torch.dtype | str | None = None,
    progress: Progress | None = None,
) -> Checkpoint:
    """Average checkpoints one after the other, and keep each where the average is not worse with it.

    The algorithm is "greedy soup" of Wortsman et al., "Model soups" (2022): each is scored by itself; then, from the
    best to the worst, each joins the uniform average if that scores at least as well as without it. The result is what
    was scored, to the bit, saved as by ``average`` with those that are in it named. Score on held-out data.

    Each average that is scored is in memory, once; its checkpoints are read anew for it.

    Args:
        store, selectors, last, best, only, target, dtype, progress: as ``average``; progress tells of the save.
        score: takes weights as plain data, as ``store.load()`` gives them (``model.load_state_dict(state["model"])``),
            and gives a number. It may keep nothing of them. What is no number (nan) is the worst.
        mode: whether the largest or the smallest score is best.

    Raises:
        FormatError, NotFoundError, StateError, IntegrityError: as ``average``.
        SaveFailedError, CommitUnknownError, StaleWriterError, UnavailableError: as ``Store.save``.
    """
    if not callable(score) or mode not in ("max", "min"):
        raise FormatError(f"a soup needs a function that scores weights, and mode 'max' or 'min', not {mode!r}")
    parents = sorted(chosen(store, selectors, last=last, best=best), key=lambda parent: parent.order)
    rounded = result_type(dtype)
    with opened(store, target) as place, reading(store, parents) as readers:
        # Misfits are found before anything is scored.
        Mean(readers, _uniform(len(readers)), only, rounded)

        def mean(numbers: Sequence[int]) -> Mean:
            inside: list[TensorReader] = [readers[number] for number in sorted(numbers)]
            return Mean(inside, _uniform(len(inside)), only, rounded)

        def rate(numbers: Sequence[int]) -> float:
            value = float(score(mean(numbers).plain()))
            return -math.inf if math.isnan(value) else value if mode == "max" else -value

        soup = _soup(len(parents), rate)
        inside = [parents[number] for number in sorted(soup)]
        what = f"greedy soup, {reason(inside, None, None)}{origin(store, place)}"
        return save(place, mean(soup), inside[-1], what, whole=only is None, progress=progress)


def _uniform(count: int) -> list[float]:
    return shares_of([1.0] * count)


def _soup(count: int, rate: Callable[[Sequence[int]], float]) -> list[int]:
    """Which ones are in it, the best by itself first; of equally good ones the newer."""
    alone = [rate([number]) for number in range(count)]
    first, *others = sorted(range(count), key=lambda number: (alone[number], number), reverse=True)
    soup, reached = [first], alone[first]
    for number in others:
        with_it = rate([*soup, number])
        if with_it >= reached:
            soup, reached = [*soup, number], with_it
    return soup
