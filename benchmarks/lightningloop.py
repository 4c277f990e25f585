"""Lightning's own loop with its own saving."""

from __future__ import annotations

import logging
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from benchmarks.loops import Loop, SaveTimes
from benchmarks.rounds import timed
from benchmarks.workload import Workload


class FrameworkLoop(Loop):
    """``Trainer`` with ``ModelCheckpoint(every_n_train_steps=…)``, which keeps all of them."""

    def train(self, steps: int) -> None:
        self._fit(steps)

    def train_saving(self, steps: int, every: int) -> list[SaveTimes]:
        checkpoint = ModelCheckpoint(
            self.folder / "saves",
            filename="{step}",
            every_n_train_steps=every,
            save_top_k=-1,
            auto_insert_metric_name=False,
        )
        return self._fit(steps, checkpoint)

    def _fit(self, steps: int, *callbacks: ModelCheckpoint) -> list[SaveTimes]:
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        trainer = _Trainer(
            max_steps=steps,
            accelerator="cpu",
            devices=1,
            logger=False,
            callbacks=list(callbacks),
            enable_checkpointing=bool(callbacks),
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(_Module(self.workload), self.loader(steps))
        return trainer.saved


class _Trainer(Trainer):
    """Notes how long each save takes."""

    def __init__(self, **options: Any) -> None:
        self.saved: list[SaveTimes] = []
        super().__init__(**options)

    def save_checkpoint(self, *args: Any, **options: Any) -> None:
        seconds = timed(lambda: super(_Trainer, self).save_checkpoint(*args, **options))
        self.saved.append(SaveTimes(self.global_step, seconds, None))


class _Module(LightningModule):
    def __init__(self, workload: Workload) -> None:
        super().__init__()
        self.model = workload.model
        self._made = workload

    def training_step(self, rows: torch.Tensor, index: int) -> torch.Tensor:
        return self._made.loss(rows)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self._made.optimizer
