"""Figures as text in a table: medians with their range, and ratios round by round."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence

Show = Callable[[Sequence[float]], str]


def seconds(values: Sequence[float]) -> str:
    """``0.70 s (0.63 to 0.74)``, or ``12 ms (9 to 20)``."""
    if abs(statistics.median(values)) < 0.1:
        return _spread([1e3 * value for value in values], "ms", 1 if statistics.median(values) < 0.01 else 0)
    return _spread(values, "s", 2)


def megabytes(values: Sequence[float]) -> str:
    """``12 MB (11 to 14)``, of bytes."""
    return _spread([value / 1e6 for value in values], "MB", 0 if statistics.median(values) > 10e6 else 1)


def gigabytes_s(values: Sequence[float]) -> str:
    """``2.31 GB/s (2.20 to 2.40)``, of bytes per second."""
    return _spread([value / 1e9 for value in values], "GB/s", 2)


def times(values: Sequence[float]) -> str:
    """``1.20 x (1.10 to 1.30)``."""
    return _spread(values, "x", 2)


def shares(values: Sequence[float]) -> str:
    """``67.1 %``, of numbers from 0 to 1."""
    return _spread([100 * value for value in values], "%", 1)


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median over the rounds of ours / theirs; NaN where theirs is not always over 0, and so lost in the noise.

    Within a round, so that a machine whose speed drifts slows both sides of each ratio.
    """
    if min(theirs) <= 0:
        return math.nan
    return statistics.median(own / other for own, other in zip(ours, theirs, strict=True))


def row(
    what: str,
    ours: Sequence[float],
    rivals: Mapping[str, Sequence[float]],
    show: Show,
    *,
    limit: str = "",
    note: str = "",
) -> str:
    """One line: what | ckptstore | rivals | ckptstore / rival | machine limit."""
    shown = "<br>".join(f"{name}: {show(values)}" for name, values in rivals.items())
    ratios = "<br>".join(_times_as_much(ratio(ours, values)) for values in rivals.values())
    return f"| {what} | {show(ours)}{note} | {shown} | {ratios} | {limit} |"


def p99(values: Sequence[float]) -> float:
    """The value that 99 % are not over; with fewer than a hundred, between the two largest."""
    ordered = sorted(values)
    place = 0.99 * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def _times_as_much(value: float) -> str:
    if math.isnan(value):
        return "can't be told"
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def _spread(values: Sequence[float], unit: str, digits: int) -> str:
    low, middle, high = (f"{value:.{digits}f}" for value in (min(values), statistics.median(values), max(values)))
    return f"{middle} {unit}" if len(values) == 1 else f"{middle} {unit} ({low} to {high})"
