"""What a ``Checkpointer`` costs in a step that saves nothing."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

import ckptstore as cs
from ckptstore.tools.turns import Tell, turns


def _list(steps: int) -> Iterable[Any]:
    return [0] * steps


def _loader(steps: int) -> Iterable[Any]:
    return DataLoader(range(steps), batch_size=1, shuffle=True)  # type: ignore[arg-type]


SOURCES: dict[str, Callable[[int], Iterable[Any]]] = {"list": _list, "DataLoader": _loader}
"""What the batches come from."""


def measure(folder: str, rounds: int, *, steps: int = 20_000, tell: Tell | None = None) -> dict[str, Any]:
    """Microseconds of one ``step(loss=…)`` and one turn of ``batches``, of which the source's own are taken off.

    Medians of ``steps`` steps, one number a round, by source. The schedule waits for a step, an epoch and a metric;
    signals are minded, and requests in the store are looked for.
    """
    found: dict[str, list[float]] = {name: [] for name in SOURCES}
    for number, name in enumerate(turns(tuple(SOURCES), rounds, tell)):
        make = SOURCES[name]
        bare = _step_us(make(steps), lambda: None)
        spent = _observed(os.path.join(folder, f"{number}"), make(steps))
        found[name].append(statistics.median(spent) - statistics.median(bare))
    return {"steps": steps, "step_us": found}


def _observed(folder: str, source: Iterable[Any]) -> list[float]:
    model = nn.Linear(8, 8)
    state = {"model": model, "optimizer": torch.optim.AdamW(model.parameters())}
    schedule = cs.every(steps=10**9) | cs.every(epochs=1) | cs.on_best("val_loss")
    loss = torch.tensor(1.0)
    with cs.Checkpointer(folder, state, save=schedule, final=False, verbose=False) as ckpt:
        ckpt.resume()
        return _step_us(ckpt.batches(source), lambda: ckpt.step(loss=loss))


def _step_us(batches: Iterable[Any], step: Callable[[], None]) -> list[float]:
    spent: list[float] = []
    last = time.perf_counter()
    for _ in batches:
        step()
        now = time.perf_counter()
        spent.append(1e6 * (now - last))
        last = now
    return spent
