"""The small run of the trainer's tests, with everything prepared by Accelerate."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator

from ckptstore.trainer.checkpointer import Checkpointer
from tests.trainer.program import Broken, Options, Program


class Prepared(Program):
    """The run."""

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=options.accumulation)
        self.model, self.optimizer, self.scheduler, self.loader = self.accelerator.prepare(
            self.model, self.optimizer, self.scheduler, self.loader
        )

    def epoch(self, ckpt: Checkpointer) -> None:
        window: list[Any] = []
        for index, inputs, targets in ckpt.batches(self.loader):
            with self.accelerator.accumulate(self.model):
                loss = (self.model(inputs) - targets).square().mean()
                self.break_off("backward", ckpt.progress.step)
                self.accelerator.backward(loss)
                window.append((index.tolist(), loss.item().hex()))
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
            if self.accelerator.sync_gradients:
                ckpt.step(loss=loss)
                self.note(step=ckpt.progress.step, window=window)
                window = []
                self.break_off("step", ckpt.progress.step)


def main(fields: dict[str, Any]) -> None:
    """Run in a process of its own; without a checkpointer where its place is none."""
    options = Options(**fields)
    try:
        Prepared(options).run()
    except Broken:
        raise SystemExit(7) from None
