"""``Checkpointer``: the few lines that make a plain training loop survive crashes and go on exactly."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias, TypeVar

from ckptstore import config as configs
from ckptstore.config.settings import Config, Parts
from ckptstore.engine.background import SaveHandle
from ckptstore.engine.saver import Durable
from ckptstore.errors import FormatError
from ckptstore.opening import Place
from ckptstore.opening import open as open_store
from ckptstore.policy.guard import Diverged
from ckptstore.policy.progress import Length
from ckptstore.policy.schedule import Schedule
from ckptstore.policy.text import parse_schedule
from ckptstore.state import capture
from ckptstore.state.rng import RNG
from ckptstore.state.staging import steps_begun
from ckptstore.store import SaveMode, Store
from ckptstore.trainer import parts, prepared
from ckptstore.trainer.beginning import Beginning
from ckptstore.trainer.boundary import Limits
from ckptstore.trainer.decisions import Evaluations
from ckptstore.trainer.events import Failed, Hooks, Listener, Resumed, Saved
from ckptstore.trainer.guarding import Guard
from ckptstore.units import duration_s

T = TypeVar("T")

State: TypeAlias = Mapping[str, Any]


class Checkpointer(Beginning):
    """Saves what a training loop has, when it is due, and brings it back.

    ::

        with Checkpointer("runs/gpt2", {"model": model, "optimizer": optimizer}, save=every(steps=250)) as ckpt:
            ckpt.resume()
            for epoch in ckpt.epochs(3):
                for batch in ckpt.batches(loader):
                    ckpt.step(loss=train_step(batch))

    Whoever owns the loop calls ``resume``, ``step``, ``end_epoch`` and ``save``, and leaves ``epochs`` and ``batches``
    out. What is due at a step is saved before the next batch is fetched, so that it has the metrics which are reported
    in between; without ``batches`` it is saved in ``step``.

    Under ``torch.distributed`` all ranks do the same, and save and resume together, on any number of ranks. Rank 0 says
    what is saved and when: its clock, its metrics and its view of failures count, and only it prints, warns and tells
    listeners. A signal to any rank, or a request, is minded by all at one step, that much ahead that no step waits for
    messages. Random state and positions in the data are each rank's own.

    Attributes:
        store: where it saves.
        state: what it saves, by name; entries may be replaced while the run goes on.
        extra: plain values of the user's, saved and brought back as they are.
    """

    def __init__(
        self,
        store: Store | Place,
        state: State | Callable[[Mapping[str, Any]], State],
        *,
        save: Schedule | str | None = None,
        evaluate: Schedule | str | None = None,
        length: Length | None = None,
        include: Parts = Parts(),  # noqa: B008 - a value that never changes
        hyperparameters: Mapping[str, Any] | None = None,
        modes: Mapping[str, Literal["min", "max"]] | None = None,
        mode: SaveMode = "overlapped",
        when_busy: Literal["wait", "skip"] = "wait",
        final: bool = True,
        stop_on: Diverged | None = None,
        max_failures: int = 3,
        retry: float | str = "1m",
        signals: bool = True,
        deadline: float | str | None = None,
        poll: float | str | None = "10s",
        listeners: Sequence[Listener] = (),
        on_saved: Callable[[Saved], object] | None = None,
        on_best: Callable[[Saved], object] | None = None,
        on_failed: Callable[[Failed], object] | None = None,
        on_resumed: Callable[[Resumed], object] | None = None,
        verbose: bool = True,
        **options: Any,
    ) -> None:
        """Nothing is read or written before ``resume``.

        Args:
            store: an open store, which stays open, or where to open one.
            state: by name, all that makes the run: model, optimizer, scheduler, scaler, averaged weights, and the
                loader under "data". Or a function that builds it from ``extra`` as a checkpoint has it (empty for a
                fresh start), for models that grow.
            save: when to save, as ``every(steps=250) | on_best("val_loss")``; besides the end, and on request.
            evaluate: when ``due("eval")`` says so.
            length: how long the run is, where the schedule needs to know.
            include: which of optimizer, scheduler, random state and position in the data are saved.
            hyperparameters: plain values that are saved, and compared when the run is resumed.
            modes: for metrics whose name doesn't tell, whether "min" or "max" is best.
            mode: how to save, as for ``Store.save``.
            when_busy: what to do with a save that is due while one is running: "wait" for its end, or "skip" it.
            final: whether the end of the run is saved in any case.
            stop_on: when to take training for lost, as ``diverged("loss")``: it ends with a ``DivergedError``, which
                names the last good checkpoint.
            max_failures: after so many failed saves in a row the run ends with the last one's error.
            retry: how long after a failed save what is still asked for is tried again.
            signals: whether SIGTERM, SIGINT and SIGUSR1 are minded, from ``resume`` to ``close``.
            deadline: how long after a signal the process ends in any case, saved or not; None waits. Under several
                ranks all of them end.
            poll: how often to look for requests by ``ckptstore signal``; None never does.
            listeners: told what happens.
            on_saved, on_best, on_failed, on_resumed: single functions that are told.
            verbose: print a line for each save to stderr, where logging isn't set up to show it.
            options: for ``ckptstore.open``, where ``store`` is a place: ``keep``, ``backup``, ``compression``, …

        Raises:
            FormatError: a schedule or a setting that can't be.
            StateError: a state that can't be.
            StorageError: the store can't be opened.
        """
        schedule, evaluating, length = _schedule(save), _schedule(evaluate), length or Length()
        for each in (schedule, evaluating):
            if each is not None:
                each.check(length)
        if when_busy not in ("wait", "skip"):
            raise FormatError(f"when_busy={when_busy!r} must be 'wait' or 'skip'")
        if type(max_failures) is not int or max_failures < 1:
            raise FormatError(f"max_failures={max_failures!r} must be a whole number of at least 1")
        if isinstance(store, Store) and options:
            raise FormatError(f"{', '.join(options)}: the store is open already; give its place instead")
        limits = Limits(
            max_failures,
            duration_s(retry, "retry"),
            None if deadline is None else duration_s(deadline, "deadline"),
            None if poll is None else duration_s(poll, "poll"),
        )
        hooks = Hooks(on_saved=on_saved, on_best=on_best, on_failed=on_failed, on_resumed=on_resumed)
        self._build = state if callable(state) else None
        given = {} if callable(state) else parts.check_state(state)
        opened = store if isinstance(store, Store) else open_store(store, **options)
        super().__init__(opened, given, schedule, length, mode, limits, [*listeners, hooks])
        self._own_store = opened is not store
        self._evaluations = Evaluations(evaluating, length)
        self._include = self._run.include = include
        self._guard = Guard(stop_on) if stop_on is not None else None
        self._skips = when_busy == "skip"
        self._final, self._verbose, self._minds_signals = final, verbose, signals
        # What can't be stored is said now, not at the first save.
        capture(dict(hyperparameters or {}))
        self._hyperparameters, self._modes = dict(hyperparameters or {}), dict(modes or {})

    @classmethod
    def from_config(
        cls, config: Config | str | os.PathLike[str], state: State | Callable[[Mapping[str, Any]], State], **more: Any
    ) -> Self:
        """As a config says, or the file that holds one; ``more`` is what no config has.

        ``resume`` goes by its ``resume`` and ``restore``, where it isn't told otherwise.

        Raises:
            FormatError, NotFoundError: as ``ckptstore.config.load``.
        """
        if not isinstance(config, Config):
            config = configs.load(Path(config))
        made = cls(
            config.open(),
            state,
            save=config.save,
            evaluate=config.evaluate,
            length=config.run.length(),
            include=config.save_parts,
            final=config.final,
            **more,
        )
        made._own_store, made._config = True, config
        return made

    # -- the loop ----------------------------------------------------------------------------------------

    def epochs(self, count: int | None = None) -> Iterator[int]:
        """The numbers of the epochs that are left of ``count``, from 0; each one ends when the next is asked for.

        Raises:
            FormatError: nobody says how many, or ``length`` says otherwise.
        """
        self._require_resumed()
        known = self._decisions.length.epochs
        if count is None:
            count = known
        if type(count) is not int or count < 0 or (known is not None and count != known):
            raise FormatError(
                f"epochs({count!r}): give how many, as epochs(3)" + (f"; length says {known}" if known else "")
            )
        while self._counters.epoch < count:
            yield self._counters.epoch
            self.end_epoch()

    def batches(self, source: Iterable[T], name: str | None = None) -> Iterator[T]:
        """The batches of ``source`` that are left in this epoch.

        Args:
            source: a ``DataLoader``, or anything else that can be iterated.
            name: of its position in the checkpoint; only needed where a run reads several that aren't in the state.
        """
        self._require_resumed()
        if not self._window_open:
            self._boundary()
        known = (key for key, value in parts.sources(self.state).items() if value is source)
        self._pass_end = None
        loader = prepared.loader_of(source)
        batches = self._feeds.batches(loader, name or next(known, "data"), between=self._between)
        if loader is not source:
            batches = prepared.dressed(source, batches, self._feeds.is_last, self._counters.epoch)
        try:
            for batch in batches:
                self._reading = self._window_open = True
                yield batch
        finally:
            self._reading = False

    def _between(self, last: bool) -> None:
        """Before a batch is fetched; ``last``: there is none."""
        if self._window_open and not last:
            # Gradients are being accumulated.
            return
        if not last:
            self._boundary()
            return
        self._pass_end = RNG().state_dict()
        if not self._window_open:
            # What is due waits for the epoch's end: one checkpoint for both, with the metrics of the evaluation.
            self._linger()

    def step(self, loss: Any = None, *, tokens: int = 0, **metrics: Any) -> None:
        """An optimizer step is done: count, and save where that is due.

        Args:
            loss: of this step; a tensor is read only when a checkpoint is saved.
            tokens: that it learnt from; under several ranks those of all together, the same number on each.
            metrics: further values of this step, as ``loss``.

        Raises:
            SaveFailedError: too many saves have failed.
            StaleWriterError: a newer run owns the store.
            DivergedError: as ``stop_on`` says.
            SystemExit: a signal came, and the state is saved.
        """
        if self._resumed is None or self._closed:
            self._require_resumed()
        counters = self._counters
        counters.step += 1
        counters.steps_here += 1
        counters.tokens += tokens
        self._feeds.stepped()
        self._window_open = False
        self._steps_seen = steps_begun()
        if loss is not None:
            metrics["loss"] = loss
        if metrics:
            if self._guard is not None:
                # A loss is measured before the update that it leads to.
                self._see(counters.step - 1, metrics)
            if watched := self._reports.latest(metrics):
                self._decisions.reported.update(watched)
                self._news = True
        for listener in self._on_step:
            listener(counters.step)
        self._undecided = True
        if not self._reading:
            self._boundary()

    def report(self, **metrics: Any) -> None:
        """Add metrics of the state as it is now, as of an evaluation, to what the next save records.

        Of several ranks rank 0's values count; where ``save`` goes by one of them, all must report it.

        Raises:
            StateError: one is no number.
        """
        self._require_resumed()
        if self._guard is not None:
            self._see(self._counters.step, metrics)
        self._decisions.reported.update(self._reports.add(metrics, self._modes))
        self._news |= self._reports.watches(metrics)
        if not (self._undecided or self._window_open or self._is_changing()):
            self._decide()

    def due(self, what: Literal["eval"]) -> bool:
        """Whether ``evaluate`` says that it is time; asked after ``step``, True once for each time.

        Raises:
            FormatError: there is no such thing.
        """
        if what != "eval":
            raise FormatError(f"due({what!r}): only due('eval') can be asked; what is to be saved, step() saves")
        now = self.progress
        return self._evaluations.due(replace(now, epoch=now.epoch + (self._pass_end is not None)))

    def end_epoch(self) -> None:
        """An epoch is over; ``epochs`` calls it by itself."""
        self._require_resumed()
        self._counters.epoch += 1
        self._feeds.end_epoch()
        self._pass_end = None
        self._window_open = False
        self._undecided = True
        self._boundary()

    def save(self, reason: str = "by hand", *, wait: bool = False, durable: Durable | None = None) -> SaveHandle | None:
        """Save the state as it is now; to be called after a step, not in the midst of one.

        Args:
            reason: why.
            wait: until it is durable.
            durable: as for ``Store.save``.

        Returns:
            The save in the background; None where it is done.

        Raises:
            SaveFailedError: too many saves have failed, this one included where it was waited for.
        """
        self._require_resumed()
        return self._meet(lambda: self._by_hand(reason, wait, durable), durable=durable)

    def _by_hand(self, reason: str, wait: bool, durable: Durable | None) -> SaveHandle | None:
        reasons = [*self._pending(), reason]
        if wait:
            self._save_now(reasons, durable=durable)
            return None
        return self._save(reasons, durable=durable)


def _schedule(given: object) -> Schedule | None:
    if given is None or isinstance(given, Schedule):
        return given
    return parse_schedule(given)
