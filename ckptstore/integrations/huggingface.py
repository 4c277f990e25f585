"""Hugging Face ``Trainer``: it saves through a store, and goes on exactly. Needs ckptstore[huggingface]."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

import torch
from torch.utils.data import DataLoader, IterableDataset

from ckptstore.config.settings import Parts
from ckptstore.engine.catalogue import Checkpoint
from ckptstore.engine.damage import FallbackWarning
from ckptstore.errors import FormatError, IntegrityError, NoCheckpointError, NotFoundError, StateError
from ckptstore.opening import Place
from ckptstore.opening import open as open_store
from ckptstore.policy.events import on_best
from ckptstore.policy.progress import Length
from ckptstore.policy.retention import Keep
from ckptstore.policy.rules import best, last
from ckptstore.policy.schedule import Schedule
from ckptstore.policy.text import parse_schedule
from ckptstore.state.rng import RNG
from ckptstore.store import Store
from ckptstore.trainer.checkpointer import Checkpointer
from ckptstore.trainer.events import Resumed
from ckptstore.trainer.resuming import Source
from ckptstore.view import View

try:
    from transformers.trainer_callback import ExportableState, TrainerCallback, TrainerControl, TrainerState
except ImportError as missing:
    raise ImportError(
        "the callback for the Hugging Face Trainer needs transformers and accelerate: "
        "pip install 'ckptstore[huggingface]'"
    ) from missing

PART = "huggingface"
"""The entry of each checkpoint that holds what the Trainer itself knows."""
ASKED = "the Trainer's save_strategy"

_BY_TRAINER = {"store", "state", "evaluate", "length"}
_OPTIONS = set(inspect.signature(Checkpointer.__init__).parameters) - {"self", "save", "options"} - _BY_TRAINER
_OPENING = set(inspect.signature(open_store).parameters) - {"url", "read_only", "keep"}
_END = object()

Select: TypeAlias = "bool | str | os.PathLike[str]"
Start: TypeAlias = "tuple[View, Checkpoint] | None"


class _DamagedError(Exception):
    """The checkpoint to go on from can't be read."""

    def __init__(self, error: FormatError | IntegrityError) -> None:
        self.error = error


