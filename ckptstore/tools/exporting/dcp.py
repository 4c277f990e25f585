"""A folder that ``torch.distributed.checkpoint`` loads, written by its own writer of files, a chunk at a time."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property, lru_cache
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType

from ckptstore.engine.tensorreader import TensorReader
from ckptstore.engine.workers import Meter, Progress
from ckptstore.errors import StateError
from ckptstore.state.tensors import TensorSpec
from ckptstore.state.values import Json
from ckptstore.storage.posix import os_errors
from ckptstore.tools.elements import read_elements
from ckptstore.tools.exporting.copying import cast_bytes, cast_of, converted
from ckptstore.tools.exporting.notes import Notes
from ckptstore.tools.exporting.plain import Values, is_loadable_type
from ckptstore.tools.exporting.trees import module_names

CHUNK_BYTES = 64 << 20
"""The most of a tensor that is in memory at a time."""

_METADATA = ".metadata"


class Chunk(NamedTuple):
    """A box of a tensor whose elements lie in a row."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


class _Stored(NamedTuple):
    """What a tensor without memory stands for."""

    tensor: torch.Tensor
    name: str
    dtype: torch.dtype
    cast: torch.dtype | None


def is_one(folder: Path) -> bool:
    """Whether a folder is a checkpoint of DCP's."""
    return (folder / _METADATA).is_file()


