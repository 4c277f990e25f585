"""What happens to the checkpoints of a run, told to whoever listens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ckptstore.engine.catalogue import Checkpoint
from ckptstore.errors import CheckpointError
from ckptstore.policy.guard import Divergence
from ckptstore.policy.progress import BEST
from ckptstore.units import count_text, duration_text, rate_text, size_text


@dataclass(frozen=True)
class Saved:
    """A checkpoint is durable.

    Attributes:
        checkpoint: the one that was saved.
        url: where it lies.
        stall_s: for how long training waited, in seconds.
        seconds: from the decision until it was durable.
    """

    checkpoint: Checkpoint
    url: str
    stall_s: float
    seconds: float

    @property
    def bytes_per_second(self) -> float:
        """Of the state, from the decision until it was durable."""
        return self.checkpoint.raw_bytes / max(self.seconds, 1e-9)

    @property
    def best(self) -> dict[str, float]:
        """The metrics of which it is the best so far, with their values."""
        names = [reason.removeprefix(BEST) for reason in self.checkpoint.reasons if reason.startswith(BEST)]
        return {name: self.checkpoint.metrics[name] for name in names if name in self.checkpoint.metrics}

    def __str__(self) -> str:
        why = ", ".join(self.checkpoint.reasons)
        return (
            f"step {self.checkpoint.step} saved ({why}): {size_text(self.checkpoint.raw_bytes)} in "
            f"{self.seconds:.2f} s, {rate_text(self.checkpoint.raw_bytes, self.seconds)}, training waited "
            f"{self.stall_s * 1000:.0f} ms, {self.url}"
        )


@dataclass(frozen=True)
class Failed:
    """A save failed; older checkpoints are untouched, and training goes on unless ``fatal``.

    Attributes:
        step: the one that was to be saved.
        error: why.
        failures: how many have failed one after the other.
        fatal: whether these are so many that training ends.
    """

    step: int
    error: CheckpointError
    failures: int
    fatal: bool

    def __str__(self) -> str:
        times = "" if self.failures == 1 else f" (the {self.failures}th time in a row)"
        return f"saving step {self.step} failed{times}: {self.error}"


@dataclass(frozen=True)
class Resumed:
    """A run goes on where a checkpoint was made, or begins.

    Attributes:
        checkpoint: the one that was loaded, None for a fresh start.
        url: where it lies.
        kept: parts that it lacks: they keep the values that they had.
        unused: parts that it has and the run has not, or doesn't want.
        differences: what else is not as it was saved, for people.
    """

    checkpoint: Checkpoint | None
    url: str
    kept: Sequence[str] = ()
    unused: Sequence[str] = ()
    differences: Sequence[str] = ()

    def __bool__(self) -> bool:
        """Whether anything was loaded."""
        return self.checkpoint is not None

    def __str__(self) -> str:
        if self.checkpoint is None:
            return f"a fresh start: {self.url} has no checkpoints"
        return f"resumed from step {self.checkpoint.step} ({self.checkpoint.id}), {self.url}"


@dataclass(frozen=True)
class Stats:
    """What saving has cost this process so far.

    Attributes:
        saves: checkpoints that were saved.
        failed: saves that failed.
        skipped: saves left out because the one before still ran.
        stall_s: for how long saves kept training waiting, in seconds.
        elapsed_s: since the run was resumed or begun here.
        written_bytes: stored by these saves; what they borrowed doesn't count.
        kept_bytes: what lies in the store, where it was looked at (at the end).
    """

    saves: int = 0
    failed: int = 0
    skipped: int = 0
    stall_s: float = 0.0
    elapsed_s: float = 0.0
    written_bytes: int = 0
    kept_bytes: int | None = None

    @property
    def share(self) -> float:
        """Of the time, for which saves kept training waiting."""
        return self.stall_s / self.elapsed_s if self.elapsed_s else 0.0

    def __str__(self) -> str:
        kept = "" if self.kept_bytes is None else f", {size_text(self.kept_bytes)} kept"
        failed = f", {count_text(self.failed, 'save')} failed" if self.failed else ""
        return (
            f"{count_text(self.saves, 'checkpoint')} saved{failed}: training waited {self.stall_s:.2f} s, "
            f"{self.share:.2%} of {duration_text(self.elapsed_s)}; {size_text(self.written_bytes)} written{kept}"
        )


class Listener:
    """Told what happens, in the training thread. Override what is of interest; what one raises ends training."""

    def on_saved(self, event: Saved) -> None:
        """A checkpoint is durable."""

    def on_best(self, event: Saved) -> None:
        """That checkpoint is the best so far by a metric, see ``event.best``; after ``on_saved``."""

    def on_failed(self, event: Failed) -> None:
        """A save failed."""

    def on_resumed(self, event: Resumed) -> None:
        """The run was resumed, or begins."""

    def on_diverged(self, event: Divergence) -> None:
        """Training has gone astray by ``stop_on``, and ends."""

    def on_step(self, step: int) -> None:
        """An optimizer step is done. Called for each one: it has to be quick."""

    def on_closed(self, stats: Stats) -> None:
        """The run has ended, well or not."""


class Hooks(Listener):
    """Single functions as a listener."""

    def __init__(self, **hooks: Callable[[Any], object] | None) -> None:
        for name, hook in hooks.items():
            if hook is not None:
                setattr(self, name, hook)
