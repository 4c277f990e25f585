"""A small training run as a user would write it, to be run whole, or broken off anywhere in a process of its own."""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ckptstore.policy.text import parse_keep, parse_schedule
from ckptstore.trainer.checkpointer import Checkpointer


@dataclass(frozen=True)
class Options:
    """What a run is like, and where it is broken off.

    Attributes:
        end_by: "exit" (the process is gone at once), "kill", "term", "int", "raise", or None for the whole run.
        end_at: after that step.
        step_s, evaluation_s: what these take besides.
        stuck: a step spends minutes in C, where Python runs no handlers.
        keep: which checkpoints stay, as text; all where it is empty.
        select: what ``resume`` is told.
        where: "step" (after ``ckpt.step``), "backward" (in the midst of the step after), "evaluation".
    """

    url: str
    out: str
    optimizer: str = "adamw"
    scheduler: str = "cosine"
    workers: int = 0
    accumulation: int = 1
    epochs: int = 3
    samples: int = 24
    batch_size: int = 3
    save: str = "every(steps=3)"
    keep: str = ""
    select: bool | str = True
    mode: str = "overlapped"
    check: bool = False
    step_s: float = 0.0
    evaluation_s: float = 0.0
    stuck: bool = False
    end_by: str | None = None
    end_at: int = -1
    where: str = "step"
    more: dict[str, Any] = field(default_factory=dict)


class Numbers(Dataset[tuple[int, torch.Tensor, torch.Tensor]]):
    """Sample ``index`` tells its number, and draws random noise where it is loaded in the training process itself."""

    def __init__(self, count: int, *, noisy: bool) -> None:
        made = torch.Generator().manual_seed(7)
        self.inputs = torch.randn(count, 6, generator=made)
        self.targets = self.inputs.sum(1, keepdim=True).sin()
        self.noisy = noisy

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor, torch.Tensor]:
        noise = 0.01 * torch.randn(6) if self.noisy else 0.0
        return index, self.inputs[index] + noise, self.targets[index]


def optimizer_of(options: Options, model: nn.Module) -> torch.optim.Optimizer:
    if options.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def scheduler_of(options: Options, optimizer: torch.optim.Optimizer, total: int) -> Any:
    if options.scheduler == "onecycle":
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=total)
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=total)


class Broken(Exception):
    """The run is to end here."""


class Program:
    """The run."""

    def __init__(self, options: Options) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(3)
        self.options = options
        self.model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.2), nn.BatchNorm1d(16), nn.Linear(16, 1))
        self.optimizer = optimizer_of(options, self.model)
        batches = options.samples // options.batch_size
        self.steps_per_epoch = math.ceil(batches / options.accumulation)
        self.scheduler = scheduler_of(options, self.optimizer, self.steps_per_epoch * options.epochs)
        self.loader = DataLoader(
            Numbers(options.samples, noisy=options.workers == 0),
            batch_size=options.batch_size,
            shuffle=True,
            num_workers=options.workers,
            multiprocessing_context="fork" if options.workers else None,
        )
        self.held_out = DataLoader(Numbers(8, noisy=False), batch_size=4, shuffle=True)
        self.out = Path(options.out)
        self.broken = False

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "data": self.loader,
        }

    def note(self, **fields: Any) -> None:
        with self.out.open("a") as file:
            file.write(json.dumps(fields) + "\n")

    def break_off(self, where: str, step: int) -> None:
        options = self.options
        if options.where != where or options.end_at != step or options.end_by is None or self.broken:
            return
        self.broken = True
        self.note(broken=step, where=where, at=time.time())
        if options.end_by == "exit":
            os._exit(9)
        if options.end_by == "raise":
            raise Broken
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT}[options.end_by])

    def run(self) -> None:
        options = self.options
        with Checkpointer(
            options.url,
            self.state(),
            save=parse_schedule(options.save),
            mode=options.mode,  # type: ignore[arg-type]
            verbose=False,
            **({"keep": parse_keep(options.keep)} if options.keep else {}),
            **options.more,
        ) as ckpt:
            self.note(resuming=True)
            resumed = ckpt.resume(options.select, check=options.check)
            self.note(resumed=ckpt.progress.step, loaded=bool(resumed))
            for _ in ckpt.epochs(options.epochs):
                self.epoch(ckpt)
                ckpt.report(val_loss=self.evaluate(ckpt))
        self.note(digest=self.digest(), random=[torch.rand(1).item()])

    def epoch(self, ckpt: Checkpointer) -> None:
        accumulation, window = self.options.accumulation, []
        for index, inputs, targets in ckpt.batches(self.loader):
            loss = (self.model(inputs) - targets).square().mean()
            self.break_off("backward", ckpt.progress.step)
            if self.options.step_s:
                self.note(working=True)
                time.sleep(self.options.step_s)
            if self.options.stuck:
                self.note(working=True)
                hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
            (loss / accumulation).backward()
            window.append((index.tolist(), loss.item().hex()))
            if len(window) < accumulation:
                continue
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step()
            ckpt.step(loss=loss)
            self.note(step=ckpt.progress.step, window=window)
            window = []
            self.break_off("step", ckpt.progress.step)

    def evaluate(self, ckpt: Checkpointer) -> float:
        if self.options.evaluation_s:
            self.note(evaluating=True)
            time.sleep(self.options.evaluation_s)
        self.model.eval()
        with torch.no_grad():
            losses = [(self.model(inputs) - targets).square().mean().item() for _, inputs, targets in self.held_out]
        self.break_off("evaluation", ckpt.progress.step)
        ckpt.check()
        self.model.train()
        self.note(evaluated=ckpt.progress.step, losses=[loss.hex() for loss in losses])
        return sum(losses)

    def digest(self) -> str:
        """Of all weights, buffers and the optimizer's state."""
        found = hashlib.sha256()
        states = [self.optimizer.state[p] for p in self.model.parameters()]
        tensors = [*self.model.state_dict().values(), *(v for state in states for v in state.values())]
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor):
                found.update(tensor.detach().contiguous().numpy().tobytes())
        found.update(repr(self.scheduler.state_dict()).encode())
        return found.hexdigest()


def main(fields: dict[str, Any]) -> None:
    """Run in a process of its own."""
    try:
        Program(Options(**fields)).run()
    except Broken:
        raise SystemExit(7) from None


def notes(out: str | Path) -> list[dict[str, Any]]:
    """What the runs noted, as far as they came."""
    path = Path(out)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
