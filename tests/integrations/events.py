"""What a run tells its listeners, of a checkpoint that was really saved."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

import ckptstore as cs
from ckptstore.trainer.events import Failed, Resumed, Saved, Stats


def saved(place: Path, step: int = 3) -> Saved:
    """A checkpoint is durable, the best so far by one of its two metrics."""
    checkpoint = cs.open(place).save({"w": np.arange(10.0)}, step=step, metrics={"val_loss": 2.5, "acc": 0.5})
    reasons = ("every 3 steps", "best val_loss")
    return Saved(replace(checkpoint, reasons=reasons), str(place), stall_s=0.015, seconds=0.25)


def failed(*, fatal: bool = False) -> Failed:
    """The disk was full."""
    return Failed(6, cs.StorageFullError("no space left on runs/x"), failures=2, fatal=fatal)


def resumed(event: Saved) -> Resumed:
    """From the checkpoint of ``event``, with all that can differ."""
    return Resumed(event.checkpoint, event.url, kept=["scaler"], unused=["ema"], differences=["lr: 0.1, was 0.2"])


STATS = Stats(saves=2, failed=1, stall_s=0.5, elapsed_s=100.0, written_bytes=2_000_000)
