"""What a later checkpoint costs where nearly all is frozen: adapters (LoRA) on GPT-2, with their AdamW."""

from __future__ import annotations

import os
from typing import Any

import torch

from benchmarks.rounds import settle, stored_bytes, timed
from benchmarks.savers import InStore, Saver
from benchmarks.workload import GPT2, Size, Workload
from ckptstore.tools.subjects import SUBJECTS
from ckptstore.tools.turns import Tell, turns

SAVERS = ("ckptstore", "torch", "safetensors", "dcp")
RANK = 8
"""Of the adapters on the attention: with the optimizer's moments, 1 % of the bytes change at a step."""


def measure(
    folder: str,
    rounds: int,
    *,
    size: Size = GPT2,
    rank: int = RANK,
    names: tuple[str, ...] = SAVERS,
    tell: Tell | None = None,
) -> dict[str, Any]:
    """Seconds and bytes on storage of each round by saver: ``first_s`` and ``first_bytes`` of a run's first save,
    ``later_s`` and ``later_bytes`` of the one after the next step. Saves are durable on return."""
    workload = Workload(size, adapter_rank=rank)
    found: dict[str, dict[str, list[float]]] = {name: {} for name in names}
    for name in names:
        # What is imported and set up at the first use is not what is measured.
        _run(name, folder, workload)
    for name in turns(names, rounds, tell):
        for key, value in _run(name, folder, workload).items():
            found[name].setdefault(key, []).append(value)
    return {"bytes": workload.bytes, "changing_bytes": _changing_bytes(workload), "savers": found}


class _Rival(Saver):
    """One of ``SUBJECTS``, each time into a folder of its own."""

    def __init__(self, folder: str, workload: Workload, name: str) -> None:
        super().__init__(folder, workload)
        self._subject = SUBJECTS[name]

    def save(self) -> None:
        place = self.next_place()
        os.mkdir(place)
        self._subject(place, self.workload.bytes).save(self.workload.tensors())


def _run(name: str, folder: str, workload: Workload) -> dict[str, float]:
    place = os.path.join(folder, name)
    made = InStore(place, workload) if name == "ckptstore" else _Rival(place, workload, name)
    with made as saver:
        first_s = timed(saver.save)
        first_bytes = stored_bytes(place)
        workload.optimizer.step()
        later_s = timed(saver.save)
        later_bytes = stored_bytes(place) - first_bytes
    settle()
    return {"first_s": first_s, "first_bytes": first_bytes, "later_s": later_s, "later_bytes": later_bytes}


def _changing_bytes(workload: Workload) -> int:
    moments = (value for state in workload.optimizer.state.values() for value in state.values())
    return sum(tensor.nbytes for tensor in (*workload.trained, *moments) if isinstance(tensor, torch.Tensor))
