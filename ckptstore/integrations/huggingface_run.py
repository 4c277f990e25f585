"""One training of a Hugging Face ``Trainer`` through a store: what is replaced in it, and when what is saved."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

import torch
from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import DataLoader, IterableDataset
from transformers.trainer_callback import ExportableState, TrainerState

from ckptstore.engine.catalogue import Checkpoint
from ckptstore.errors import FormatError, IntegrityError, NoCheckpointError, NotFoundError, StateError
from ckptstore.policy.events import on_best
from ckptstore.policy.progress import Length
from ckptstore.policy.schedule import Schedule
from ckptstore.state.rng import RNG
from ckptstore.store import Store
from ckptstore.trainer.checkpointer import Checkpointer
from ckptstore.trainer.events import Resumed
from ckptstore.view import View

PART = "huggingface"
"""The entry of each checkpoint that holds what the Trainer itself knows."""
ASKED = "the Trainer's save_strategy"

_END = object()

Select: TypeAlias = "bool | str | os.PathLike[str]"
Start: TypeAlias = "tuple[View, Checkpoint] | None"
"""A checkpoint to go on from, and where it lies; None is a fresh start."""


class DamagedError(Exception):
    """The checkpoint to go on from can't be read."""

    def __init__(self, error: FormatError | IntegrityError) -> None:
        self.error = error


