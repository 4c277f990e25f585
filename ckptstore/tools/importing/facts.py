"""What a checkpoint's content tells of it, between the process that reads it and the one that imports it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from ckptstore.tools.importing.found import Found
from ckptstore.tools.importing.noted import count_of
from ckptstore.tools.importing.told import Told, told

_METRICS = 1000
_SILENT = frozenset(("huggingface", "training state", "components", "milestones", "dcp", "safetensors"))
"""Kinds of which the content tells nothing that isn't known before, unless ``facts_in`` says so."""


def may_tell(found: Found) -> bool:
    """Whether the content of one of many must be asked before they are put in order."""
    return found.step is None or bool(found.facts_in) or found.kind not in _SILENT


def question(found: Found) -> dict[str, Any]:
    """As much of ``found`` as what its content tells depends on; for ``answer``."""
    # A folder of DCP is as anybody's own file.
    kind = "torch" if found.kind == "dcp" else found.kind
    return {
        "kind": kind,
        "path": str(found.path),
        "step": found.step,
        "epoch": found.epoch,
        "facts_in": dict(found.facts_in),
    }


def answer(question: Mapping[str, Any], state: object) -> dict[str, Any]:
    """What ``state`` tells, as JSON; the inverse is ``facts_of``."""
    found = Found(
        question["kind"],
        Path(question["path"]),
        {},
        question["step"],
        question["epoch"],
        facts_in=question["facts_in"],
    )
    says = told(found, state if isinstance(state, Mapping) else {})
    return {
        "step": says.step,
        "epoch": says.epoch,
        "metrics": dict(says.metrics),
        "created": None if says.created is None else says.created.isoformat(),
        "save": None if says.save is None else repr(says.save),
        "position": list(says.position),
        "spare": says.spare,
    }


def facts_of(fields: Mapping[str, Any]) -> Told:
    """What a reader has answered, as far as it can be.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: it answers nonsense.
    """
    numbers = {str(name): float(value) for name, value in list(fields["metrics"].items())[:_METRICS]}
    return Told(
        step=count_of(fields["step"]),
        epoch=count_of(fields["epoch"]),
        metrics={name: value for name, value in numbers.items() if math.isfinite(value)},
        created=None if fields["created"] is None else datetime.fromisoformat(str(fields["created"])),
        save=None if fields["save"] is None else str(fields["save"]),
        position=tuple(int(one) for one in fields["position"]),
        spare=int(fields["spare"]),
    )


def told_by_values(found: Found) -> Told:
    """What the plain values beside a checkpoint tell that has no other content but tensors."""
    return told(replace(found, kind=question(found)["kind"]), found.values)