class CkptStoreCallback(TrainerCallback):  # type: ignore[misc]
    """Saves what a ``transformers.Trainer`` has into a store, when it is due, and brings it back.

    ::

        saving = CkptStoreCallback("runs/gpt2", save=every(steps=250), keep=last(5))
        trainer = Trainer(model, args, train_dataset=data, callbacks=[saving])
        saving.train(trainer)

    ``saving.train(trainer)`` stands where ``trainer.train()`` did: it goes on from the newest good checkpoint, or
    begins where there is none. A callback isn't told of its Trainer, and a Trainer reads where it goes on from its own
    folders before it asks any callback: hence this call. It works with every subclass of Trainer.

    Saved are model, optimizer, scheduler, scaler, random state, ``TrainerState`` with the states of other callbacks,
    and the position in the data. A step is over when it was evaluated: what is due then is saved with its metrics, and
    signals are minded after it. While it trains, Trainer itself writes no checkpoint: ``save`` says when, and without
    it ``save_strategy`` of the arguments does, or a callback by ``control.should_save``. With
    ``load_best_model_at_end`` each new best is saved, kept, and loaded at the end.

    Attributes:
        checkpointer: of the training that runs, or ran last; None before it.
    """

    def __init__(
        self, store: Store | Place, *, save: Schedule | str | None = None, keep: Keep | None = None, **options: Any
    ) -> None:
        """Nothing is read or written before ``train``.

        Args:
            store: an open store, which stays open, or where to open one.
            save: when to save, as ``at(0, 10, 30, "2000-10000/1000") | every(epochs=1)``; None: as Trainer's arguments
                say. Besides the end, and on request.
            keep: which checkpoints stay; None: the last ``save_total_limit`` and the best, or all.
            options: all others of ``Checkpointer`` (but state, evaluate and length, which the Trainer has) and, where
                ``store`` is a place, of ``ckptstore.open``: ``mode``, ``max_failures``, ``backup``, ``on_saved``, …

        Raises:
            FormatError: a schedule or an option that can't be.
        """
        own = {name: value for name, value in options.items() if name in _OPTIONS}
        opening = {name: value for name, value in options.items() if name not in own}
        if unknown := opening.keys() - _OPENING:
            why = "the Trainer says so" if unknown <= _BY_TRAINER else f"known: {', '.join(sorted(_OPTIONS | _OPENING))}"
            raise FormatError(f"{', '.join(sorted(unknown))}: no option of CkptStoreCallback; {why}")
        if isinstance(store, Store) and (opening or keep is not None):
            given = [*opening, *(["keep"] if keep is not None else [])]
            raise FormatError(f"{', '.join(given)}: the store is open already; give its place instead")
        self.checkpointer: Checkpointer | None = None
        self._save = parse_schedule(save) if isinstance(save, str) else save
        self._store, self._keep, self._options, self._opening = store, keep, own, opening
        self._training: _Training | None = None

    def train(
        self,
        trainer: Any,
        select: Select | None = None,
        *,
        restore: Parts | None = None,
        check: bool = False,
        new_line: bool = False,
        **arguments: Any,
    ) -> Any:
        """Train from where a checkpoint was made, or from the beginning.

        A run that another callback has stopped early stays so, unless ``select`` names a checkpoint.

        Args:
            trainer: a ``transformers.Trainer``; this callback is added where it isn't among its own.
            select, restore, check, new_line: as for ``Checkpointer.resume``.
            arguments: others of ``Trainer.train``.

        Returns:
            What ``Trainer.train`` does.

        Raises:
            FormatError: a Trainer that is set up for what can't be.
            SaveFailedError: too many saves have failed.
            SystemExit: a signal came, and the state is saved.
            ExistsError, NotFoundError, StateError, IntegrityError: as ``Checkpointer.resume``.
        """
        _check_trainer(trainer, arguments)
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        resume = {"restore": restore, "check": check, "new_line": new_line}
        with ExitStack() as stack:
            store = self._opened(trainer.args, stack)
            starts = _starts(store, select, stack)
            for start in starts:
                training = _Training(trainer, store, start, select, resume)
                try:
                    return self._run(training, arguments)
                except _DamagedError as damaged:
                    if start is starts[-1]:
                        raise damaged.error from None
                    message = f"{start and start[1].id} is damaged, trying the one before: {damaged.error}"
                    warnings.warn(message, FallbackWarning, stacklevel=2)
        raise AssertionError

    def _opened(self, args: Any, stack: ExitStack) -> Store:
        if isinstance(self._store, Store):
            return self._store
        keep = self._keep
        if keep is None and args.save_total_limit:
            keep = last(args.save_total_limit)
        if keep is not None and args.load_best_model_at_end:
            metric, mode = _best_of(args)
            keep |= best(metric, mode=mode)
        return stack.enter_context(open_store(self._store, keep=keep, **self._opening))

    def _run(self, training: _Training, arguments: Mapping[str, Any]) -> Any:
        trainer, changed = training.trainer, {}
        if self._save is not None:
            changed["save_strategy"] = type(trainer.args.save_strategy)("no")
        if training.start is not None and training.start[1].step:
            changed["eval_on_start"] = False  # it was at the start
        with ExitStack() as stack:
            folder = training.folder(stack)
            stack.enter_context(_replaced(trainer.args, **changed))
            stack.enter_context(_replaced(trainer, **training.methods()))
            self._training = training
            try:
                return trainer.train(resume_from_checkpoint=folder, **arguments)
            except BaseException as error:
                if training.checkpointer is not None:
                    training.checkpointer.__exit__(type(error), error, error.__traceback__)
                raise
            finally:
                self._training = None

    # -- what the Trainer tells --------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Everything is made: bring it back, or save what it is before the first step.

        Raises:
            StateError: it was ``trainer.train()`` that was called.
        """
        if self._training is None:
            raise StateError(
                "training began by trainer.train(), where a callback can't say where to go on: "
                "call saving.train(trainer) instead, saving being the CkptStoreCallback",
                path="",
            )
        self.checkpointer = self._training.begin(self._save, self._options)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """An optimizer step is done; it counts once it is evaluated."""
        if self._training is not None:
            self._training.step_done = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Note the loss of the steps since the last one."""
        if self._training is not None:
            self._training.logged |= {name: logs[name] for name in ("loss", "grad_norm") if name in (logs or {})}

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Record what was measured in the next save."""
        if self._training is not None and self.checkpointer is not None:
            self.checkpointer.report(**_measured(metrics or {}))

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The epoch before, if there was one, is evaluated, too."""
        if self._training is not None:
            self._training.end_pass(complete=True)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Where the run was over when it was saved, end it again."""
        if self._training is not None and self._training.over:
            control.should_training_stop = True
            control.should_log = control.should_evaluate = control.should_save = False

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save the end, and load the best."""
        if self._training is not None:
            self._training.end()


