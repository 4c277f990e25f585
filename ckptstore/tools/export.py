"""A checkpoint as files of others: a model's folder for transformers, safetensors, ``torch.load``, DCP."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, Protocol, TypeAlias, get_args

import torch

from ckptstore.engine.catalogue import Checkpoint
from ckptstore.engine.tensorreader import BlockCache, TensorReader
from ckptstore.engine.workers import Progress
from ckptstore.errors import CheckpointError, FormatError
from ckptstore.format.tensorfile import BLOCK_BYTES
from ckptstore.state.select import Selection
from ckptstore.state.values import Json
from ckptstore.tools.exporting import huggingface
from ckptstore.tools.exporting.copying import CASTS
from ckptstore.tools.exporting.huggingface import ModelFolder
from ckptstore.tools.exporting.notes import Notes
from ckptstore.tools.exporting.place import local_path, require_space, workplace
from ckptstore.tools.exporting.tensorfiles import TensorsFile
from ckptstore.tools.exporting.torchfile import TorchFile
from ckptstore.tools.exporting.weights import Weights
from ckptstore.units import size_bytes
from ckptstore.view import View, check_patterns

Target: TypeAlias = Literal["hf", "safetensors", "torch", "dcp"]

MAX_SHARD_BYTES: Final = 5_000_000_000

# Of each rank's file a block is in use at a time, besides those that threads read.
_LEAST_BLOCKS, _MOST_BLOCKS, _SPARE_BLOCKS = 16, 36, 6


@dataclass(frozen=True)
class ExportReport:
    """What was exported.

    Attributes:
        checkpoint: which one.
        path: the file or folder.
        to: what it is.
        component: the path of the model in the state, where only that is in it; its names begin behind it.
        files: bytes of each file.
        tensors: how many are in it.
        read_bytes: stored bytes that were read for it.
        cast: what was converted, by name, with the type that it had.
        overflowed: what has infinite numbers only since, by name, with the type.
        converted: values that plain torch has no word for, by path, with what they are now.
        left_out: what isn't in it, by path, with the reason.
        lacks_config: ``from_pretrained`` needs a config.json that isn't there.
        seconds: how long it took.
    """

    checkpoint: Checkpoint
    path: Path
    to: Target
    component: str | None
    files: Mapping[str, int]
    tensors: int
    read_bytes: int
    cast: Mapping[str, str]
    overflowed: Mapping[str, str]
    converted: Mapping[str, str]
    left_out: Mapping[str, str]
    lacks_config: bool
    seconds: float

    @property
    def written_bytes(self) -> int:
        """Bytes of all files."""
        return sum(self.files.values())


def export(
    store: View,
    selector: str,
    path: str | os.PathLike[str],
    *,
    to: Target,
    only: Sequence[str] | None = None,
    dtype: str | None = None,
    max_shard_bytes: int | str = MAX_SHARD_BYTES,
    config: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ExportReport:
    """Write a checkpoint, or a part of it, as files that other programs read. It must be found whole.

    What it needs is read block by block, each proven, and goes to its places by several threads: a checkpoint larger
    than the memory is no matter, and those of several ranks come out as one. The files are written beside ``path``,
    and moved there when all of them are on the disk.

    - ``hf``: a folder that ``from_pretrained`` of transformers loads: one model, in shards, with an index.
    - ``safetensors``: one file with all tensors.
    - ``torch``: one file that ``torch.load(weights_only=True)`` reads: what ``store.load`` gives, with optimizers as
      their ``load_state_dict`` takes them.
    - ``dcp``: a folder that ``torch.distributed.checkpoint`` loads.

    Args:
        store: which it is in.
        selector: see ``Store.resolve``; ``latest`` is the newest, damaged or not.
        path: on this machine, not yet there.
        to: what it shall be.
        only: patterns of names, as ``["model/*"]``; for ``hf`` they must leave one model.
        dtype: bf16, fp16, fp32 or fp64: convert the floating-point tensors, but for those of 8 bits, of optimizers
            and of random states.
        max_shard_bytes: of ``hf``: the most in a file, as 5GB or a number; what is larger has one of its own.
        config: of ``hf``: a folder whose config.json, tokenizer and code are copied.
        overwrite: replace what is there.
        progress: called with (bytes done, bytes in all), from any thread.

    Raises:
        NoCheckpointError, NotFoundError: as ``resolve``, or there is no folder for it, or no config.json.
        FormatError: an argument that can't be.
        ExistsError: something is there.
        StateError: there is nothing to export, or several models, or what the files have no room for.
        IntegrityError: what has to be read is damaged.
        StorageFullError: there is no room for it.
        StorageError: the storage failed, or the disk.
    """
    begin = time.monotonic()
    order = _order(path, to, dtype, max_shard_bytes, config)
    check_patterns(only)
    checkpoint = store.resolve(selector)
    with (
        workplace(order.path, folder=to in ("hf", "dcp"), overwrite=overwrite, is_one=_is_one(to)) as work,
        store.reader(checkpoint.id, cache=_cache(checkpoint)) as reader,
    ):
        tree = reader.tree if only is None else Selection(only, whole_statefuls=False).prune(reader.tree)
        notes = Notes()
        try:
            job = _planned(to, order, checkpoint, reader, tree, notes)
        except CheckpointError:
            raise
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            raise FormatError(f"the tree of {checkpoint.id} is malformed: {error!r}", id=checkpoint.id) from error
        require_space(order.path, job.nbytes)
        job.work.write(work, progress)
        files, read_bytes = _sizes(work), reader.read_bytes
    return ExportReport(
        checkpoint=checkpoint,
        path=order.path,
        to=to,
        component=job.component,
        files=files,
        tensors=job.tensors,
        read_bytes=read_bytes,
        cast=notes.cast,
        overflowed=notes.overflowed,
        converted=notes.converted,
        left_out=notes.left_out,
        lacks_config=to == "hf" and config is None,
        seconds=time.monotonic() - begin,
    )


class _Order(NamedTuple):
    """What was asked for, checked."""

    path: Path
    dtype: torch.dtype | None
    max_shard_bytes: int
    config: Sequence[Path]


def _order(
    path: str | os.PathLike[str],
    to: str,
    dtype: str | None,
    max_shard_bytes: int | str,
    config: str | os.PathLike[str] | None,
) -> _Order:
    if to not in get_args(Target):
        raise FormatError(f"to={to!r} must be one of {', '.join(get_args(Target))}")
    if dtype is not None and dtype not in CASTS:
        raise FormatError(f"dtype={dtype!r} must be one of {', '.join(CASTS)}")
    limit = size_bytes(max_shard_bytes, "max_shard_bytes")
    if to != "hf" and (config is not None or limit != MAX_SHARD_BYTES):
        raise FormatError(f"config and max_shard_bytes are for to='hf', not for {to!r}")
    files = huggingface.config_files(Path(config)) if config is not None else []
    return _Order(local_path(path), CASTS[dtype] if dtype is not None else None, limit, files)


class _Work(Protocol):
    def write(self, work: Path, progress: Progress | None) -> None: ...


class _Job(NamedTuple):
    """An export that is planned."""

    work: _Work
    tensors: int
    nbytes: int
    component: str | None = None


def _planned(to: Target, order: _Order, checkpoint: Checkpoint, reader: TensorReader, tree: Json, notes: Notes) -> _Job:
    if to == "torch":
        file = TorchFile(reader, tree, order.dtype, notes)
        return _Job(file, file.tensors, file.nbytes)
    if to == "dcp":
        # Who doesn't ask for it needn't wait until it is imported.
        from ckptstore.tools.exporting.dcp import Export

        folder = Export(reader, tree, order.dtype, notes)
        return _Job(folder, folder.tensors, folder.nbytes)
    weights, metadata = Weights(reader, order.dtype, notes), _metadata(checkpoint)
    work: ModelFolder | TensorsFile
    component: str | None
    if to == "hf":
        component, found = weights.model(tree)
        options: dict[str, Any] = {"limit": order.max_shard_bytes, "config": order.config, "dtype": order.dtype}
        work = ModelFolder(reader, found, metadata, notes, **options)
    else:
        component, found = weights.all(tree)
        work = TensorsFile(reader, found, metadata, notes)
    return _Job(work, len(found), sum(weight.nbytes for weight in found), component)


def _metadata(checkpoint: Checkpoint) -> dict[str, str]:
    """What the header of a safetensors file says of itself; transformers wants to know the format."""
    epoch = {} if checkpoint.epoch is None else {"epoch": str(checkpoint.epoch)}
    return {"format": "pt", "checkpoint": checkpoint.id, "step": str(checkpoint.step), **epoch}


def _cache(checkpoint: Checkpoint) -> BlockCache:
    return BlockCache(min(_MOST_BLOCKS, max(_LEAST_BLOCKS, checkpoint.world_size + _SPARE_BLOCKS)) * BLOCK_BYTES)


def _is_one(to: Target) -> Callable[[Path], bool]:
    return _is_dcp if to == "dcp" else huggingface.is_one


def _is_dcp(folder: Path) -> bool:
    return (folder / ".metadata").is_file()


def _sizes(work: Path) -> dict[str, int]:
    files = [work] if work.is_file() else sorted(path for path in work.iterdir())
    return {file.name: file.stat().st_size for file in files}
