"""Which checkpoints are averaged: named one by one, the newest, or the best."""

from __future__ import annotations

from collections.abc import Sequence

from ckptstore.engine.catalogue import Checkpoint
from ckptstore.engine.select import select
from ckptstore.errors import FormatError, NotFoundError
from ckptstore.store import Store


def chosen(
    store: Store, selectors: Sequence[str] = (), *, last: int | None = None, best: str | None = None
) -> list[Checkpoint]:
    """At least two checkpoints: as ``selectors`` name them, in that order, or oldest first.

    Args:
        store: where they are.
        selectors: one for each.
        last: as many of the newest, or all where there are fewer.
        best: ``METRIC:N``, or ``METRIC:max:N``: as many of the best by a metric.

    Raises:
        FormatError: not exactly one of the three, fewer than two, or one twice.
        NotFoundError: no such checkpoint.
    """
    if isinstance(selectors, str):
        raise FormatError(f"{selectors!r} must be a list of selectors: [{selectors!r}, …]")
    if (bool(selectors), last is not None, best is not None).count(True) != 1:
        raise FormatError("say which checkpoints: name them, or ask for the last ones, or for the best ones")
    if selectors:
        found = [store.resolve(selector) for selector in selectors]
        for number, checkpoint in enumerate(found):
            if checkpoint in found[:number]:
                raise FormatError(f"{checkpoint.id} is given twice; what shall count more gets a larger weight")
    else:
        newest = store.checkpoints()
        if last is not None and last < 2:
            raise FormatError(f"last={last}: at least two checkpoints make an average")
        found = newest[-last:] if last is not None else _best(newest, best or "", store.url)
    if len(found) < 2:
        raise NotFoundError(
            f"an average takes at least two checkpoints, and these are {len(found)}"
            + "".join(f": {checkpoint.id}" for checkpoint in found)
        )
    return found


def _best(checkpoints: Sequence[Checkpoint], text: str, where: str) -> list[Checkpoint]:
    metric, colon, count = text.rpartition(":")
    if not colon or not count.isascii() or not count.isdigit() or not 2 <= int(count) < 10**9:
        raise FormatError(f"best={text!r}: write a metric and how many, at least two, as val_loss:3 or acc:max:5")
    left = list(checkpoints)
    found: list[Checkpoint] = []
    while left and len(found) < int(count):
        try:
            found.append(select(left, {}, f"best:{metric}", where))
        except NotFoundError:
            if not found:
                raise
            break
        left.remove(found[-1])
    return sorted(found, key=lambda checkpoint: checkpoint.order)
