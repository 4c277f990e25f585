"""``Checkpointer``: the few lines that make a plain training loop survive crashes and go on exactly."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias, TypeVar

import torch

from ckptstore import config as configs
from ckptstore.config.settings import Config, Parts
from ckptstore.engine.background import SaveHandle
from ckptstore.engine.catalogue import Checkpoint
from ckptstore.engine.saver import Durable
from ckptstore.errors import FormatError, NoCheckpointError, StateError
from ckptstore.opening import Place
from ckptstore.opening import open as open_store
from ckptstore.policy.guard import Diverged
from ckptstore.policy.progress import Length
from ckptstore.policy.schedule import Schedule
from ckptstore.policy.text import parse_schedule
from ckptstore.state import capture, fence
from ckptstore.state.rng import RNG
from ckptstore.state.staging import steps_begun
from ckptstore.store import SaveMode, Store
from ckptstore.trainer import parts, prepared, resuming
from ckptstore.trainer.boundary import Boundary, Limits
from ckptstore.trainer.decisions import Evaluations, past_of
from ckptstore.trainer.events import Failed, Hooks, Listener, Resumed, Saved
from ckptstore.trainer.guarding import Guard
from ckptstore.trainer.run import PART
from ckptstore.units import duration_s

T = TypeVar("T")

State: TypeAlias = Mapping[str, Any]


class Checkpointer(Boundary):
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
            deadline: how long after a signal the process ends in any case, saved or not; None waits.
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
        _check_rank()
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

    _config: Config | None = None

    # -- beginning ---------------------------------------------------------------------------------------

    def resume(
        self,
        select: bool | str | os.PathLike[str] | None = None,
        *,
        restore: Parts | None = None,
        check: bool = False,
        new_line: bool = False,
    ) -> Resumed:
        """Go on where a checkpoint was made, or begin; to be called once, before the first step.

        Args:
            select: True, the default: the newest good checkpoint, or a fresh start where there is none. False: a fresh
                start. A selector, as ``"best:val_loss"``: that one. A path or URL of another store, or of the folder of
                a checkpoint in one: from there.
            restore: which of optimizer, scheduler, random state and position in the data are brought back; all else
                keeps the value that it has.
            check: prove afterwards that everything is as it was saved, bit for bit.
            new_line: begin anew, or from another store, although this one has checkpoints.

        Raises:
            ExistsError: a fresh start, or another store's checkpoint, where this one has some.
            NotFoundError: no such checkpoint.
            StateError: the checkpoint doesn't fit the state; nothing was changed.
            IntegrityError: all checkpoints are damaged, or ``check`` found what differs.
        """
        if self._resumed is not None or self._closed:
            raise StateError("resume() was called already: make another Checkpointer for another run", path="")
        config = self._config
        select = select if select is not None else (config.resume if config is not None else True)
        restore = restore or (config.restore if config is not None else Parts())
        if self._minds_signals:
            self._signals.install(with_deadline=self._watch.has_deadline)
        # From here on: loading may take longer than a deadline allows.
        self._watch.start()
        try:
            with ExitStack() as stack:
                source = resuming.Source.of(self.store, select, stack)
                if not new_line and (source is None or source.store is not self.store):
                    resuming.refuse_fresh(self.store, f"resume({select!r}) would begin anew")
                self._resumed = self._begin(source, select is True, restore, check)
        except BaseException:
            self._signals.restore()
            self._watch.end()
            raise
        self._began(self._resumed)
        return self._resumed

    def _begin(self, source: resuming.Source | None, may_be_fresh: bool, restore: Parts, check: bool) -> Resumed:
        if source is not None:
            try:
                return self._load(source, restore, check)
            except NoCheckpointError:
                if not may_be_fresh:
                    raise
        if self._build is not None:
            self.state = parts.check_state(self._build({}))
        self._register()
        return Resumed(None, self.store.url)

    def _load(self, source: resuming.Source, restore: Parts, check: bool) -> Resumed:
        before: dict[str, Any] = {}
        if self._build is not None:
            build = self._build

            def built(extra: Mapping[str, Any]) -> dict[str, Any]:
                self.state = parts.check_state(build(extra))
                before.update(resuming.options_of(self.state))
                return resuming.target(self.state, self._run, restore)

            loaded = source.load_built(built)
        else:
            before.update(resuming.options_of(self.state))
            loaded = source.load(resuming.target(self.state, self._run, restore))
        self._register()
        checkpoint = loaded.checkpoint
        after = resuming.options_of(self.state)
        notes = resuming.differences(after, before, "the saved value is used") if restore.optimizer else []
        notes += self._go_on(source, loaded.checkpoint, restore)
        if check:
            self._feeds.check(strict=True)
            wanted = resuming.target(self.state, self._run, restore)
            if not (restore.rng and restore.data):
                del wanted[PART]
            resuming.prove(source.store, checkpoint, wanted, loaded.missing)
        left = resuming.left_out(self.state, restore)
        # A source that is read by way of the run stands there, not by itself.
        kept = [name for name in loaded.missing if parts.kind_of(name, self.state.get(name)) != "data"]
        return Resumed(checkpoint, source.store.url, kept, resuming.unused(loaded, left), notes)

    def _go_on(self, source: resuming.Source, checkpoint: Checkpoint, restore: Parts) -> list[str]:
        """Put counters, memory, random state and positions in place; what differs."""
        if self._run.loaded is None:
            # It was saved by hand: what its record says is all that is known.
            self._counters.go_on(checkpoint.step, checkpoint.epoch or 0, 0, 0.0)
            line = [c for c in source.store.checkpoints() if c.order <= checkpoint.order]
            self._decisions.resume_after(self.progress, line)
            return []
        self._run.restore(rng=restore.rng, data=restore.data)
        facts = self._run.facts
        saved = facts["progress"]
        self._counters.go_on(saved["step"], saved["epoch"], saved["tokens"], saved["elapsed_s"])
        self._decisions.resume(past_of(facts.get("past", {}), self.progress))
        self._reports.best.update(facts.get("best", {}))
        if self._guard is not None and facts.get("guard"):
            self._guard.watch.load_state_dict(facts["guard"])
        given, here = facts.get("hyperparameters", {}), self._hyperparameters
        return resuming.differences(given, here, "the value here is used") + resuming.only_one_has(given, here)

    def _register(self) -> None:
        # Before the training step is compiled: a hook that comes later makes the compiler start again.
        fence(*parts.optimizers(self.state))

    def _began(self, resumed: Resumed) -> None:
        self._steps_seen = steps_begun()
        if resumed:
            counters = self._counters
            self._saved_at = (counters.step, counters.epoch) if resumed.url == self.store.url else None
            self._evaluations.resume(self.progress)
        self._say(str(resumed))
        for name in resumed.kept:
            what = "random state and position in the data" if name == PART else repr(name)
            warnings.warn(f"the checkpoint has no {what}: it keeps the value that it has", UserWarning, stacklevel=3)
        for what in resumed.unused:
            warnings.warn(f"the checkpoint has {what!r}, which nothing here takes", UserWarning, stacklevel=3)
        for sentence in resumed.differences:
            warnings.warn(sentence, UserWarning, stacklevel=3)
        self._tell("on_resumed", resumed)
        if not resumed:
            # The state before any update.
            self._decide()

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
            self._collect()
            self._mind_signals()

    def step(self, loss: Any = None, *, tokens: int = 0, **metrics: Any) -> None:
        """An optimizer step is done: count, and save where that is due.

        Args:
            loss: of this step; a tensor is read only when a checkpoint is saved.
            tokens: that it learnt from.
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
            self._decisions.reported.update(self._reports.latest(metrics))
        for listener in self._on_step:
            listener(counters.step)
        self._undecided = True
        if not self._reading:
            self._boundary()

    def report(self, **metrics: Any) -> None:
        """Add metrics of the state as it is now, as of an evaluation, to what the next save records.

        Raises:
            StateError: one is no number.
        """
        self._require_resumed()
        if self._guard is not None:
            self._see(self._counters.step, metrics)
        self._decisions.reported.update(self._reports.add(metrics, self._modes))
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
        reasons = [*self._pending(), reason]
        if wait:
            self._save_now(reasons, durable=durable)
            return None
        return self._save(reasons, durable=durable)


def _check_rank() -> None:
    ranks = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not ranks or torch.distributed.get_world_size() == 1:
        return
    if torch.distributed.get_rank() > 0:
        raise StateError(
            f"this is rank {torch.distributed.get_rank()}: a Checkpointer saves what one process has; make it on "
            "rank 0 only, where the replicas of all ranks are the same",
            path="",
        )
    warnings.warn("only rank 0 saves: random state and position in the data are those of rank 0", stacklevel=3)


def _schedule(given: object) -> Schedule | None:
    if given is None or isinstance(given, Schedule):
        return given
    return parse_schedule(given)
