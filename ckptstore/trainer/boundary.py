"""Between two steps: what is due is saved, what came of a save is told, signals are minded; and the end of a run."""

from __future__ import annotations

import logging
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Literal, NoReturn, Self

from ckptstore.config.settings import Parts
from ckptstore.engine.background import SaveHandle
from ckptstore.engine.saver import Durable
from ckptstore.errors import CheckpointError, StateError
from ckptstore.policy.events import Milestones
from ckptstore.policy.guard import Divergence
from ckptstore.policy.plan import FINAL
from ckptstore.policy.progress import Costs, Length, Progress
from ckptstore.policy.schedule import AnyOf, Schedule, parts_of
from ckptstore.state.rng import RNG
from ckptstore.state.staging import steps_begun
from ckptstore.store import SaveMode, Store
from ckptstore.trainer import parts
from ckptstore.trainer.data import Feeds
from ckptstore.trainer.decisions import Decisions, Evaluations, past_fields
from ckptstore.trainer.events import Failed, Listener, Resumed, Saved, Stats
from ckptstore.trainer.guarding import Guard, error_of
from ckptstore.trainer.reports import Reports
from ckptstore.trainer.run import PART, Counters, Run, progress_fields
from ckptstore.trainer.saving import Facts, Saving
from ckptstore.trainer.signals import Signals, exit_code, name_of
from ckptstore.trainer.watch import Watch

_log = logging.getLogger("ckptstore.trainer")


@dataclass(frozen=True)
class Limits:
    """How much a run puts up with: failed saves in a row, and times in seconds."""

    max_failures: int
    retry_s: float
    deadline_s: float | None
    poll_s: float | None


