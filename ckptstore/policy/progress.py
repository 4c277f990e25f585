"""How long a run is, how far it has come, and what it has saved: all that a schedule decides by."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from ckptstore.errors import FormatError

LONGEST = 1_000_000
"""More steps than this nobody saves, and listing them would fill the memory."""
MILESTONE, BEST = "milestone ", "best "
"""How reasons begin that are remembered: what was reached, and the metric that was the best so far."""


@dataclass(frozen=True)
class Length:
    """How long a run is, as far as anybody knows before it begins. Make it with ``Length.of``.

    Attributes:
        total_steps: optimizer steps in all.
        epochs: passes over the data.
        steps_per_epoch: optimizer steps in each.
        tokens_per_step: tokens that one optimizer step learns from.
        step_s: seconds that one step takes, to tell times beforehand.
    """

    total_steps: int | None = None
    epochs: int | None = None
    steps_per_epoch: int | None = None
    tokens_per_step: int | None = None
    step_s: float | None = None

    @classmethod
    def of(
        cls,
        total_steps: int | None = None,
        epochs: int | None = None,
        *,
        steps_per_epoch: int | None = None,
        dataset_size: int | None = None,
        batch_size: int | None = None,
        accumulation: int = 1,
        fallback_steps_per_epoch: int | None = None,
        tokens_per_step: int | None = None,
        step_s: float | None = None,
    ) -> Length:
        """What follows from what is known.

        Steps of an epoch are ceil(dataset_size / (batch_size * accumulation)); without a data set total_steps //
        epochs; without either ``fallback_steps_per_epoch``. The total is steps_per_epoch * epochs, where not given.

        Args:
            total_steps, epochs, steps_per_epoch, tokens_per_step, step_s: see ``Length``.
            dataset_size: samples in one epoch.
            batch_size: samples in one micro batch, over all ranks.
            accumulation: micro batches in one optimizer step.
            fallback_steps_per_epoch: for a run of which neither the data set nor the total is known.

        Raises:
            FormatError: a number that can't be, or two that contradict each other.
        """
        whole = {
            "total_steps": total_steps,
            "epochs": epochs,
            "steps_per_epoch": steps_per_epoch,
            "dataset_size": dataset_size,
            "batch_size": batch_size,
            "accumulation": accumulation,
            "fallback_steps_per_epoch": fallback_steps_per_epoch,
            "tokens_per_step": tokens_per_step,
        }
        for name, value in whole.items():
            check_count(value, name)
        if step_s is not None and not (is_number(step_s) and step_s > 0):
            raise FormatError(f"step_s={step_s!r} must be a number of seconds over 0")
        if (dataset_size is None) != (batch_size is None):
            raise FormatError("dataset_size and batch_size go together: give both, or total_steps and epochs")
        if dataset_size is not None and batch_size is not None:
            if steps_per_epoch is not None:
                raise FormatError("steps_per_epoch and dataset_size say the same thing: give one of them")
            steps_per_epoch = math.ceil(dataset_size / (batch_size * accumulation))
        if steps_per_epoch is None and total_steps is None:
            steps_per_epoch = fallback_steps_per_epoch
        if total_steps is None and steps_per_epoch is not None and epochs is not None:
            total_steps = steps_per_epoch * epochs
        length = cls(total_steps, epochs, steps_per_epoch, tokens_per_step, step_s)
        return length._consistent()

    def _consistent(self) -> Length:
        total, epochs, each = self.total_steps, self.epochs, self.steps_per_epoch
        if total is None or epochs is None:
            return self
        if epochs > total:
            raise FormatError(f"epochs={epochs} in total_steps={total}: an epoch has at least one step")
        if each is not None and total >= (each + 1) * epochs:
            raise FormatError(
                f"total_steps={total} is more than epochs={epochs} of {each} steps ({each * epochs}): leave one out"
            )
        return replace(self, steps_per_epoch=each if each is not None else total // epochs)

    def epoch_ends(self) -> list[int]:
        """The last step of each epoch that ends within the run: floor(e * total_steps / epochs) for e = 1, 2, ….

        Where the run ends before its last epoch does, the multiples of ``steps_per_epoch``.

        Raises:
            FormatError: too little is known, or they are too many.
        """
        total, epochs, each = self.total_steps, self.epochs, self.steps_per_epoch
        if total is not None and each is not None and total // each > LONGEST:
            raise FormatError(f"the run has {total // each:,} epochs, more than anybody can list: count in steps")
        if total is not None and epochs is not None and each is not None and total >= each * epochs:
            return [epoch * total // epochs for epoch in range(1, epochs + 1)]
        if total is not None and each is not None:
            return list(range(each, total + 1, each))
        raise FormatError(
            "where epochs end is not known: give epochs together with total_steps, steps_per_epoch, or dataset_size "
            "and batch_size"
        )

    def require_total(self, what: str) -> int:
        """``total_steps``.

        Raises:
            FormatError: it isn't known; ``what`` says who needs it.
        """
        if self.total_steps is None:
            raise FormatError(f"{what} needs to know how long the run is: give total_steps, or epochs and their length")
        return self.total_steps


@dataclass(frozen=True)
class Costs:
    """What was measured of this run, in seconds.

    Attributes:
        step_s: one step of training.
        stall_s: how long one save keeps training waiting.
        save_s: from the call until the checkpoint is durable.
    """

    step_s: float
    stall_s: float
    save_s: float


@dataclass(frozen=True)
class Progress:
    """How far a run has come.

    Attributes:
        step: completed optimizer steps.
        epoch: completed epochs.
        tokens: tokens learnt from.
        parameters: trainable ones, now.
        elapsed_s: seconds of training, over all its processes.
        metrics: what was reported since the last save that succeeded, as the next one records it.
        costs: what was measured, None before the first save.
        batch: micro batches used in the running epoch.
    """

    step: int = 0
    epoch: int = 0
    tokens: int = 0
    parameters: int = 0
    elapsed_s: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict)
    costs: Costs | None = None
    batch: int = 0


class Remembered(Protocol):
    """What is known of an earlier save. Checkpoints of a store are such."""

    @property
    def step(self) -> int: ...
    @property
    def metrics(self) -> Mapping[str, float]: ...
    @property
    def reasons(self) -> Sequence[str]: ...


@dataclass(frozen=True)
class Past:
    """What a schedule remembers: where it decided last, and what was saved.

    Attributes:
        step, epoch, tokens, elapsed_s: of the decision before; step -1 before the first one, which may save step 0.
        saved_s: ``elapsed_s`` at the last save.
        reached: the milestones that were saved, as reasons.
        best: of each metric that a save was made for, the best value.
    """

    step: int = -1
    epoch: int = 0
    tokens: int = 0
    elapsed_s: float = 0.0
    saved_s: float = 0.0
    reached: frozenset[str] = frozenset()
    best: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def resumed(cls, now: Progress, saved: Sequence[Remembered]) -> Past:
        """After a run was resumed at ``now`` from the last of ``saved``, checkpoints oldest first.

        What was reached, and the best values, stand in the checkpoints that it came from; those of a line that was
        left by going back to an earlier one are not among them.
        """
        past, lowest = cls().decided(now), math.inf
        line: list[Remembered] = []
        for checkpoint in reversed(saved):
            if checkpoint.step < lowest or not line:
                line.append(checkpoint)
            lowest = min(lowest, checkpoint.step)
        for checkpoint in reversed(line):
            past = past.saved(replace(now, metrics=checkpoint.metrics), checkpoint.reasons)
        return past

    def decided(self, now: Progress) -> Past:
        """After a decision at ``now``, whatever came of it."""
        return replace(self, step=now.step, epoch=now.epoch, tokens=now.tokens, elapsed_s=now.elapsed_s)

    def saved(self, now: Progress, reasons: Iterable[str]) -> Past:
        """After the save that was decided at ``now`` has succeeded. One that failed leaves all it was for pending."""
        given = list(reasons)
        best = {reason.removeprefix(BEST) for reason in given if reason.startswith(BEST)}
        return replace(
            self,
            saved_s=now.elapsed_s,
            reached=self.reached | {reason for reason in given if reason.startswith(MILESTONE)},
            best={**self.best, **{name: now.metrics[name] for name in best if name in now.metrics}},
        )


def is_number(value: object) -> bool:
    """Whether ``value`` is a finite int or float, and no bool."""
    # One larger than any float would fail wherever it is reckoned with.
    return type(value) in (int, float) and abs(value) <= sys.float_info.max  # type: ignore[arg-type]


def check_count(value: object, name: str) -> None:
    """Nothing, for None and whole numbers of at least 1.

    Raises:
        FormatError: anything else.
    """
    if value is not None and (type(value) is not int or value < 1):
        raise FormatError(f"{name}={value!r} must be a whole number of at least 1")
