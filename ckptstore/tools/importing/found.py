"""What a checkpoint of another program is found as, before anything of it is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Found:
    """One checkpoint that lies in a foreign layout.

    Attributes:
        kind: "torch", "safetensors", "dcp", "huggingface", "accelerate", "lightning", "folder", …: for people.
        path: file or folder it was found as.
        files: component of the state → file with its content, or folder of a DCP; "" means that the file's content is
            the state.
        step: None where a file's content tells it (see ``facts_in``), or the caller.
        epoch, metrics, created: as recorded beside the content.
        values: plain JSON values that become components as they are, as the content of ``trainer_state.json``.
        facts_in: "step", "epoch" or "metric:NAME" → path in the loaded state, as "trainer/global_step", which is
            looked up after loading, where the file's content tells it.
        left_out: file name → why it isn't imported.
        reasons: more of the checkpoint's reasons.
    """

    kind: str
    path: Path
    files: Mapping[str, Path]
    step: int | None
    epoch: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    created: datetime | None = None
    values: Mapping[str, Any] = field(default_factory=dict)
    facts_in: Mapping[str, str] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    reasons: Sequence[str] = ()
