"""The folders of the Trainer of transformers: ``checkpoint-N`` with ``trainer_state.json``."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from ckptstore.tools.importing.folder import Folder, number_in
from ckptstore.tools.importing.noted import Noted, count_of, metrics_of

STATE = "trainer_state.json"
NUMBERED = re.compile(r"checkpoint-([0-9]+)")
_MARKS = re.compile(r"trainer_state\.json|training_args\.bin|optimizer\.pt|scheduler\.pt|rng_state(_[0-9]+)?\.pth")


def noted(folder: Folder) -> Noted | None:
    """What the Trainer noted of a checkpoint; None if the folder isn't the Trainer's."""
    if not any(_MARKS.fullmatch(name) for name in folder.files):
        return None
    found = Noted("huggingface")
    state = found.read(folder, STATE, "trainer_state")
    recorded = count_of(state.get("global_step"))
    found.step = number_in(NUMBERED, folder.path.name) if recorded is None else recorded
    if recorded is not None:
        found.epoch = completed_epochs(state.get("epoch"), recorded)
        found.metrics = _metrics_at(state, recorded)
    return found


def completed_epochs(epoch: Any, step: int) -> int | None:
    """How many epochs are over, of a share of epochs as 2.75 after ``step`` steps.

    A sum of fractions may end a hair below the whole number: what is less than half a step away from it has reached it.
    """
    if type(epoch) not in (int, float) or not 0 <= epoch < 1e15:
        return None
    nearest: int = round(epoch)
    half_a_step = 0.5 * epoch / step if step else 0.0
    return nearest if abs(nearest - epoch) < half_a_step else math.floor(epoch)


def _metrics_at(state: Mapping[str, Any], step: int) -> dict[str, float]:
    history = state.get("log_history")
    found: dict[str, float] = {}
    for entry in history if isinstance(history, list) else ():
        if isinstance(entry, dict) and entry.get("step") == step:
            found |= metrics_of(entry)
    return found
