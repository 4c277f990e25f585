"""Which files of a folder are a model's weights, and whether they are all there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckptstore.errors import FormatError, StorageError
from ckptstore.tools.importing.folder import Folder

WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.bin",
    "adapter_model.safetensors",
    "adapter_model.bin",
)
"""In the order in which they are looked for, as the frameworks do; several mean the same weights twice."""
_INDEX = ".index.json"


@dataclass(frozen=True)
class Weights:
    """A model's weights in a folder.

    Attributes:
        file: with the weights, or the index of the files with them; None where there are none that are complete.
        names: of all files that belong to it, and of those that hold the same again.
        missing: why there are none, where there is something; "" without.
    """

    file: Path | None
    names: frozenset[str]
    missing: str = ""


def weights_in(folder: Folder) -> Weights:
    """The weights of the folder's model."""
    found: Path | None = None
    names: set[str] = set()
    missing: list[str] = []
    for name in (name for name in WEIGHTS if name in folder.files):
        shards, problem = _shards(folder, name) if name.endswith(_INDEX) else ([], "")
        names |= {name, *shards}
        if folder.files[name] == 0:
            problem = f"{name} is empty"
        if problem:
            missing.append(problem)
        elif found is None:
            found = folder.path / name
    return Weights(found, frozenset(names), "; ".join(missing))


def _shards(folder: Folder, name: str) -> tuple[list[str], str]:
    """The files that an index names, and what is wrong with them."""
    try:
        shards = _named(folder.read_json(name), name)
    except (FormatError, StorageError) as error:
        return [], error.message
    strange = [shard for shard in shards if "/" in shard or shard in ("", ".", "..")]
    if strange:
        return [], f"{name} names {strange[0]!r}, which is no file beside it"
    absent = [shard for shard in shards if not folder.files.get(shard)]
    if not absent:
        return shards, ""
    more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
    why = folder.left_out.get(absent[0]) or ("empty" if absent[0] in folder.files else "not there")
    return [shard for shard in shards if shard in folder.files], f"{name} names {absent[0]}{more}: {why}"


def _named(index: Any, name: str) -> list[str]:
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not places or not all(isinstance(place, str) for place in places.values()):
        raise FormatError(f"{name} has no weight_map of tensors and the files they lie in")
    return sorted(set(places.values()))
