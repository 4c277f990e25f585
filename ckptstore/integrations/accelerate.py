"""Accelerate: what ``save_state`` saves, in a store.

A ``Checkpointer`` takes prepared objects as they are, and goes on exactly, also within an epoch::

    model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "data": loader}
    with ckptstore.Checkpointer("runs/gpt2", state, save="every(steps=250)") as ckpt:
        ckpt.resume()
        for epoch in ckpt.epochs(3):
            for batch in ckpt.batches(loader):
                with accelerator.accumulate(model):
                    ...
                if accelerator.sync_gradients:
                    ckpt.step(loss=loss)

``CkptStoreState`` is for loops that call ``accelerator.save_state`` and ``load_state`` themselves.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from ckptstore.engine.background import SaveHandle
from ckptstore.engine.catalogue import Checkpoint
from ckptstore.engine.loader import Loaded
from ckptstore.errors import FormatError, StateError
from ckptstore.opening import Place
from ckptstore.opening import open as open_store
from ckptstore.state.rng import RNG
from ckptstore.store import SaveMode, Store
from ckptstore.trainer.prepared import unwrapped

try:
    from accelerate import Accelerator
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "ckptstore.integrations.accelerate needs Accelerate: pip install 'ckptstore[accelerate]'"
    ) from error


class CkptStoreState:
    """Saves and restores all that an ``Accelerator`` has prepared or was told of.

    That is models, optimizers, schedulers, the GradScaler, loaders that have a state of their own, objects registered
    by ``register_for_checkpointing``, the random state, and the place in the window of accumulated gradients. As with
    Accelerate's own ``save_state``, the position in a plain loader is the caller's: ``skip_first_batches``. The hooks
    of ``register_save_state_pre_hook`` are for files, and aren't called.

    Attributes:
        store: where it saves.
    """

    def __init__(self, accelerator: Accelerator, store: Store | Place, **options: Any) -> None:
        """Nothing is read or written yet.

        Args:
            accelerator: whose state it is.
            store: an open store, which stays open, or where to open one.
            options: for ``ckptstore.open``, where ``store`` is a place.

        Raises:
            FormatError, StorageError: as ``ckptstore.open``.
            StateError: the run has more processes than one.
        """
        if accelerator.num_processes > 1:
            raise StateError("CkptStoreState saves runs of a single process", path="")
        if isinstance(store, Store) and options:
            raise FormatError(f"{', '.join(options)}: the store is open already; give its place instead")
        self.accelerator = accelerator
        self.store = store if isinstance(store, Store) else open_store(store, **options)
        self._owns = self.store is not store

    def save(self, *, step: int, mode: SaveMode = "sync", **facts: Any) -> Checkpoint | SaveHandle | None:
        """Save, as ``Store.save`` does.

        Args:
            step: completed optimizer steps.
            mode: as for ``Store.save``.
            facts: epoch, metrics, modes, reasons, durable, when_busy, as for ``Store.save``.
        """
        return self.store.save(self.state(), step=step, mode=mode, **{"when_busy": "wait", **facts})

    def load(self, selector: str | os.PathLike[str] = "latest") -> Loaded:
        """Restore in place, as ``Store.load`` does, the parts that the checkpoint and this run have in common.

        Raises:
            NoCheckpointError: there is none yet.
            NotFoundError, IntegrityError, StateError: as ``Store.load``.
        """
        return self.store.load(os.fspath(selector), into=self.state(), strict="parts")

    def state(self) -> dict[str, Any]:
        """What is saved, by name."""
        accelerator = self.accelerator
        stateful = [each for each in accelerator._dataloaders if getattr(each, "use_stateful_dataloader", False)]
        parts = {
            "model": accelerator._models,
            "optimizer": unwrapped(accelerator._optimizers),
            "scheduler": unwrapped(accelerator._schedulers),
            "scaler": [] if accelerator.scaler is None else [accelerator.scaler],
            "data": stateful,
            "custom": accelerator._custom_objects,
        }
        state = {name: _one_or_all(value) for name, value in parts.items() if value}
        return {**state, "accelerate": _Window(accelerator), "rng": RNG()}

    def close(self) -> None:
        """Wait for a save in the background, and close the store where it was opened here."""
        if self._owns:
            self.store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Window:
    """How many batches the running window of accumulated gradients has."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator

    def state_dict(self) -> dict[str, int]:
        return {"step": int(self._accelerator.step)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._accelerator.step = state["step"]


def _one_or_all(values: Sequence[Any]) -> Any:
    return values[0] if len(values) == 1 else list(values)
