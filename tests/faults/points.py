"""Which points of an operation a run breaks, and how a failure names the one it was at."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby

from .processes import Point

SEED = int(os.environ.get("FAULT_SEED", "0"))
"""Which of the points a sampled run takes."""


DECISIVE = 10
"""So many calls around and after the last link, which decides whether a checkpoint exists, are in every sample."""


def sampled(points: Sequence[Point], every: int, *, full: bool) -> list[Point]:
    """All points in a full run; else one in ``every`` of each kind of call, and those that decide."""
    if full:
        return list(points)
    last_link = max(place for place, point in enumerate(points) if point.call == "linkat")
    chosen = set(points[last_link - 1 : last_link - 1 + DECISIVE])
    for _, group in groupby(sorted(points), key=lambda point: point.call):
        kind = list(group)
        chosen.update(kind[SEED % min(every, len(kind)) :: every])
    return [point for point in points if point in chosen]


def kinds(points: Iterable[Point]) -> set[str]:
    """The system calls among ``points``."""
    return {point.call for point in points}


@contextmanager
def named(*where: object) -> Iterator[None]:
    """Whatever fails inside says where it was."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"at {', '.join(str(part) for part in where)}, FAULT_SEED={SEED}")
        raise
