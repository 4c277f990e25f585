"""Lightning 2: its own checkpoints in a store, and runs that save by our rules and go on exactly.

::

    store = ckptstore.open("runs/gpt2")
    trainer = Trainer(callbacks=[CkptStoreCallback(store, save="every(steps=250)")], plugins=[CkptStoreIO(store)])
    trainer.fit(model)                                      # goes on at the newest checkpoint, or begins
    trainer.test(model, ckpt_path="best:val_loss")
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ckptstore.errors import StateError
from ckptstore.integrations.lightning_io import (
    PARTS,
    REST,
    CheckpointCallback,
    CkptStoreIO,
    Fields,
    LightningModule,
    Part,
    Trainer,
    join,
    split,
)
from ckptstore.opening import Place
from ckptstore.policy.progress import Length
from ckptstore.state import fence
from ckptstore.store import Store
from ckptstore.trainer.checkpointer import Checkpointer
from ckptstore.trainer.events import Listener, Resumed, Saved

__all__ = ["CkptStoreCallback", "CkptStoreIO"]


class CkptStoreCallback(CheckpointCallback):
    """Saves a run of ``trainer.fit`` by our rules, and lets it go on exactly where a checkpoint was made.

    What is saved is Lightning's own checkpoint with all that its hooks add, and besides it the random state and the
    position in the training data, as they are between two batches, after whatever validation came in between; the
    tensors are read while the next batch is computed. ``fit`` goes on by itself: losses, weights and the order of the
    samples are those of a run that was never interrupted. Left out, because Lightning doesn't save it: the running
    means of what is logged with ``on_epoch=True``, and ``torchmetrics`` that are not persistent, begin anew within the
    epoch that is resumed; a loader without a length is read one batch ahead, which is lost.

    Signals are minded between two batches: one that comes during validation waits for its end.

    Attributes:
        run: the ``Checkpointer`` of the running ``fit``, None outside of it.
        resumed: how the last ``fit`` began.
    """

    def __init__(
        self,
        store: Store | Place,
        *,
        resume: bool | str | os.PathLike[str] = True,
        tokens: Callable[[Any], int] | None = None,
        **options: Any,
    ) -> None:
        """Nothing is read or written before ``trainer.fit``.

        Args:
            store: an open store, which stays open, or where to open one.
            resume: as for ``Checkpointer.resume``.
            tokens: how many tokens a batch has, for schedules that count them.
            options: of ``Checkpointer``: ``save``, ``signals``, ``deadline``, ``on_saved``, …, and where ``store`` is a
                place of ``ckptstore.open``: ``keep``, ``backup``, …
        """
        self._store, self._resume, self._tokens, self._options = store, resume, tokens, options
        self.run: _Run | None = None
        self.resumed: Resumed | None = None
        self._best: str | None = None
        self._sources = 0
        self._pending_tokens = 0
        self._epoch_over = False
        self._position: Fields | None = None

    @property
    def best_model_path(self) -> str:
        """The id of the best checkpoint so far, for ``ckpt_path="best"`` with a ``CkptStoreIO``; empty without one."""
        return self._best or ""

    @property
    def last_model_path(self) -> str:
        """The selector of the newest checkpoint."""
        return "latest"

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore a checkpoint, or begin."""
        if trainer.world_size > 1:
            raise StateError("CkptStoreCallback saves runs of a single process; use CkptStoreIO here", path="")
        length = Length(
            total_steps=trainer.max_steps if trainer.max_steps > 0 else None,
            epochs=trainer.max_epochs if (trainer.max_epochs or 0) > 0 and trainer.max_steps < 0 else None,
        )
        options = {"length": length, **self._options}
        options["listeners"] = [*options.get("listeners", ()), _Best(self)]
        self.run = run = _Run(self._store, _entries(trainer), **options)
        self._position, self._epoch_over, self._sources = None, False, 0
        try:
            # Only for the steps that are to come: Lightning restored them already where it was given a path itself.
            select = self._resume if trainer.ckpt_path is None else self._resume_path(trainer)
            self.resumed = run.resume(select)
        except BaseException:
            self.run = None
            run.abandon()
            raise
        fence(*trainer.optimizers)
        if run.is_exact:
            # The counters are put back when all that Lightning does to restart is over.
            progress: Any = trainer.fit_loop.epoch_progress.current
            self._position = trainer.fit_loop.epoch_loop.state_dict() if progress.started > progress.processed else None
        elif run.progress.step != trainer.global_step:
            run.count_from(trainer.global_step, trainer.current_epoch)
        plain = trainer.strategy.process_dataloader
        trainer.strategy.process_dataloader = lambda dataloader: self._counted(trainer, plain(dataloader))  # type: ignore[method-assign]

    def _resume_path(self, trainer: Trainer) -> bool | str:
        io = trainer.strategy.checkpoint_io
        if isinstance(io, CkptStoreIO) and self.run is not None and io.store.url == self.run.store.url:
            return io.find(trainer.ckpt_path).id  # type: ignore[arg-type]
        return False

    def _counted(self, trainer: Trainer, loader: Any) -> Any:
        if not trainer.training or self.run is None:
            return loader
        self._sources += 1
        name = "data" if self._sources == 1 else f"data/{self._sources - 1}"
        return _Loader(loader, lambda: self._batches(trainer, loader, name))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning is ready to go on."""
        run = self._running()
        self._sources = 0
        if run.is_exact:
            trainer.fit_loop.epoch_loop.restarting = False
        if run.is_exact and self._position is None:
            trainer.fit_loop._restarting = False
        run.take_signals()
        if run.minds_signals:
            trainer._signal_connector.received_sigterm = False
            # What it puts back at its end is what stood before the run.
            trainer._signal_connector._original_handlers.update(run.handlers_before)

    def _batches(self, trainer: Trainer, loader: Any, name: str) -> Iterator[Any]:
        run = self._running()
        if self._position is not None:
            self._put_back(trainer, self._position)
            self._position = None
        if self._epoch_over:
            self._epoch_over = False
            run.end_epoch()
        yield from run.batches(loader, name)

    def _put_back(self, trainer: Trainer, position: Fields) -> None:
        """Where the epoch stands; Lightning takes no further notice that it was restarted."""
        fit, epoch = trainer.fit_loop, trainer.fit_loop.epoch_loop
        epoch.load_state_dict(position)
        epoch.restarting = False
        fit._restarting = False
        if fit._data_fetcher is not None:
            fit._data_fetcher.fetched += epoch.batch_progress.current.ready

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the optimizer's steps."""
        run = self._running()
        if self._tokens is not None:
            self._pending_tokens += self._tokens(batch)
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        while run.steps < trainer.global_step:
            run.step(loss=loss, tokens=self._pending_tokens)
            self._pending_tokens = 0

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the metrics for the next save."""
        if self.run is not None and not trainer.sanity_checking:
            self.run.report(**_metrics(trainer))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the metrics; what is due is saved before the next epoch's first batch."""
        self._sources, self._epoch_over = 0, True
        self._running().report(**_metrics(trainer))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the end."""
        run = self._running()
        run.ended = True
        if self._epoch_over:
            self._epoch_over = False
            run.end_epoch()
        run.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let the save in the background end."""
        if self.run is not None:
            self.run.__exit__(type(exception), exception, exception.__traceback__)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the trainer."""
        if self.run is not None:
            self.run = None
            vars(trainer.strategy).pop("process_dataloader", None)

    def _running(self) -> _Run:
        assert self.run is not None
        return self.run


class _Run(Checkpointer):
    """A run whose loop is Lightning's: it is saved only where a batch is about to be fetched, and at the end.

    Attributes:
        ended: no further batch will be fetched.
    """

    ended = False

    @property
    def steps(self) -> int:
        """Optimizer steps that are counted."""
        return self._counters.step

    @property
    def is_exact(self) -> bool:
        """Whether what was loaded knows where the run stood between two batches."""
        return self._run.loaded is not None

    @property
    def minds_signals(self) -> bool:
        """Whether signals are minded."""
        return self._minds_signals

    def count_from(self, step: int, epoch: int) -> None:
        """Lightning has loaded something itself."""
        self._counters.go_on(step, epoch, 0, 0.0)

    def take_signals(self) -> None:
        """Before Lightning does, whose own way to end would not wait for the save."""
        if self._minds_signals:
            self._signals.take_back()

    @property
    def handlers_before(self) -> Mapping[int, Any]:
        """Of signals, those that stood before the run minded them."""
        return self._signals.before

    def abandon(self) -> None:
        """It could not begin."""
        self._closed = True
        if self._own_store:
            self.store.close()

    def _decide(self) -> None:
        self._undecided = True

    def _is_changing(self) -> bool:
        return not self.ended or super()._is_changing()


class _Best(Listener):
    """Remembers the best checkpoint for Lightning."""

    def __init__(self, owner: CkptStoreCallback) -> None:
        self._owner = owner

    def on_best(self, event: Saved) -> None:
        self._owner._best = event.checkpoint.id


class _Loader:
    """A training loader whose passes are counted; else as the loader itself, whose state Lightning has no use for."""

    def __init__(self, loader: Any, batches: Callable[[], Iterator[Any]]) -> None:
        vars(self).update(_loader=loader, _batches=batches)

    def __iter__(self) -> Iterator[Any]:
        return self._batches()  # type: ignore[no-any-return]

    def __len__(self) -> int:
        return len(self._loader)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("_loader", "_batches", "state_dict", "load_state_dict"):
            raise AttributeError(name)
        return getattr(self._loader, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._loader, name, value)


def _entries(trainer: Trainer) -> dict[str, Part]:
    """What a run saves: one checkpoint of Lightning's, made when its first entry is asked for."""
    connector = trainer._checkpoint_connector
    current: Fields = {}
    loaded: Fields = {}

    def get(name: str) -> Any:
        if name not in current:
            current.clear()
            current.update(split(connector.dump_checkpoint(weights_only=False)))
        return current.pop(name)

    def restore(rest: Any) -> None:
        # What isn't wanted back keeps the value that it has.
        kept = connector.dump_checkpoint(weights_only=False)
        connector._loaded_checkpoint = {**{key: kept[key] for key in PARTS.values()}, **join({**loaded, REST: rest})}
        connector.restore_datamodule()
        connector.restore_model()
        connector.restore_callbacks()
        connector.restore_training_state()
        connector._loaded_checkpoint = {}
        loaded.clear()

    def part(name: str) -> Part:
        return Part(lambda: get(name), lambda value: loaded.update({name: value}))

    return {**{name: part(name) for name in PARTS}, REST: Part(lambda: get(REST), restore)}


def _metrics(trainer: Trainer) -> dict[str, float]:
    return {name: value.item() for name, value in trainer.callback_metrics.items() if value.numel() == 1}
