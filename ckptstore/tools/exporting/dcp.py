"""A folder that ``torch.distributed.checkpoint`` loads, written a chunk at a time."""

from __future__ import annotations

import io
import threading
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
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, StorageMeta, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from ckptstore.engine.tensorreader import TensorReader
from ckptstore.engine.workers import Meter, Progress, default_threads, run
from ckptstore.errors import StateError
from ckptstore.state.tensors import TensorSpec
from ckptstore.state.values import Json
from ckptstore.storage.posix import os_errors, pwrite_all
from ckptstore.tools.exporting.copying import Part, cast_bytes, cast_of, converted, parts
from ckptstore.tools.exporting.notes import Notes
from ckptstore.tools.exporting.plain import Values, is_loadable_type
from ckptstore.tools.exporting.tensorfiles import write_new
from ckptstore.tools.exporting.trees import module_names

CHUNK_BYTES = 8 << 20
"""The most of a tensor that is in memory at a time."""

_FILE = "__0_0.distcp"
_THREADS = 4


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


def chunks_of(shape: tuple[int, ...], item_bytes: int, limit: int) -> Iterator[Chunk]:
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


class _File:
    """The file of one rank of DCP's: archives of ``torch.save``, one after the other; any thread.

    DCP's own writer keeps all tensors in memory until such a file is complete.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.results = path, list[WriteResult]()
        self._end = 0
        self._lock = threading.Lock()

    def append(self, index: MetadataIndex, value: Any) -> None:
        """Write a value, or a piece of a tensor."""
        archive = io.BytesIO()
        torch.save(value, archive)
        with archive.getbuffer() as data, self.path.open("r+b", buffering=0) as stream:
            with self._lock:
                begin, self._end = self._end, self._end + len(data)
                place = _StorageInfo(self.path.name, begin, len(data))
                self.results.append(WriteResult(index, len(data), place))
            pwrite_all(stream.fileno(), data, begin)


class _Writer(FileSystemWriter):
    """DCP's own writer, for the metadata, which are a pickle."""

    def storage_meta(self) -> StorageMeta:
        """Nothing of the folder in which it is written: it will have another name."""
        return StorageMeta()


def _nbytes(item: WriteItem) -> int:
    """Bytes of what is to be written, if it is a tensor."""
    data = item.tensor_data
    return 0 if data is None else prod(data.chunk.sizes) * data.properties.dtype.itemsize


class Export:
    """A folder that is planned.

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
        items = list(self._items())
        _, metadata = create_default_global_save_plan([SavePlan(items)])
        # In the order of the state, not in that of the writing.
        entries = {key: metadata.state_dict_metadata[key] for key in self._flat}
        metadata = replace(metadata, state_dict_metadata=entries, planner_data=self._paths)
        file = _File(folder / _FILE)
        meter = Meter(self.nbytes, progress)

        def write(item: WriteItem) -> None:
            file.append(item.index, self._value(item))
            meter.add(_nbytes(item))

        with os_errors("write", str(folder), str(folder)):
            write_new(file.path, b"")
            run(items, write, threads=min(_THREADS, default_threads()))
            _Writer(folder).finish(metadata, [file.results])

    def _items(self) -> Iterator[WriteItem]:
        """All there is to write: tensors as they lie on storage, then values."""
        keys: dict[str, list[str]] = {}
        for key, stored in self._tensors.items():
            keys.setdefault(stored.name, []).append(key)
        for part in parts(self._reader, keys):
            for key in keys[part.name]:
                for chunk in self._chunks(self._tensors[key], part):
                    yield self._item(key, chunk)
        for key in self._flat:
            if key not in self._tensors:
                yield WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO)

    def _value(self, item: WriteItem) -> Any:
        key = item.index.fqn
        if item.tensor_data is None:
            return self._filled(self._flat[key])
        box = item.tensor_data.chunk
        return self._read(self._tensors[key], Chunk(tuple(box.offsets), tuple(box.sizes)))

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
    def _chunks(stored: _Stored, part: Part) -> Iterator[Chunk]:
        shape, item = tuple(stored.tensor.shape), max(stored.dtype.itemsize, stored.tensor.itemsize)
        if not shape:
            yield Chunk((), ())
            return
        for offsets, sizes in chunks_of((part.rows, *shape[1:]), item, CHUNK_BYTES):
            yield Chunk((part.row + offsets[0], *offsets[1:]), sizes)

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
        count, size = prod(chunk.sizes), stored.dtype.itemsize
        image = torch.empty(count * size, dtype=torch.uint8)
        self._reader.read_into(stored.name, begin * size, image.numpy().data)
        found = image.view(stored.dtype)
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