def chunks_of(shape: tuple[int, ...], item_bytes: int, limit: int = CHUNK_BYTES) -> Iterator[Chunk]:
    """Boxes of at most ``limit`` bytes that make up a tensor, in order; one at least."""
    split = next((n for n in range(len(shape)) if prod(shape[n + 1 :]) * item_bytes <= limit), None)
    if split is None or prod(shape) * item_bytes <= limit:
        yield Chunk((0,) * len(shape), shape)
        return
    rows = max(1, limit // (prod(shape[split + 1 :]) * item_bytes))
    rest = len(shape) - split - 1
    for leading in product(*map(range, shape[:split])):
        for begin in range(0, shape[split], rows):
            sizes = (1,) * split + (min(rows, shape[split] - begin),) + shape[split + 1 :]
            yield Chunk((*leading, begin, *(0,) * rest), sizes)


@lru_cache
def _has_size(dtype: torch.dtype) -> bool:
    """Whether DCP knows how large elements of a type are."""
    if not is_loadable_type(dtype):
        return False
    try:
        return bool(torch._utils._element_size(dtype) == dtype.itemsize)  # type: ignore[no-untyped-call]
    except TypeError:
        return False


class Export(SavePlanner):
    """The plan of what DCP's writer shall write, which asks for each piece when it comes to it.

    Attributes:
        nbytes: of the tensors.
    """

    def __init__(self, reader: TensorReader, tree: Json, dtype: torch.dtype | None, notes: Notes) -> None:
        """Nothing is read yet.

        Raises:
            StateError: the state is no dict, or DCP would call two entries alike.
        """
        self._reader, self._dtype, self._notes = reader, dtype, notes
        self._stored: dict[int, _Stored] = {}
        state = Values(reader, self._stand_in, notes, takes=_has_size, names=module_names(tree)).make(tree)
        if not isinstance(state, dict):
            raise StateError("what was saved is no dict, and DCP takes nothing else: export it to torch", path="")
        try:
            self._flat, self._paths = flatten_state_dict(state)
        except ValueError as error:
            raise StateError(f"DCP has one name for two entries: {error}", path="") from error
        self._state = state
        self.nbytes = sum(cast_bytes(reader.tensors[it.name], it.cast) for it in self._tensors.values())
        self._meter = Meter(0, None)

    @property
    def tensors(self) -> int:
        """How many there are."""
        return len(self._tensors)

    def write(self, folder: Path, progress: Progress | None) -> None:
        """Write it.

        Raises:
            IntegrityError: a block is damaged.
            StorageError: the storage failed, or the disk.
        """
        self._meter = Meter(self.nbytes, progress)
        # By one thread the pieces are written as they lie on storage; each of several would have its own order.
        writer = FileSystemWriter(folder, thread_count=1, single_file_per_rank=True)
        with os_errors("write", str(folder), str(folder)):
            writer.reset(folder)
            writer.set_up_storage_writer(True)
            local = writer.prepare_local_plan(self.create_local_plan())
            plans, metadata = self.create_global_plan([local])
            plan = self.finish_plan(writer.prepare_global_plan(plans)[0])
            results = writer.write_data(plan, self).wait()
            writer.finish(metadata, [results])

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: all is known."""

    def create_local_plan(self) -> SavePlan:
        """All there is to write: tensors as they lie on storage, then values."""
        tensors = self._tensors
        places = {name: number for number, name in enumerate(self._reader.tensors)}
        keys = sorted(tensors, key=lambda key: places[tensors[key].name])
        items = [self._item(key, chunk) for key in keys for chunk in self._chunks(tensors[key])]
        items += [WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in self._flat if key not in tensors]
        return SavePlan(items, planner_data=self._paths)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """The plan and what the metadata say of it."""
        plans, metadata = create_default_global_save_plan(all_plans)
        # In the order of the state, not in that of the writing.
        entries = {key: metadata.state_dict_metadata[key] for key in self._flat}
        return plans, replace(metadata, state_dict_metadata=entries, planner_data=self._paths)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """As it is."""
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        """What the writer shall write next."""
        key = write_item.index.fqn
        if write_item.type is WriteItemType.BYTE_IO:
            file = io.BytesIO()
            torch.save(self._filled(self._flat[key]), file)
            return file
        data = write_item.tensor_data
        assert data is not None
        found = self._read(self._tensors[key], Chunk(tuple(data.chunk.offsets), tuple(data.chunk.sizes)))
        self._meter.add(found.nbytes)
        return found

    def _stand_in(self, spec: TensorSpec, dtype: torch.dtype, shape: tuple[int, ...], model: bool) -> torch.Tensor:
        cast = cast_of(self._reader.tensors[spec.name], self._dtype) if model else None
        if cast is not None:
            self._notes.cast[spec.name] = str(dtype).removeprefix("torch.")
        made = torch.empty(shape, dtype=cast or dtype, device="meta")
        self._stored[id(made)] = _Stored(made, spec.name, dtype, cast)
        return made

    @cached_property
    def _tensors(self) -> Mapping[str, _Stored]:
        return {key: self._stored[id(it)] for key, it in self._flat.items() if id(it) in self._stored}

    @staticmethod
    def _chunks(stored: _Stored) -> Iterator[Chunk]:
        return chunks_of(tuple(stored.tensor.shape), max(stored.dtype.itemsize, stored.tensor.itemsize))

    def _item(self, key: str, chunk: Chunk) -> WriteItem:
        tensor = self._flat[key]
        offsets, sizes = torch.Size(chunk.offsets), torch.Size(chunk.sizes)
        data = TensorWriteData(
            ChunkStorageMetadata(offsets, sizes), TensorProperties(dtype=tensor.dtype), torch.Size(tensor.shape)
        )
        return WriteItem(MetadataIndex(key, offsets), WriteItemType.SHARD, tensor_data=data)

    def _read(self, stored: _Stored, chunk: Chunk) -> torch.Tensor:
        begin = 0
        for offset, size in zip(chunk.offsets, stored.tensor.shape, strict=True):
            begin = begin * size + offset
        found = read_elements(self._reader, stored.name, begin, prod(chunk.sizes))
        if stored.cast is not None:
            found = converted(found, stored.cast, stored.name, self._notes)
        return found.reshape(chunk.sizes)

    def _filled(self, value: Any) -> Any:
        """A value with its tensors, as a tuple may hold."""
        if isinstance(value, torch.Tensor):
            stored = self._stored[id(value)]
            shape = tuple(value.shape)
            return self._read(stored, Chunk((0,) * len(shape), shape))
        if type(value) in (tuple, list):
            return type(value)(map(self._filled, value))
        if isinstance(value, dict):
            made = {key: self._filled(item) for key, item in value.items()}
            return made if type(value) is dict else type(value)(made)
        return value