class _Training:
    """One call of ``train``.

    Attributes:
        start: the checkpoint to go on from, None for a fresh start.
        step_done: an optimizer step is done, and isn't counted yet.
        logged: metrics of the last steps.
        over: nothing is left to be done.
    """

    def __init__(
        self, trainer: Any, store: Store, start: Start, select: Select | None, resume: Mapping[str, Any]
    ) -> None:
        self.trainer, self.store, self.start = trainer, store, start
        self.checkpointer: Checkpointer | None = None
        self.step_done = self.over = False
        self.logged: dict[str, float] = {}
        self._select, self._resume = select, resume
        self._told = _Told(trainer)
        self._asked = False
        self._tokens = 0
        self._source: Any = None
        self._reading: Iterator[Any] | None = None
        self._random: dict[str, Any] | None = None
        self._skipped = 0

    # -- beginning ---------------------------------------------------------------------------------------

    def folder(self, stack: ExitStack) -> str | None:
        """A folder that tells Trainer how far it was, as one of its checkpoints would; nothing else is in it.

        Raises:
            StateError: it is no checkpoint of a Trainer.
        """
        if self.start is None:
            return None
        store, checkpoint = self.start
        try:
            tree = store.contents(checkpoint).parts[0].tree
            if not isinstance(tree, dict) or PART not in tree:
                raise StateError(
                    f"{checkpoint.id} was not saved from a Trainer, which can't go on there: load the model from it by "
                    "ckptstore.open(…).load(…, into={'model': model}), and train into another place",
                    path=PART,
                )
            saved = store.load(checkpoint.id, only=[PART, f"{PART}/*"])[PART]["state"]
        except (FormatError, IntegrityError) as error:
            raise _DamagedError(error) from error
        known = {field.name for field in dataclasses.fields(TrainerState)}
        folder = stack.enter_context(TemporaryDirectory(prefix="ckptstore-"))
        text = json.dumps({name: value for name, value in saved.items() if name in known})
        Path(folder, "trainer_state.json").write_text(text)
        return folder

    def methods(self) -> dict[str, Any]:
        """What Trainer does otherwise meanwhile: read through us, ask us to save, leave loading to us."""
        loader = self.trainer.get_train_dataloader
        return {
            "get_train_dataloader": lambda: self._batches(loader()),
            "_save_checkpoint": self._ask,
            "_load_from_checkpoint": lambda *args, **kwargs: None,
        }

    def _ask(self, *args: Any, **kwargs: Any) -> None:
        self._asked = True

    def _batches(self, loader: Any) -> DataLoader[Any]:
        # What accelerate wraps it in reads one batch ahead, which nobody could save.
        self._source = getattr(loader, "base_dataloader", loader)
        self._set_epoch = getattr(loader, "set_epoch", lambda epoch: None)
        return _Batches(_Passes(self), len_of=self._source)

    def begin(self, save: Schedule | None, options: Mapping[str, Any]) -> Checkpointer:
        """Resume, or begin."""
        trainer, args, made = self.trainer, self.trainer.args, dict(options)
        if args.load_best_model_at_end:
            wanted = on_best(*_best_of(args))
            save = wanted if save is None else save | wanted
        if args.metric_for_best_model is not None:
            made["modes"] = dict([_best_of(args)]) | dict(made.get("modes") or {})
        made.setdefault("hyperparameters", _hyperparameters(args))
        ckpt = Checkpointer(self.store, self._state(), save=save, length=self._length(), **made)
        self.checkpointer = ckpt
        resumed = self._go_on(ckpt)
        self._tokens = trainer.state.num_input_tokens_seen
        if resumed:
            self._random = RNG().state_dict()
            steps = self._steps_per_epoch() or trainer.state.max_steps
            self._skipped = trainer.state.global_step % steps * args.gradient_accumulation_steps
            stays = self._told.stopped and self._select in (None, True)
            self.over = stays or trainer.state.global_step >= trainer.state.max_steps
            if stays:
                ckpt._say(f"the run was stopped early at step {trainer.state.global_step}, and stays so")
        return ckpt

    def _go_on(self, ckpt: Checkpointer) -> Resumed:
        if self.start is None:
            return ckpt.resume(self._select, **self._resume)
        store, checkpoint = self.start
        try:
            return ckpt.resume(checkpoint.id if store is self.store else self._select, **self._resume)
        except (FormatError, IntegrityError) as error:
            if self._resume["check"]:
                raise
            raise _DamagedError(error) from error

    def _state(self) -> dict[str, Any]:
        trainer = self.trainer
        optimizer = trainer.optimizer
        state = {
            "model": trainer.model,
            # The one that steps, without what accelerate wraps it in.
            "optimizer": getattr(optimizer, "optimizer", optimizer),
            "scheduler": trainer.lr_scheduler,
            "scaler": getattr(trainer.accelerator, "scaler", None),
            PART: self._told,
            "data": self._source,
        }
        return {name: value for name, value in state.items() if value is not None}

    def _steps_per_epoch(self) -> int | None:
        try:
            return max(math.ceil(len(self._source) / self.trainer.args.gradient_accumulation_steps), 1)
        except TypeError:
            return None

    def _length(self) -> Length:
        state, steps = self.trainer.state, self._steps_per_epoch()
        return Length.of(state.max_steps, None if steps is None else state.num_train_epochs, steps_per_epoch=steps)

    # -- the loop ----------------------------------------------------------------------------------------

    def one_pass(self) -> Iterator[Any]:
        """The batches that Trainer asks for; those that it means to skip, as it thinks it reads them, are None."""
        assert self.checkpointer is not None
        skipped, self._skipped = self._skipped, 0
        yield from [None] * skipped
        if self.over:
            return
        self._set_epoch(self.checkpointer.progress.epoch)
        if self._random is not None:
            # As it was saved, whatever else has begun since.
            RNG().load_state_dict(self._random)
            self._random = None
        reading = self._reading = self.checkpointer.batches(self._source, "data")
        while True:
            self._settle()
            batch = next(reading, _END)
            if batch is _END:
                return
            yield batch

    def _settle(self) -> None:
        """Count the step that is done, now that it is evaluated; asking for the next batch saves what is due."""
        if not self.step_done:
            return
        assert self.checkpointer is not None
        self.step_done = False
        tokens = self.trainer.state.num_input_tokens_seen - self._tokens
        self._tokens += tokens
        self.checkpointer.step(tokens=int(tokens), **self.logged)
        if self._reading is not None and self._is_within():
            self._save_asked()

    def _is_within(self) -> bool:
        steps = self._steps_per_epoch()
        return steps is None or self.trainer.state.global_step % steps != 0

    def _save_asked(self) -> None:
        asked, self._asked = self._asked, False
        if asked and self.checkpointer is not None and self.checkpointer._is_unsaved():
            self.checkpointer.save(ASKED)

    def end_pass(self, *, complete: bool) -> None:
        """The running pass over the data is left; one that is complete ends an epoch, and what is due is saved."""
        if (reading := self._reading) is None:
            return
        assert self.checkpointer is not None
        # While it is open nothing is saved: there will be one checkpoint for the step and the epoch.
        self._settle()
        self._reading = None
        reading.close()  # type: ignore[attr-defined]
        if complete:
            self.checkpointer.end_epoch()
        self._save_asked()

    def end(self) -> None:
        """Training is over: save it, then load the best.

        Raises:
            SaveFailedError: it isn't saved.
            SystemExit: a signal came.
        """
        assert self.checkpointer is not None
        self.end_pass(complete=not self._is_within())
        self.checkpointer.close()
        if self.trainer.args.load_best_model_at_end:
            self._load_best()

    def _load_best(self) -> None:
        metric, mode = _best_of(self.trainer.args)
        try:
            found = self.store.resolve(f"best:{metric}:{mode}")
        except (NotFoundError, NoCheckpointError) as error:
            warnings.warn(f"load_best_model_at_end: the model stays as it is: {error}", UserWarning, stacklevel=2)
            return
        self.store.load(found.id, into={"model": self.trainer.model}, strict="parts")
        self.trainer.state.best_model_checkpoint = f"{self.store.url}/checkpoints/{found.id}"
        self.trainer.state.best_global_step = found.step


