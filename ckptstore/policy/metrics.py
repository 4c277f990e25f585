"""Whether small or large values of a metric are good."""

from __future__ import annotations

from typing import Literal, TypeAlias

from ckptstore.errors import FormatError

Mode: TypeAlias = Literal["auto", "min", "max"]

_LOWER_IS_BETTER = ("loss", "error", "perplexity")


def default_mode(metric: str) -> Literal["min", "max"]:
    """Whether small or large values of ``metric`` are good, by its name."""
    return "min" if any(word in metric.lower() for word in _LOWER_IS_BETTER) else "max"


def mode_of(metric: str, mode: Mode) -> Literal["min", "max"]:
    """``mode``, or by the metric's name."""
    return default_mode(metric) if mode == "auto" else mode


def check_metric(where: str, metric: object, mode: object) -> None:
    """Nothing, for the name of a metric and a mode.

    Raises:
        FormatError: one of them is something else.
    """
    if not isinstance(metric, str) or not metric or ":" in metric:
        raise FormatError(f"{where}({metric!r:.60}): give the name of a metric, as {where}('val_loss')")
    if mode not in ("auto", "min", "max"):
        raise FormatError(f"{where}(mode={mode!r}) must be 'auto', 'min' or 'max'")
