"""Hugging Face ``Trainer``: it saves through a store, and goes on exactly. Needs ckptstore[huggingface]."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from ckptstore.config.settings import Parts
from ckptstore.engine.damage import FallbackWarning
from ckptstore.errors import FormatError, NoCheckpointError, StateError
from ckptstore.opening import Place
from ckptstore.opening import open as open_store
from ckptstore.policy.retention import Keep
from ckptstore.policy.rules import best, last
from ckptstore.policy.schedule import Schedule
from ckptstore.policy.text import parse_schedule
from ckptstore.store import Store
from ckptstore.trainer.checkpointer import Checkpointer
from ckptstore.trainer.resuming import Source

try:
    from transformers.trainer_callback import TrainerCallback
except ImportError as missing:
    raise ImportError(
        "the callback for the Hugging Face Trainer needs transformers and accelerate: "
        "pip install 'ckptstore[huggingface]'"
    ) from missing

from ckptstore.integrations.huggingface_run import DamagedError, Select, Start, Training, best_of

_BY_TRAINER = {"store", "state", "evaluate", "length"}
_OPTIONS = set(inspect.signature(Checkpointer.__init__).parameters) - {"self", "save", "options"} - _BY_TRAINER
_OPENING = set(inspect.signature(open_store).parameters) - {"url", "read_only", "keep"}


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
            why = (
                "the Trainer says so" if unknown <= _BY_TRAINER else f"known: {', '.join(sorted(_OPTIONS | _OPENING))}"
            )
            raise FormatError(f"{', '.join(sorted(unknown))}: no option of CkptStoreCallback; {why}")
        if isinstance(store, Store) and (opening or keep is not None):
            given = [*opening, *(["keep"] if keep is not None else [])]
            raise FormatError(f"{', '.join(given)}: the store is open already; give its place instead")
        self.checkpointer: Checkpointer | None = None
        self._save = parse_schedule(save) if isinstance(save, str) else save
        self._store, self._keep, self._options, self._opening = store, keep, own, opening
        self._training: Training | None = None

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
                training = Training(trainer, store, start, select, resume)
                try:
                    return self._run(training, arguments)
                except DamagedError as damaged:
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
            metric, mode = best_of(args)
            keep |= best(metric, mode=mode)
        return stack.enter_context(open_store(self._store, keep=keep, **self._opening))

    def _run(self, training: Training, arguments: Mapping[str, Any]) -> Any:
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
            self._training.begin_epoch()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Where the run was over when it was saved, end it again."""
        if self._training is not None and self._training.over:
            control.should_training_stop = True
            control.should_log = control.should_evaluate = control.should_save = False

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save the end, and load the best."""
        if self._training is not None:
            self._training.end()


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
        raise FormatError(
            f"CkptStoreCallback can't save a Trainer with {what} so that it goes on exactly; leave it out"
        )


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


def _measured(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among them that tell of the model, and not of the machine."""
    found = {}
    for name, value in metrics.items():
        if name == "epoch" or name.endswith(("_runtime", "_per_second", "_preparation_time")):
            continue
        with suppress(TypeError, ValueError, RuntimeError):
            found[name] = float(value)
    return found