class _Told:
    """What the Trainer itself knows, in plain values.

    Attributes:
        stopped: another callback has ended the run before its last step.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self.stopped = False

    def state_dict(self) -> dict[str, Any]:
        """All of it."""
        trainer, state = self._trainer, self._trainer.state
        trainer.store_flos()
        fields = dataclasses.asdict(state)
        fields["stateful_callbacks"] = TrainerState(stateful_callbacks=self._callbacks()).stateful_callbacks
        stopped = trainer.control.should_training_stop and state.global_step < state.max_steps
        return {
            "state": fields,
            # Of the steps since the last line in the log.
            "loss": self._loss.item() if self._loss is not None else 0.0,
            "logged": getattr(trainer, "_globalstep_last_logged", state.global_step),
            "stopped": bool(self.stopped or stopped),
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Put in place what Trainer hasn't taken from its folder."""
        trainer = self._trainer
        self.stopped = saved["stopped"]
        states = saved["state"]["stateful_callbacks"]
        for name, kept in states.items():
            same = [each for each in self._callbacks() if type(each).__name__ == name]
            for callback, state in zip(same, kept if isinstance(kept, list) else [kept], strict=False):
                for key, value in state.get("attributes", {}).items():
                    setattr(callback, key, value)
        if self._loss is not None:
            self._loss.fill_(saved["loss"])
            # The mean that is told at the end is of the steps since here.
            trainer._total_loss_scalar = -self._loss.item()
            trainer._globalstep_last_logged = saved["logged"]

    def _callbacks(self) -> list[Any]:
        callbacks = self._trainer.callback_handler.callbacks
        return [each for each in callbacks if isinstance(each, ExportableState) and not isinstance(each, TrainerControl)]

    @property
    def _loss(self) -> torch.Tensor | None:
        # Older ones keep it to themselves; then the first mean after a resume is of the steps since.
        return getattr(self._trainer, "_tr_loss", None)


