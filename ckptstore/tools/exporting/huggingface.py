"""A folder that ``from_pretrained`` of transformers loads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ckptstore.engine.tensorreader import TensorReader
from ckptstore.engine.workers import Progress
from ckptstore.errors import FormatError, NotFoundError
from ckptstore.state.dtypes import torch_name
from ckptstore.storage.posix import os_errors
from ckptstore.tools.exporting.copying import copy_tensors
from ckptstore.tools.exporting.notes import Notes
from ckptstore.tools.exporting.tensorfiles import Weight, lay_out, write_new

_ONE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_WRAPPERS = ("module.", "_orig_mod.")
"""Prefixes that DistributedDataParallel and torch.compile give all names."""

_TEXTS = frozenset({".json", ".txt", ".model", ".jinja", ".tiktoken", ".spm", ".py"})
_NO_TEXTS = frozenset({"trainer_state.json", "all_results.json", "train_results.json", "eval_results.json"})


def is_one(folder: Path) -> bool:
    """Whether a folder is a model's, as ``from_pretrained`` loads it."""
    return any((folder / name).is_file() for name in (_ONE, _INDEX))


def unwrapped(weights: Sequence[Weight]) -> list[Weight]:
    """The same, without the prefixes of wrappers."""
    found = list(weights)
    while prefix := next((p for p in _WRAPPERS if all(weight.name.startswith(p) for weight in found)), None):
        found = [weight._replace(name=weight.name.removeprefix(prefix)) for weight in found]
    return found


def shards(weights: Sequence[Weight], limit: int) -> dict[str, list[Weight]]:
    """The files by their names, filled one after the other, as ``save_pretrained`` does it.

    What is larger than the limit has a file of its own.
    """
    files: list[list[Weight]] = []
    current: list[Weight] = []
    size = 0
    for weight in weights:
        if weight.nbytes > limit:
            files.append([weight])
            continue
        if size + weight.nbytes > limit:
            files.append(current)
            current, size = [], 0
        current.append(weight)
        size += weight.nbytes
    files += [current] if current else []
    if len(files) == 1:
        return {_ONE: files[0]}
    return {f"model-{number:05d}-of-{len(files):05d}.safetensors": file for number, file in enumerate(files, 1)}


class ModelFolder:
    """A model's folder that is planned.

    Attributes:
        weights: what is in it.
    """

    def __init__(
        self,
        reader: TensorReader,
        weights: Sequence[Weight],
        metadata: Mapping[str, str],
        notes: Notes,
        *,
        limit: int,
        config: Sequence[Path],
        dtype: torch.dtype | None,
    ) -> None:
        self._reader, self._metadata, self._notes = reader, metadata, notes
        self._limit, self._config, self._dtype = limit, config, dtype
        self.weights = unwrapped(weights)

    def write(self, work: Path, progress: Progress | None) -> None:
        """Write it, the index last.

        Raises:
            FormatError, StateError, StorageError: as ``lay_out``.
            IntegrityError: a block is damaged.
        """
        files = shards(self.weights, self._limit)
        spans = [span for name, file in files.items() for span in lay_out(work / name, file, self._metadata)]
        copy_config(self._config, work, self._dtype)
        copy_tensors(self._reader, spans, self._notes, progress)
        if _ONE not in files:
            write_new(work / _INDEX, json.dumps(self._index(files), indent=2).encode() + b"\n")

    def _index(self, files: Mapping[str, Sequence[Weight]]) -> dict[str, Any]:
        places = {weight.name: name for name, file in files.items() for weight in file}
        total = sum(weight.nbytes for weight in self.weights)
        return {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}


def config_files(source: Path) -> list[Path]:
    """The files of a model besides its weights: configuration, tokenizer, code.

    Raises:
        NotFoundError: there is no config.json.
    """
    if not (source / "config.json").is_file():
        raise NotFoundError(
            f"{source} has no config.json: name the folder of the model that was trained, as save_pretrained made it, "
            "or write one by model.config.save_pretrained(folder)",
            key=str(source),
        )
    return sorted(
        path
        for path in source.iterdir()
        if path.suffix in _TEXTS
        and path.is_file()
        and not path.name.endswith(".index.json")
        and path.name not in _NO_TEXTS
    )


def copy_config(files: Sequence[Path], folder: Path, dtype: Any) -> None:
    """Copy them, with the model's type in the configuration where all of it was converted.

    Raises:
        FormatError: the configuration isn't JSON.
        StorageError: the disk failed.
    """
    for file in files:
        with os_errors("copy", str(file), str(file)):
            if file.name != "config.json" or dtype is None:
                shutil.copyfile(file, folder / file.name)
                continue
            text = file.read_bytes()
        write_new(folder / file.name, _with_type(text, torch_name(dtype), file))


def _with_type(text: bytes, dtype: str, file: Path) -> bytes:
    try:
        config = json.loads(text)
        # By the older name where it stands: older releases know no other.
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
    except (ValueError, TypeError) as error:
        raise FormatError(f"{file} is no configuration of a model: {error}", key=str(file)) from error
    return json.dumps(config, indent=2).encode() + b"\n"
