"""Which file of a checkpoint's folder is which component of the state."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ckptstore.errors import CheckpointError
from ckptstore.tools.importing.folder import Folder
from ckptstore.tools.importing.weights import WEIGHTS, Weights, weights_in

NO_MODEL = ".forgather_no_model_weights"
"""Beside a checkpoint that has no weights on purpose."""

NUMBERED = re.compile(r"(?:checkpoint|ckpt|(?:[a-z]+_)?step|iter|epoch)[-_]?\d{1,15}", re.ASCII)
"""Names that programs give to the folder of one checkpoint."""

_COMPONENTS = [
    (re.compile(pattern, re.ASCII), component)
    for pattern, component in (
        (r"training_state\.pt", ""),
        (r"(optimizer|scheduler|scaler)(?:_state)?\.(?:pt|bin)", r"\1"),
        (r"(optimizer|scheduler|dl_state_dict)_(\d+)\.bin", r"\1_\2"),
        (r"(dl_state_dict)\.bin", r"\1"),
        (r"(rng_state)\.pth", r"\1"),
        (r"(rng_state)_(?:rank_)?(\d+)\.pth?", r"\1_\2"),
        (r"(random_states|custom_checkpoint)_(\d+)\.pkl", r"\1_\2"),
        (r"(trainer|dataset)_state\.pt", r"\1"),
        (r"(checkpoint_metadata)\.pt", r"\1"),
        (r"pytorch_model_fsdp\.bin", "model"),
        (r"(?:model|pytorch_model)_(\d+)\.(?:safetensors|bin)", r"model_\1"),
        (r"(?![.])(.{1,80})\.(?:pt|pth|bin|pkl|safetensors)", r"\1"),
    )
]
"""Name → component; "" where the file's content is the state. The last one takes what the user's own code put there."""
_SURE = len(_COMPONENTS) - 2
"""The last two are names that also a checkpoint of one file may have."""
_FOLDERS = ((re.compile(r"pytorch_model_fsdp_0"), "model"), (re.compile(r"optimizer_0"), "optimizer"))
_REFUSED = (
    (re.compile(r"training_args\.bin"), "a pickled object of the program that wrote it"),
    (re.compile(r"sampler(_\d+)?\.bin", re.ASCII), "a pickled object of the program that wrote it"),
    (re.compile(r".*\.tmp|tmp.*"), "an unfinished save"),
    (
        re.compile(r"(bf16_)?zero_.*\.pt|mp_rank_.*\.pt|.*_rank\d+\.bin", re.ASCII),
        "one rank's share, which only ranks can read",
    ),
)
_JSON = {
    "config.json": "config",
    "generation_config.json": "generation_config",
    "adapter_config.json": "adapter_config",
}
_FOREIGN_CHARACTERS = re.compile(r"[^A-Za-z0-9_.-]")
_NAMED = 100


@dataclass
class Parts:
    """What the files of a folder are.

    Attributes:
        weights: those of the model.
        files: component → file or folder, those of ``weights`` included.
        json: component → name of the JSON file that is it.
        left_out: name → why it is no component.
        models: there are weights, of at least one model.
    """

    weights: Weights
    files: dict[str, Path] = field(default_factory=dict)
    json: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    models: bool = False


def parts_of(folder: Folder, read: Iterable[str]) -> Parts:
    """The parts of a checkpoint; ``read`` are the names that were read otherwise."""
    parts = Parts(weights_in(folder))
    if parts.weights.file:
        parts.files["model"] = parts.weights.file
    for name in sorted(folder.files.keys() - parts.weights.names - {*read, NO_MODEL}):
        _file(parts, folder, name)
    parts.models = "model" in parts.files
    for name in sorted(folder.folders):
        _folder(parts, folder, name)
    parts.left_out = shortened({**parts.left_out, **folder.left_out}, folder)
    return parts


def is_known(folder: Folder) -> bool:
    """Whether the folder has files that only a checkpoint has, by names that frameworks give; a quick look."""
    return any(name in WEIGHTS or 0 <= _component(name)[0] < _SURE for name in folder.files)


def refused(name: str) -> str | None:
    """Why a file of a well-known name is never imported; None of any other."""
    return next((why for pattern, why in _REFUSED if pattern.fullmatch(name)), None)


def shortened(left_out: Mapping[str, str], folder: Folder) -> dict[str, str]:
    """As many as a person reads, and the number of the others in ``folder``."""
    if len(left_out) <= _NAMED:
        return dict(left_out)
    more = f"and {len(left_out) - _NAMED} more"
    return dict(list(left_out.items())[:_NAMED]) | {f"{folder.path.name}/…": more}


def _file(parts: Parts, folder: Folder, name: str) -> None:
    why = refused(name)
    _, component = _component(name)
    if name in _JSON:
        parts.json[_JSON[name]] = name
    elif why or component is None:
        parts.left_out[name] = why or "no part of a training's state"
    elif folder.files[name] == 0:
        parts.left_out[name] = "empty"
    elif component in parts.files:
        parts.left_out[name] = f"the same component as {parts.files[component].name}"
    else:
        parts.files[component] = folder.path / name


def _component(name: str) -> tuple[int, str | None]:
    for number, (pattern, component) in enumerate(_COMPONENTS):
        if match := pattern.fullmatch(name):
            return number, _FOREIGN_CHARACTERS.sub("_", match.expand(component))
    return -1, None


def _folder(parts: Parts, folder: Folder, name: str) -> None:
    """A subfolder is a component if it is a DCP, or has weights: a checkpoint of several models."""
    try:
        inside = folder.child(name)
    except CheckpointError as error:
        parts.left_out[name] = error.message
        return
    component = next((known for pattern, known in _FOLDERS if pattern.fullmatch(name)), name)
    weights = weights_in(inside)
    if NUMBERED.fullmatch(name):
        parts.left_out[name] = "a checkpoint of its own"
    elif component in parts.files or _FOREIGN_CHARACTERS.search(component):
        parts.left_out[name] = "a folder that is no component"
    elif inside.files.get(".metadata"):
        parts.files[component] = inside.path
        parts.models = True
    elif weights.file:
        parts.files[component] = weights.file
        parts.models = True
    else:
        parts.left_out[name] = weights.missing or "a folder without weights that can be read"
