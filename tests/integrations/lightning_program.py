"""A small Lightning run as a user would write it, to be run whole, or broken off anywhere in a process of its own."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from ckptstore.integrations.lightning import CkptStoreCallback
from tests.trainer.program import Broken, Numbers


@dataclass(frozen=True)
class Options:
    """What a run is like, and where it is broken off.

    Attributes:
        scheduler: "cosine" (each step), "plateau" (by each epoch's validation).
        validate: how often in an epoch, as Lightning's ``val_check_interval``.
        end_by: "exit", "kill", "term", "int", "raise", or None for the whole run.
        end_at: after that optimizer step.
        where: "step" (once it is counted), "backward" (in the midst of the next one), "validation".
    """

    url: str | None
    out: str
    accumulation: int = 1
    workers: int = 0
    scheduler: str = "cosine"
    validate: float = 1.0
    epochs: int = 3
    max_steps: int = -1
    samples: int = 24
    batch_size: int = 3
    save: str = "every(steps=3)"
    mode: str = "overlapped"
    end_by: str | None = None
    end_at: int = -1
    where: str = "step"
    more: dict[str, Any] = field(default_factory=dict)


class Model(LightningModule):
    """The model, which notes what it does."""

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.options = options
        self.net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.2), nn.BatchNorm1d(16), nn.Linear(16, 1))
        self.window: list[Any] = []
        self.losses: list[str] = []
        self.noted = 0
        self.broken = False

    def note(self, **fields: Any) -> None:
        with Path(self.options.out).open("a") as file:
            file.write(json.dumps(fields) + "\n")

    def break_off(self, where: str) -> None:
        options = self.options
        at = self.trainer.global_step
        if self.broken or options.end_by is None or options.where != where or options.end_at != at:
            return
        self.broken = True
        self.note(broken=at, where=where, at=time.time())
        if options.end_by == "exit":
            os._exit(9)
        if options.end_by == "raise":
            raise Broken
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT}[options.end_by])

    def loss(self, batch: Any) -> torch.Tensor:
        _, inputs, targets = batch
        return (self.net(inputs) - targets).square().mean()

    def training_step(self, batch: Any) -> torch.Tensor:
        loss = self.loss(batch)
        self.break_off("backward")
        self.window.append((batch[0].tolist(), loss.item().hex()))
        self.log("train_loss", loss)
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        if self.trainer.global_step == self.noted:
            return
        self.noted = self.trainer.global_step
        self.note(step=self.noted, window=self.window)
        self.window = []
        self.break_off("step")

    def on_fit_start(self) -> None:
        self.noted = self.trainer.global_step
        self.note(resumed=self.noted)

    def on_train_start(self) -> None:
        self.noted = self.trainer.global_step

    def validation_step(self, batch: Any) -> None:
        loss = self.loss(batch)
        self.losses.append(loss.item().hex())
        self.log("val_loss", loss)
        if not self.trainer.sanity_checking:
            self.break_off("validation")

    def on_validation_epoch_end(self) -> None:
        losses, self.losses = self.losses, []
        if not self.trainer.sanity_checking:
            self.note(evaluated=self.trainer.global_step, losses=losses)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        if self.options.scheduler == "plateau":
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=1.0)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=30)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cosine, "interval": "step"}}

    def train_dataloader(self) -> Any:
        options = self.options
        data = Numbers(options.samples, noisy=options.workers == 0)
        # Processes that a fork server started would start one of their own for the workers.
        how = "fork" if options.workers else None
        return DataLoader(
            data, batch_size=options.batch_size, shuffle=True, num_workers=options.workers, multiprocessing_context=how
        )

    def val_dataloader(self) -> Any:
        return DataLoader(Numbers(8, noisy=False), batch_size=4, shuffle=True)

    def digest(self) -> str:
        """Of all weights, buffers, the optimizer's state and the scheduler's."""
        found = hashlib.sha256()
        optimizer = self.trainer.optimizers[0]
        states = [optimizer.state[p] for p in self.parameters()]
        for tensor in [*self.state_dict().values(), *(v for state in states for v in state.values())]:
            found.update(tensor.detach().contiguous().numpy().tobytes())
        found.update(repr(self.trainer.lr_scheduler_configs[0].scheduler.state_dict()).encode())
        return found.hexdigest()


def quiet() -> None:
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


def trainer_of(options: Options, **more: Any) -> Trainer:
    return Trainer(
        max_epochs=options.epochs if options.max_steps < 0 else None,
        max_steps=options.max_steps,
        accelerator="cpu",
        accumulate_grad_batches=options.accumulation,
        val_check_interval=options.validate,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(Path(options.out).parent),
        **more,
    )


def run(options: Options) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(3)
    quiet()
    model = Model(options)
    if options.url is None:
        trainer = trainer_of(options, enable_checkpointing=False)
    else:
        callback = CkptStoreCallback(options.url, save=options.save, mode=options.mode, verbose=False, **options.more)
        trainer = trainer_of(options, callbacks=[callback])
    trainer.fit(model)
    model.note(digest=model.digest(), random=[torch.rand(1).item()])


def main(fields: dict[str, Any]) -> None:
    """Run in a process of its own."""
    try:
        run(Options(**fields))
    except Broken:
        raise SystemExit(7) from None


def notes(out: str | Path) -> list[dict[str, Any]]:
    """What the runs noted."""
    return [json.loads(line) for line in Path(out).read_text().splitlines()]