class _Passes(IterableDataset[Any]):
    """What Trainer takes for its data: ready batches, one pass each time it is iterated."""

    def __init__(self, training: _Training) -> None:
        self._training = training

    def __iter__(self) -> Iterator[Any]:
        return self._training.one_pass()

    def __len__(self) -> int:
        """The number of samples, as Trainer tells people."""
        return len(self._training._source.dataset)


class _Batches(DataLoader[Any]):
    """A loader of ready batches. One that Trainer makes of it to skip the first ones skips none that were read."""

    def __init__(self, passes: _Passes, *, len_of: Any) -> None:
        # A generator of its own: it draws a number at each pass that nobody needs.
        super().__init__(passes, batch_size=None, collate_fn=_as_it_is, generator=torch.Generator())
        self._len_of = len_of

    def __len__(self) -> int:
        return len(self._len_of)


def _as_it_is(batch: Any) -> Any:
    return batch


def _starts(store: Store, select: Select | None, stack: ExitStack) -> list[Start]:
    """The checkpoints to try, the one that is meant first; None is a fresh start."""
    source = Source.of(store, True if select is None else select, stack)
    if source is None:
        return [None]
    if source.selector != "latest":
        return [(source.store, source.store.resolve(source.selector))]
    found: list[Start] = [(source.store, each) for each in reversed(source.store.checkpoints())]
    if not found and select not in (None, True):
        raise NoCheckpointError(f"{source.store.url} holds no checkpoint")
    return found or [None]


