"""A folder that is one checkpoint: which program's it is, what is in it, and whether it is all there."""

from __future__ import annotations

import re

from ckptstore.tools.importing import accelerate, huggingface, lightning, older
from ckptstore.tools.importing.folder import Folder, number_in
from ckptstore.tools.importing.found import Found
from ckptstore.tools.importing.noted import Noted, metrics_of
from ckptstore.tools.importing.parts import NO_MODEL, Parts, is_known, parts_of

_FAMILIES = (older.components_noted, older.state_noted, huggingface.noted, accelerate.noted)
_EVALUATED = ("eval_metrics.json", "eval_results.json")
_DEEPSPEED = re.compile(r"global_step\d+|pytorch_model", re.ASCII)


def checkpoint_in(folder: Folder) -> Found | str | None:
    """The checkpoint that the folder is, why it is none that can be imported, or None if it is something else."""
    if folder.files.get(".metadata"):
        dcp = Found("dcp", folder.path, {"": folder.path}, number_in(huggingface.NUMBERED, folder.path.name))
        return lightning.sharded(folder) or dcp
    noted = next((found for found in (family(folder) for family in _FAMILIES) if found), None)
    if noted is None and not is_known(folder):
        return None
    plain = noted or Noted("weights", step=number_in(huggingface.NUMBERED, folder.path.name))
    for name in _EVALUATED:
        plain.metrics |= metrics_of(plain.read(folder, name, name.removesuffix(".json")))
    parts = parts_of(folder, plain.names)
    for component, name in parts.json.items():
        plain.read(folder, name, component)
    return _incomplete(folder, parts) or _found(folder, plain, parts)


def _incomplete(folder: Folder, parts: Parts) -> str:
    """Why it can't be imported; "" where it can."""
    if parts.models or NO_MODEL in folder.files:
        return ""
    if parts.weights.missing:
        return f"incomplete: {parts.weights.missing}"
    if any(_DEEPSPEED.fullmatch(name) for name in folder.folders):
        return "holds the shards of DeepSpeed: make weights of them with its zero_to_fp32.py first"
    refused = [name for name in folder.left_out if name.startswith(("model", "pytorch_model"))]
    return f"{refused[0]} is {folder.left_out[refused[0]]}" if refused else "holds no weights of a model"


def _found(folder: Folder, noted: Noted, parts: Parts) -> Found:
    values = {name: value for name, value in noted.values.items() if name not in parts.files}
    return Found(
        noted.kind,
        folder.path,
        parts.files,
        noted.step,
        epoch=noted.epoch,
        metrics=noted.metrics,
        created=noted.created,
        values=values,
        facts_in=noted.facts_in,
        left_out=parts.left_out | noted.left_out,
        reasons=noted.reasons,
    )