class Training:
    """One call of ``train``.

    Attributes:
        start: the checkpoint to go on from, None for a fresh start.
        step_done: an optimizer step is done, and isn't counted yet.
        logged: metrics of the steps that aren't counted yet.
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
        self._told = Told(trainer)
        self._asked = False
        self._tokens = 0
        self._source: Any = None
        self._set_epoch: Callable[[int], object] = _nothing
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
            raise DamagedError(error) from error
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
        self._set_epoch = getattr(loader, "set_epoch", _nothing)
        sampler = getattr(getattr(self._source, "batch_sampler", None), "sampler", None)
        if isinstance(sampler, SeedableRandomSampler) and sampler.generator is None:
            # It makes it when it is first read, and then one that was saved would have no place yet.
            sampler.generator = torch.Generator(torch.get_default_device()).manual_seed(sampler.initial_seed)
        return _Batches(_Passes(self), len_of=self._source)

    def begin(self, save: Schedule | None, options: Mapping[str, Any]) -> Checkpointer:
        """Resume, or begin."""
        trainer, args, made = self.trainer, self.trainer.args, dict(options)
        if args.load_best_model_at_end:
            wanted = on_best(*best_of(args))
            save = wanted if save is None else save | wanted
        if args.metric_for_best_model is not None:
            made["modes"] = dict([best_of(args)]) | dict(made.get("modes") or {})
        made.setdefault("hyperparameters", hyperparameters(args))
        ckpt = Checkpointer(self.store, self._state(), save=save, length=self._length(), **made)
        self.checkpointer = ckpt
        resumed = self._go_on(ckpt)
        self._tokens = trainer.state.num_input_tokens_seen
        if resumed:
            self._random = RNG().state_dict() if trainer.state.global_step else None
            self._start_evaluating()
            steps = self._steps_per_epoch() or trainer.state.max_steps
            self._skipped = trainer.state.global_step % steps * args.gradient_accumulation_steps
            stays = self._told.stopped and self._select in (None, True)
            self.over = stays or trainer.state.global_step >= trainer.state.max_steps
            if stays:
                ckpt._say(f"the run was stopped early at step {trainer.state.global_step}, and stays so")
        return ckpt

    def _start_evaluating(self) -> None:
        """Start the workers that evaluations had kept: new ones draw a number, which the run has drawn already."""
        trainer = self.trainer
        if not trainer.args.dataloader_persistent_workers or not _has_evaluated(trainer.state):
            return
        for name in trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else [None]:
            loader = trainer.get_eval_dataloader(name)
            iter(getattr(loader, "base_dataloader", loader))

    def _go_on(self, ckpt: Checkpointer) -> Resumed:
        if self.start is None:
            return ckpt.resume(self._select, **self._resume)
        store, checkpoint = self.start
        try:
            return ckpt.resume(checkpoint.id if store is self.store else self._select, **self._resume)
        except (FormatError, IntegrityError) as error:
            if self._resume["check"]:
                raise
            raise DamagedError(error) from error

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
        accumulation: int = self.trainer.args.gradient_accumulation_steps
        try:
            return max(math.ceil(len(self._source) / accumulation), 1)
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
        logged, self.logged = self.logged, {}
        self.checkpointer.step(tokens=int(tokens), **logged)
        if self._reading is not None and self._is_within():
            self._save_asked()

    def _is_within(self) -> bool:
        steps = self._steps_per_epoch()
        return steps is None or self.trainer.state.global_step % steps != 0

    def _save_asked(self) -> None:
        asked, self._asked = self._asked, False
        if asked and self.checkpointer is not None and self.checkpointer._is_unsaved():
            self.checkpointer.save(ASKED)

    def begin_epoch(self) -> None:
        """The epoch before, if there was one, is over."""
        self.end_pass(complete=True)
        if not self.over:
            self._set_random()

    def _set_random(self) -> None:
        # It was saved at this place, or is set when the data are read on: what has begun since doesn't count.
        if self._random is not None:
            RNG().load_state_dict(self._random)
            self._random = None

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
        self._set_random()
        self.end_pass(complete=not self._is_within())
        self.checkpointer.close()
        if self.trainer.args.load_best_model_at_end:
            self._load_best()

    def _load_best(self) -> None:
        metric, mode = best_of(self.trainer.args)
        try:
            found = self.store.resolve(f"best:{metric}:{mode}")
        except (NotFoundError, NoCheckpointError) as error:
            warnings.warn(f"load_best_model_at_end: the model stays as it is: {error}", UserWarning, stacklevel=2)
            return
        self.store.load(found.id, into={"model": self.trainer.model}, strict="parts")
        self.trainer.state.best_model_checkpoint = f"{self.store.url}/checkpoints/{found.id}"
        self.trainer.state.best_global_step = found.step


class Told:
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
            "loss": None if self._loss is None else self._loss.item(),
            "logged": None if self._loss is None else trainer._globalstep_last_logged,
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
        if self._loss is not None and saved["loss"] is not None:
            self._loss.fill_(saved["loss"])
            # The mean that is told at the end is of the steps since here.
            trainer._total_loss_scalar = -self._loss.item()
            trainer._globalstep_last_logged = saved["logged"]

    def _callbacks(self) -> list[Any]:
        return [each for each in self._trainer.callback_handler.callbacks if isinstance(each, ExportableState)]

    @property
    def _loss(self) -> torch.Tensor | None:
        # Older ones keep it to themselves; then the first mean after a resume is of the steps since.
        return getattr(self._trainer, "_tr_loss", None)


class _Passes(IterableDataset[Any]):
    """What Trainer takes for its data: ready batches, one pass each time it is iterated."""

    def __init__(self, training: Training) -> None:
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


def _has_evaluated(state: Any) -> bool:
    return any(name.startswith("eval_") for line in state.log_history for name in line)


def _nothing(epoch: int) -> None:
    return


def _as_it_is(batch: Any) -> Any:
    return batch


def best_of(args: Any) -> tuple[str, Any]:
    """The metric that Trainer goes by, and which values are best."""
    metric = args.metric_for_best_model
    name = metric if metric.startswith("eval_") else f"eval_{metric}"
    return name, "max" if args.greater_is_better else "min"


def hyperparameters(args: Any) -> dict[str, Any]:
    """Those that change what the rest of a run does; what optimizers are set to is told by themselves."""
    names = "num_train_epochs max_steps per_device_train_batch_size gradient_accumulation_steps seed data_seed"
    return {name: getattr(args, name) for name in names.split()}