def _check_trainer(trainer: Any, arguments: Mapping[str, Any]) -> None:
    """Nothing, where it can train through a store.

    Raises:
        FormatError: it is set up for what can't be.
    """
    args = trainer.args
    for name, why in (
        ("resume_from_checkpoint", "say where to go on as saving.train(trainer, 'step:1000')"),
        ("trial", "a search over hyper-parameters trains many runs; give each a store of its own"),
    ):
        if arguments.get(name) is not None:
            raise FormatError(f"{name}={arguments[name]!r} can't be given here: {why}")
    refused = {
        f"several processes (world_size={args.world_size})": args.world_size > 1,
        "DeepSpeed": trainer.is_deepspeed_enabled,
        "FSDP": trainer.is_fsdp_enabled,
        "auto_find_batch_size=True": args.auto_find_batch_size,
        "ignore_data_skip=True": args.ignore_data_skip,
    }
    if any(refused.values()):
        what = " and ".join(name for name, is_so in refused.items() if is_so)
        raise FormatError(f"CkptStoreCallback can't save a Trainer with {what} so that it goes on exactly; leave it out")


@contextmanager
def _replaced(thing: Any, **attributes: Any) -> Iterator[None]:
    """Meanwhile ``thing`` has these attributes."""
    before = {name: vars(thing)[name] for name in attributes if name in vars(thing)}
    for name, value in attributes.items():
        setattr(thing, name, value)
    try:
        yield
    finally:
        for name in attributes:
            if name in before:
                setattr(thing, name, before[name])
            else:
                delattr(thing, name)


def _best_of(args: Any) -> tuple[str, Any]:
    """The metric that Trainer goes by, and which values are best."""
    metric = args.metric_for_best_model
    name = metric if metric.startswith("eval_") else f"eval_{metric}"
    return name, "max" if args.greater_is_better else "min"


def _measured(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among them that tell of the model, and not of the machine."""
    found = {}
    for name, value in metrics.items():
        if name == "epoch" or name.endswith(("_runtime", "_per_second", "_preparation_time")):
            continue
        with suppress(TypeError, ValueError, RuntimeError):
            found[name] = float(value)
    return found


def _hyperparameters(args: Any) -> dict[str, Any]:
    """Those that change what the rest of a run does; what optimizers are set to is told by themselves."""
    names = "num_train_epochs max_steps per_device_train_batch_size gradient_accumulation_steps seed data_seed"
    return {name: getattr(args, name) for name in names.split()}
