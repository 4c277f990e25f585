"""Schedules that wait for something to happen: a better metric, or a count that is reached."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from ckptstore.errors import FormatError
from ckptstore.policy.counts import BARE_BILLIONS, count_name, parse_counts
from ckptstore.policy.metrics import Mode, check_metric, mode_of
from ckptstore.policy.progress import BEST, MILESTONE, Length, Past, Progress
from ckptstore.policy.schedule import Schedule

Counted: TypeAlias = Literal["params", "tokens", "steps"]


@dataclass(frozen=True)
class OnBest(Schedule):
    """See ``on_best``."""

    metric: str
    mode: Mode

    def due(self, now: Progress, past: Past, length: Length) -> list[str]:
        """ "best METRIC", where it was reported and is better than any that was saved."""
        value = now.metrics.get(self.metric, math.nan)
        if math.isnan(value):
            return []
        before = past.best.get(self.metric)
        smaller = mode_of(self.metric, self.mode) == "min"
        better = before is None or (value < before if smaller else value > before)
        return [f"{BEST}{self.metric}"] if better else []

    def enumerate(self, length: Length) -> list[int]:
        """Nothing that could be known."""
        return []

    def open_ends(self, length: Length) -> list[str]:
        """All of it."""
        return [f"{self} depends on what is measured"]

    def __str__(self) -> str:
        mode = "" if self.mode == "auto" else f", mode={self.mode!r}"
        return f"on_best({self.metric!r}{mode})"


def on_best(metric: str, mode: Mode = "auto") -> OnBest:
    """Save whenever ``metric`` is reported and better than at any save made for it before.

    Args:
        metric: its name, as it is reported.
        mode: whether "min" or "max" is best; "auto" goes by the name: smaller is better with loss, error or perplexity
            in it.

    Raises:
        FormatError: no name, or no mode.
    """
    check_metric("on_best", metric, mode)
    return OnBest(metric, mode)


@dataclass(frozen=True)
class Milestones(Schedule):
    """See ``milestones``."""

    counts: tuple[int, ...]
    of: Counted

    def due(self, now: Progress, past: Past, length: Length) -> list[str]:
        """ "milestone 1B" for each that was reached and isn't saved yet."""
        # A model is as large before its first step; it is worth a checkpoint once it has learnt something.
        if now.step < 1:
            return []
        reached = {"params": now.parameters, "tokens": now.tokens, "steps": now.step}[self.of]
        names = [self._reason(count) for count in self.counts if count <= reached]
        return [name for name in names if name not in past.reached]

    def enumerate(self, length: Length) -> list[int]:
        """The steps at which they are reached."""
        if self.of == "steps":
            return list(self.counts)
        each = length.tokens_per_step
        return sorted({-(-count // each) for count in self.counts}) if self.of == "tokens" and each else []

    def open_ends(self, length: Length) -> list[str]:
        """Parameters depend on the model; tokens on how many a step has."""
        if self.of == "params":
            return [f"{self} depends on how the model grows"]
        if self.of == "tokens" and length.tokens_per_step is None:
            return [f"{self} depends on how many tokens a step has: give tokens_per_step"]
        return []

    def is_counted(self) -> bool:
        """All but parameters, of which ranks may have different ones."""
        return self.of != "params"

    def check(self, length: Length) -> None:
        """No milestone may lie behind the end, where that is known."""
        if length.total_steps is None or (self.of == "tokens" and length.tokens_per_step is None):
            return
        limit = {"steps": length.total_steps, "tokens": length.total_steps * (length.tokens_per_step or 0)}.get(self.of)
        if limit is not None and self.counts[-1] > limit:
            raise FormatError(
                f"{self}: {count_name(self.counts[-1])} is never reached, the run has {limit:,} {self.of}: leave it out"
            )

    def _reason(self, count: int) -> str:
        return f"{MILESTONE}{count_name(count)}" + ("" if self.of == "params" else f" {self.of}")

    def __str__(self) -> str:
        of = "" if self.of == "params" else f", of={self.of!r}"
        if self.of != "steps" and self.counts[0] < BARE_BILLIONS:
            # As text they would be billions.
            return f"milestones({list(self.counts)}{of})"
        return f"milestones({','.join(map(count_name, self.counts))!r}{of})"


def milestones_reached(given: str | Iterable[int | str], of: Counted) -> Milestones:
    """See ``milestones``.

    Raises:
        FormatError: no counts, or nothing that is counted.
    """
    if of not in ("params", "tokens", "steps"):
        raise FormatError(f"milestones(of={of!r}) must be 'params', 'tokens' or 'steps'")
    return Milestones(tuple(parse_counts(given, "milestones", billions=of != "steps")), of)
