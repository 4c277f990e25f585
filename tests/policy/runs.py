"""Runs as a trainer makes them, only without training: what a schedule is asked, and what it is told."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from ckptstore.policy.progress import Length, Past, Progress
from ckptstore.policy.schedule import Schedule


def progress(step: int, length: Length, **more: object) -> Progress:
    """How far a run of ``length`` has come after ``step`` steps."""
    ends = length.epoch_ends() if length.epochs or length.steps_per_epoch else []
    return Progress(
        step=step,
        epoch=bisect_right(ends, step),
        tokens=step * (length.tokens_per_step or 0),
        elapsed_s=step * (length.step_s or 0.0),
        **more,  # type: ignore[arg-type]
    )


@dataclass
class Run:
    """A run that asks ``schedule`` and saves; each of ``saved`` holds what a resume from it begins with.

    Attributes:
        saved: the steps that were saved and why, in order.
        past: what the schedule remembers.
    """

    schedule: Schedule
    length: Length
    past: Past = field(default_factory=Past)
    saved: list[tuple[int, list[str]]] = field(default_factory=list)
    kept: dict[int, Past] = field(default_factory=dict)

    def on(
        self,
        steps: Iterable[int],
        *,
        fails: Collection[int] = (),
        by_hand: Collection[int] = (),
        metrics: Mapping[int, Mapping[str, float]] | None = None,
    ) -> Run:
        """Decide at each of ``steps``; at those of ``fails`` saving fails, at those of ``by_hand`` somebody saves."""
        reported: dict[str, float] = {}
        for step in steps:
            reported |= (metrics or {}).get(step, {})
            now = progress(step, self.length, metrics=dict(reported))
            reasons = self.schedule.due(now, self.past, self.length)
            self.past = self.past.decided(now)
            if reasons and step not in fails:
                self.past = self.past.saved(now, reasons)
                self.saved.append((step, reasons))
                self.kept[step] = self.past
                reported = {}
            elif step in by_hand:
                self.past = self.past.saved(now, ["by hand"])
        return self

    @property
    def steps(self) -> list[int]:
        """The steps that were saved, in order."""
        return [step for step, _ in self.saved]


def whole(schedule: Schedule, length: Length) -> Run:
    """A run from its beginning to its end that decides after every step."""
    return Run(schedule, length).on(range(length.require_total("a run") + 1))