class Boundary:
    """The inner half of ``Checkpointer``.

    What is due at a step is saved before the next batch is fetched, where the batches come from here: so it has the
    metrics that are reported in between, and the random state after an evaluation. Otherwise it is saved in ``step``.
    """

    _own_store = True
    _final = True
    _verbose = True
    _minds_signals = True
    _skips = False
    _include = Parts()

    def __init__(
        self,
        store: Store,
        state: dict[str, Any],
        schedule: Schedule | None,
        length: Length,
        mode: SaveMode,
        limits: Limits,
        listeners: Sequence[Listener],
    ) -> None:
        self.store, self.state = store, state
        self._decisions = Decisions(schedule, length, retry_s=limits.retry_s)
        self._evaluations = Evaluations(None, length)
        self._feeds = Feeds(self._say)
        self._run, self._counters = Run(self._feeds), Counters()
        self._reports = Reports(schedule)
        self._saving = Saving(store, mode, limits.max_failures)
        self._signals = Signals()
        self._watch = Watch(self._signals, store, limits.poll_s, limits.deadline_s)
        self._listeners = list(listeners)
        self._on_step = [each.on_step for each in listeners if type(each).on_step is not Listener.on_step]
        self._counts_parameters = any(
            isinstance(part, Milestones) and part.of == "params" for part in parts_of(schedule or AnyOf(()))
        )
        self._guard: Guard | None = None
        self._hyperparameters: dict[str, Any] = {}
        self._modes: dict[str, Literal["min", "max"]] = {}
        self._resumed: Resumed | None = None
        self._closed = False
        # A batch was handed out, and the step that it is for is not done.
        self._window_open = False
        # Batches come from here, so that there is a next one to wait for with what is due.
        self._reading = False
        # A step is done, or an epoch, and nobody has asked the schedule yet.
        self._undecided = False
        # Steps and epochs of what is saved, or is being saved; None where a save has failed since.
        self._saved_at: tuple[int, int] | None = (0, 0)
        self._steps_seen = 0
        # Why the state is to be saved at the next boundary, beside what the schedule says there.
        self._carried: list[str] = []
        # The guard has found that training has diverged.
        self._astray = False
        # The random state when the batches of the running epoch were used up, until the epoch ends.
        self._pass_end: dict[str, Any] | None = None

    # -- looking -----------------------------------------------------------------------------------------

    @property
    def progress(self) -> Progress:
        """How far the run has come."""
        counters = self._counters
        return Progress(
            counters.step,
            counters.epoch,
            counters.tokens,
            parts.trainable(self.state) if self._counts_parameters else 0,
            counters.elapsed_s,
            self._decisions.reported,
            self._costs(),
            self._feeds.batch,
        )

    @property
    def extra(self) -> dict[str, Any]:
        """Plain values of the user's, saved with each checkpoint and brought back."""
        return self._run.extra

    @property
    def best(self) -> Mapping[str, float]:
        """Of each metric that was reported, the best value so far."""
        return self._reports.best

    def stats(self) -> Stats:
        """What saving has cost so far, in this process."""
        return replace(self._saving.stats, elapsed_s=self._counters.elapsed_here_s)

    def _costs(self) -> Costs | None:
        saving, counters = self._saving, self._counters
        if saving.costs is None or not counters.steps_here:
            return None
        return replace(saving.costs, step_s=(counters.elapsed_here_s - saving.stats.stall_s) / counters.steps_here)

    # -- between two steps -------------------------------------------------------------------------------

    def _require_resumed(self) -> None:
        if self._closed:
            raise StateError("the Checkpointer is closed; make another one for another run", path="")
        if self._resumed is None:
            raise StateError(
                "call resume() before the first step: it goes on from the newest checkpoint, or begins where there is "
                "none; resume(False) insists on a fresh start",
                path="",
            )

    def _see(self, step: int, values: Mapping[str, Any]) -> None:
        """Look whether training has gone astray, by what was measured of the state after ``step`` steps.

        Raises:
            DivergedError: it has.
        """
        found = self._guard.see(step, values) if self._guard is not None else None
        if found is not None:
            self._end_astray(found)

    def _end_astray(self, found: Divergence) -> NoReturn:
        # What is wrong is not worth a checkpoint; the last good one may still be on its way.
        self._astray = True
        with suppress(CheckpointError):
            self._settle()
        self._tell("on_diverged", found)
        raise error_of(found, self.store)

    def _is_changing(self) -> bool:
        """Whether an optimizer has begun a step that is not counted yet."""
        return steps_begun() != self._steps_seen

    def _boundary(self) -> None:
        """Nothing changes the state meanwhile."""
        self._collect()
        if reasons := self._pending():
            self._save_or_skip(reasons)
        self._mind_signals()

    def _linger(self) -> None:
        """As at a boundary, where what is due waits for the next one."""
        self._collect()
        self._mind_signals()

    def _save_or_skip(self, reasons: Sequence[str]) -> None:
        if self._skips and self._saving.busy():
            self._say(
                f"step {self._counters.step} is not saved ({', '.join(reasons)}): the save before is still running"
            )
            self._saving.stats = replace(self._saving.stats, skipped=self._saving.stats.skipped + 1)
        else:
            self._save(reasons)

    def _pending(self, *, last: bool = False) -> list[str]:
        """Why the state is due, where nobody has asked since the last step; at the ``last`` one also what failed."""
        asks = self._undecided or (last and self._decisions.is_stuck)
        due = self._decisions.due(self.progress, last=last) if asks and not self._astray else []
        self._undecided = False
        if self._carried:
            due = list(dict.fromkeys([*self._carried, *due]))
            self._carried = []
        return due

    def _decide(self) -> None:
        if reasons := self._decisions.due(self.progress):
            self._save_or_skip(reasons)

    def _collect(self, *, wait: bool = False) -> None:
        """Tell what came of the save that was under way.

        Raises:
            SaveFailedError: it failed, as too many before it.
        """
        with self._pending_again():
            outcome = self._saving.collect(wait=wait)
        if isinstance(outcome, Saved):
            self._saved(outcome)
        elif outcome is not None:
            self._failed(outcome)
            if outcome.fatal:
                raise outcome.error
            warnings.warn(f"{outcome}; training goes on, and it is tried again", RuntimeWarning, stacklevel=4)

    def _settle(self) -> Failed | None:
        """Wait for the save under way, before another one that makes up for it; what came of it, where it failed."""
        with self._pending_again():
            outcome = self._saving.collect(wait=True)
        if isinstance(outcome, Saved):
            self._saved(outcome)
            return None
        if outcome is not None:
            self._failed(outcome)
            self._say(str(outcome))
        return outcome

    def _saved(self, saved: Saved) -> None:
        self._decisions.succeeded()
        self._say(str(saved))
        self._tell("on_saved", saved)
        if saved.best:
            self._tell("on_best", saved)

    def _failed(self, failed: Failed) -> None:
        self._decisions.failed()
        self._saved_at = None
        if failed.fatal:
            failed.error.add_note(f"{failed.failures} saves in a row have failed, and max_failures={failed.failures}")
        self._tell("on_failed", failed)

    @contextmanager
    def _pending_again(self) -> Iterator[None]:
        """After an error that ends training, what was to be saved doesn't count as saved: somebody may mend it."""
        try:
            yield
        except CheckpointError:
            self._decisions.failed()
            self._saved_at = None
            raise

    def _save(self, reasons: Sequence[str], *, durable: Durable | None = None) -> SaveHandle | None:
        """Save behind the next step."""
        self._collect(wait=True)
        state, facts = self._prepared(reasons)
        with self._pending_again():
            self._announce("begin", facts)
            handle = self._saving.begin(state, facts, durable=durable)
        if handle is None:
            self._collect()
        return handle

    def _save_now(self, reasons: Sequence[str], *, durable: Durable | None = None) -> None:
        """Save, and wait until it is durable.

        Raises:
            SaveFailedError, CommitUnknownError: it is not.
        """
        self._collect(wait=True)
        state, facts = self._prepared(reasons)
        with self._pending_again():
            self._announce("run", facts)
            outcome = self._saving.run(state, facts, durable=durable)
        if isinstance(outcome, Failed):
            self._failed(outcome)
            raise outcome.error
        self._saved(outcome)

    def _prepared(self, reasons: Sequence[str]) -> tuple[dict[str, Any], Facts]:
        """The state and what is said of it; from here on it counts as saved."""
        now = self.progress
        metrics = {**self._reports.values(), **self._decisions.reported}
        known = {
            "progress": progress_fields(now),
            "past": past_fields(self._decisions.after(now, reasons)),
            "best": dict(self._reports.best),
        }
        facts = Facts(
            step=now.step,
            epoch=now.epoch,
            metrics=metrics,
            modes={name: mode for name, mode in self._modes.items() if name in metrics},
            reasons=list(dict.fromkeys(reasons)),
        )
        self._decisions.began(now, reasons)
        self._saved_at = (now.step, now.epoch)
        return self._state_with(known), facts

    def _state_with(self, known: dict[str, Any]) -> dict[str, Any]:
        """All that is saved, with what is ``known`` of the run."""
        self._run.facts = {
            **known,
            "hyperparameters": self._hyperparameters,
            "guard": self._guard.watch.state_dict() if self._guard is not None else {},
        }
        # Before the first step nobody knows who reads them, and they stand at their beginning.
        sources = parts.unread(self.state, self._feeds.names) if self._counters.step and self._include.data else {}
        return {**parts.chosen(self.state, self._include), **sources, PART: self._run}

    def _announce(self, how: Literal["begin", "run"], facts: Facts) -> None:
        """The state is saved next; for other ranks, where there are some."""

    # -- signals -----------------------------------------------------------------------------------------

    def _mind_signals(self) -> None:
        signals = self._signals
        if signals.save is not None:
            why, signals.save = signals.save, None
            self._save([why])
        if signals.stop is not None:
            self._stop(signals.stop)

    def _stop(self, signum: int) -> NoReturn:
        """Save durably what isn't saved yet, and end the process."""
        why = name_of(signum)
        self._say(f"{why}: saving step {self._counters.step}, then the run ends")
        try:
            self._settle()
            if self._is_unsaved():
                self._save_now([*self._pending(last=True), why])
        except CheckpointError as error:
            _log.error("the run ends by %s without a last checkpoint: %s", name_of(signum), error)
        raise SystemExit(exit_code(signum))

    def _is_unsaved(self) -> bool:
        """Whether something has happened since the last save, or since the run was resumed, that is worth a save."""
        if self._astray:
            return False
        here = (self._counters.step, self._counters.epoch)
        return self._undecided or here != self._saved_at or bool(self._decisions.reported)

    def check(self) -> None:
        """Mind signals now, as in the midst of a long evaluation.

        Raises:
            SystemExit: one came, and the state is saved.
        """
        if self._signals.stop is not None and not (self._is_changing() or self._window_open):
            if self._pass_end is not None:
                # The evaluation will be made again, from where it began.
                RNG().load_state_dict(self._pass_end)
            self._stop(self._signals.stop)

    # -- the end -----------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        try:
            self._end(final=False, broken=True)
        except CheckpointError as failed:
            # What happened inside the block is the cause that its reader looks for.
            error.add_note(f"besides, saving failed: {failed}")

    def close(self) -> None:
        """Wait for the save in the background, save the end of the run, and give back signals and the store.

        Safe to call twice.

        Raises:
            SaveFailedError, CommitUnknownError, StaleWriterError: the end was not saved.
            SystemExit: a signal came meanwhile.
        """
        if not self._closed:
            self._end(final=self._final)
            if self._signals.stop is not None:
                raise SystemExit(exit_code(self._signals.stop))

    def _end(self, *, final: bool, broken: bool = False) -> None:
        if self._closed:
            return
        try:
            if self._resumed is not None:
                self._save_the_end(final=final, broken=broken)
        finally:
            self._closed = True
            self._signals.restore()
            self._watch.end()
            stats = replace(self.stats(), kept_bytes=self._kept_bytes())
            try:
                if self._own_store:
                    self.store.close()
            finally:
                if self._resumed is not None:
                    self._say(str(stats))
                self._tell("on_closed", stats)

    def _kept_bytes(self) -> int | None:
        try:
            # Not ``checkpoints``: the end is no time to be warned of damage.
            return sum(c.stored_bytes - c.borrowed_bytes for c in self.store.catalogue().checkpoints)
        except CheckpointError:
            return None

    def _save_the_end(self, *, final: bool, broken: bool) -> None:
        failed = self._settle()
        if broken and self._pass_end is not None:
            # In the midst of an evaluation: it will be made again, from where it began.
            RNG().load_state_dict(self._pass_end)
        is_still = not (self._is_changing() or self._window_open)
        unsaved = self._is_unsaved()
        reasons = self._pending(last=True) if is_still else []
        if final and not reasons and unsaved:
            reasons = [FINAL]
        if reasons:
            self._save_now(reasons)
        elif failed is not None:
            raise failed.error

    # -- telling -----------------------------------------------------------------------------------------

    def _say(self, sentence: str) -> None:
        if _log.isEnabledFor(logging.INFO) and _log.hasHandlers():
            _log.info("%s", sentence)
        elif self._verbose:
            print(f"{time.strftime('%H:%M:%S')} ckptstore: {sentence}", file=sys.stderr)

    def _tell(self, what: str, event: Any) -> None:
        for listener in self._listeners:
            getattr(listener, what)(event)
