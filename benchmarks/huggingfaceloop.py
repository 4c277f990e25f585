"""Hugging Face's own loop with its own saving, on its own GPT-2: it takes no other model whose weights are tied."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.utils import logging

from benchmarks.loops import Loop, Rows, SaveTimes
from benchmarks.workload import Workload


class FrameworkLoop(Loop):
    """``Trainer`` with ``save_strategy="steps"``, which keeps all of them."""

    def make_workload(self) -> Workload:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        size = self.size
        shape = GPT2Config(
            vocab_size=size.vocabulary,
            n_positions=size.context,
            n_embd=size.width,
            n_layer=size.layers,
            n_head=size.heads,
            bos_token_id=0,
            eos_token_id=0,
        )
        return Workload(size, model=GPT2LMHeadModel(shape))

    def train(self, steps: int) -> None:
        self._train(steps, save_strategy="no")

    def train_saving(self, steps: int, every: int) -> list[SaveTimes]:
        return self._train(steps, save_strategy="steps", save_steps=every)

    def _train(self, steps: int, **options: Any) -> list[SaveTimes]:
        clock = _Clock()
        asked = TrainingArguments(
            output_dir=str(self.folder / "saves"),
            max_steps=steps,
            per_device_train_batch_size=self.size.batch,
            # The other loops do neither.
            max_grad_norm=0.0,
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
            **options,
        )
        optimizer = self.workload.optimizer
        trainer = Trainer(
            model=self.workload.model,
            args=asked,
            train_dataset=_Labelled(self.workload, steps * self.size.batch),
            callbacks=[clock],
            optimizers=(optimizer, LambdaLR(optimizer, lambda step: 1.0)),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return clock.saved


class _Labelled(Rows):
    """Samples as the model takes them: it shifts the labels by itself."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = super().__getitem__(index)[:-1]
        return {"input_ids": row, "labels": row}


class _Clock(TrainerCallback):
    """Notes how long each save takes: it comes between these two events."""

    def __init__(self) -> None:
        self.saved: list[SaveTimes] = []
        self._stepped = 0.0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        self._stepped = time.perf_counter()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        self.saved.append(SaveTimes(state.global_step, time.perf_counter() - self._stepped, None))
