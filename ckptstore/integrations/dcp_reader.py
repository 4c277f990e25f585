"""``CkptStoreReader``: what ``dcp.load`` reads, from a store."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from math import prod
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from ckptstore.engine.buffers import copy_bytes
from ckptstore.engine.catalogue import Checkpoint
from ckptstore.engine.contents import Contents, DataFile, read_contents
from ckptstore.engine.loader import Loader
from ckptstore.engine.reader import read_pieces, read_tensors
from ckptstore.engine.workers import Progress
from ckptstore.errors import CheckpointError, FormatError, StateError, UnavailableError
from ckptstore.format.regions import Region, runs
from ckptstore.format.tensorfile import ITEM_BYTES
from ckptstore.integrations.dcp_planners import CkptStoreLoadPlanner
from ckptstore.integrations.dcp_tree import entries
from ckptstore.state.dtypes import torch_dtype
from ckptstore.state.inplace import PLAIN_TENSORS
from ckptstore.state.merge import merged
from ckptstore.state.restore import restore_plain
from ckptstore.state.staging import fence_all
from ckptstore.state.tensors import Destination, TensorSpec, tensor_shape
from ckptstore.state.values import TAG, Json
from ckptstore.store import Store


class CkptStoreReader(StorageReader):
    """Loads from a store what DCP plans: on any number of ranks, spread in any way, only the blocks that hold it.

    It reads what ``CkptStoreWriter`` has saved, and ``Store.save``: of that modules and optimizers as DCP's
    ``get_state_dict`` gives them. Each rank makes its own::

        dcp.load(state, storage_reader=CkptStoreReader(store, "best:val_loss"))

    Nothing that is loaded can run, also with DCP's own planner, which unpickles objects: what it gets was made here, of
    JSON. DCP wraps all errors raised here in its ``CheckpointException``, which names the ranks. Damage is such an
    error, too; unlike in ``Store.load``, ``latest`` doesn't go back to an older checkpoint then.

    Attributes:
        checkpoint: what was found; None before.
    """

    def __init__(self, store: Store, selector: str = "latest", *, progress: Progress | None = None) -> None:
        """Nothing is read yet.

        Args:
            store: where to load from.
            selector: see ``Store.resolve``; ``checkpoint_id`` of ``dcp.load`` goes before it.
            progress: called with (bytes done, bytes in all) of this rank.
        """
        super().__init__()
        self._store, self._selector, self._progress = store, selector, progress
        self._found: _Found | None = None

    @property
    def checkpoint(self) -> Checkpoint | None:
        return self._found.checkpoint if self._found is not None else None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin anew, with another selector where one is given."""
        self._found = None
        if checkpoint_id is not None:
            self._selector = os.fspath(checkpoint_id)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What the checkpoint holds, as DCP wants to know it.

        An error is raised by whoever looks at it: DCP would take it for a checkpoint of another kind.

        Raises:
            NoCheckpointError: the store is there and empty.
            NotFoundError, FormatError, IntegrityError: no such checkpoint, or it is damaged.
            StateError: what was saved is no dict.
        """
        try:
            self._found = _find(self._store, self._selector)
        except CheckpointError as error:
            return _Unreadable(error)
        return self._found.metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing, if the metadata could be read; else their error."""
        if isinstance(metadata, _Unreadable):
            raise metadata.error

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Note which checkpoint this rank has found."""
        return replace(plan, storage_data=self._looked_at.checkpoint.id)

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """On the first rank: see that all have found the same one.

        Raises:
            UnavailableError: a save was committed while they looked.
        """
        if len(ids := {str(plan.storage_data) for plan in plans}) > 1:
            raise UnavailableError(
                f"the ranks have found different checkpoints ({', '.join(sorted(ids))}), as one was saved meanwhile: "
                "load again, or name one by its id"
            )
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read what this rank needs, each block checked before its bytes reach a tensor.

        Raises:
            IntegrityError: a block is damaged, here and in every backup; tensors may be partly filled.
            StorageError: the storage failed.
        """
        found = self._looked_at
        # Loading writes to memory directly, unseen by hooks and version counters.
        fence_all()
        with self._store.loading(found.checkpoint, self._progress) as loader:
            _Reading(found, plan, planner).run(loader)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether a place is one for this reader: it must always be given an open store."""
        return False

    @property
    def _looked_at(self) -> _Found:
        assert self._found is not None, "read_metadata comes first"
        return self._found


class _Unreadable(Metadata):
    """Metadata that can't be read: whoever looks at them is told why."""

    def __init__(self, error: CheckpointError) -> None:
        self.error = error

    def __getattr__(self, name: str) -> Any:
        raise self.error


class _StoredFile(DataFile):
    """A data file whose tensors and shards all stand for themselves."""

    def name(self, index: int) -> str:
        """Unique among all files of a checkpoint."""
        return f"{self.key}#{index}"

    def region(self, index: int) -> Region:
        """All of it."""
        return Region.whole(self.stream.rows[index].shape)


class _Apart(Contents):
    """A checkpoint's stored tensors, none of which is a part of another."""

    @cached_property
    def files(self) -> list[DataFile]:
        return [_StoredFile(file.entry, file.stream) for file in Contents(self.commit, self.digest, self.parts).files]


class _Chunk(NamedTuple):
    """A stored tensor, as a piece of what it belongs to."""

    stored: str
    """Its name among the stored ones."""
    spec: TensorSpec
    region: Region


class _Found(NamedTuple):
    """A checkpoint, and what DCP may ask for."""

    checkpoint: Checkpoint
    contents: Contents
    metadata: Metadata
    nodes: Mapping[str, Json]
    chunks: Mapping[tuple[str, tuple[int, ...]], _Chunk]
    """By DCP's key and offset."""


def _find(store: Store, selector: str) -> _Found:
    checkpoint = store.resolve(selector)
    with store.loading(checkpoint, None) as loader:
        contents = read_contents(loader.storage, checkpoint.record, loader.rescue)
    trees = list(contents.trees.values())
    nodes, planner_data = entries(merged(trees, 0) if len(trees) > 1 else trees[0])
    pieces = _pieces(contents)
    metadata: dict[str, Any] = {}
    chunks: dict[tuple[str, tuple[int, ...]], _Chunk] = {}
    for key, node in nodes.items():
        if not isinstance(node, dict) or node.get(TAG) != "tensor":
            metadata[key] = BytesStorageMetadata()
            continue
        name = node.get("name")
        row = contents.tensors.get(name) if isinstance(name, str) else None
        if row is None:
            raise FormatError(f"{key!r} refers to the tensor {name!r}, which {checkpoint.id} doesn't have")
        spec = TensorSpec(str(name), row.dtype, row.shape, row.logical)
        metadata[key], found = _tensor(spec, pieces[spec.name])
        chunks |= {(key, offset): chunk for offset, chunk in found}
    return _Found(checkpoint, contents, Metadata(metadata, planner_data=planner_data), nodes, chunks)


def _pieces(contents: Contents) -> dict[str, list[tuple[str, Region]]]:
    """Stored name and place of all pieces of each tensor."""
    pieces: dict[str, list[tuple[str, Region]]] = {}
    for file in contents.files:
        stored = _StoredFile(file.entry, file.stream)
        for row in range(len(file.stream.rows)):
            pieces.setdefault(file.name(row), []).append((stored.name(row), file.region(row)))
    return pieces


def _tensor(
    spec: TensorSpec, pieces: Sequence[tuple[str, Region]]
) -> tuple[TensorStorageMetadata, list[tuple[tuple[int, ...], _Chunk]]]:
    dtype = torch_dtype(spec.dtype, spec.logical)
    shape = tensor_shape(spec, dtype)
    # Some types are stored as several elements each.
    boxes = [(region.offset[: len(shape)], region.shape[: len(shape)]) for _, region in pieces]
    metadata = TensorStorageMetadata(
        TensorProperties(dtype=dtype),
        torch.Size(shape),
        [ChunkStorageMetadata(torch.Size(offset), torch.Size(sizes)) for offset, sizes in boxes],
    )
    chunks = [_Chunk(stored, spec, region) for stored, region in pieces]
    return metadata, [(offset, chunk) for (offset, _), chunk in zip(boxes, chunks, strict=True)]


class _Reading:
    """One rank's reading of what its plan says."""

    def __init__(self, found: _Found, plan: LoadPlan, planner: LoadPlanner) -> None:
        self._found, self._planner = found, planner
        self._objects = [item for item in plan.items if item.type is LoadItemType.BYTE_IO]
        self._targets: list[_Target] = []
        self._wanted: dict[str, _Wanted] = {}
        for item in plan.items:
            if item.type is not LoadItemType.BYTE_IO and item.lengths.numel():
                self._add(item)

    def _add(self, item: ReadItem) -> None:
        chunk = self._found.chunks.get((item.storage_index.fqn, tuple(item.storage_index.offset or ())))
        if chunk is None:
            raise StateError(f"{item.storage_index} was planned, and is not in {self._found.checkpoint.id}")
        target = _Target(item, chunk, self._planner.resolve_tensor(item).detach())
        self._targets.append(target)
        self._wanted.setdefault(chunk.stored, _Wanted()).add(target)

    def run(self, loader: Loader) -> None:
        contents = self._found.contents
        apart = _Apart(contents.commit, contents.digest, contents.parts)
        options: Any = {"pool": loader.pool, "threads": loader.threads, "rescue": loader.rescue}
        read_pieces(loader.storage, apart, self._wanted, _Wanted.take, progress=loader.progress, **options)
        for target in self._targets:
            self._planner.commit_tensor(target.item, target.tensor)
        nodes = [self._found.nodes[item.storage_index.fqn] for item in self._objects]
        specs = [TensorSpec(name, row.dtype, row.shape, row.logical) for name, row in contents.tensors.items()]
        restoration = restore_plain(nodes, specs)
        read_tensors(loader.storage, contents, restoration.wanted, **options)
        values: Any = restoration.finish()
        for item, value in zip(self._objects, values, strict=True):
            self._give(item, value)

    def _give(self, item: ReadItem, value: object) -> None:
        if isinstance(self._planner, CkptStoreLoadPlanner):
            self._planner.load_object(item, value)
            return
        # DCP's own planner unpickles it. It was made of JSON a moment ago, so that nothing foreign is in it.
        stream = io.BytesIO()
        try:
            torch.save(value, stream)
        except Exception as error:
            key = item.storage_index.fqn
            raise StateError(
                f"{key!r} holds what DCP's own planner can't take ({error!r:.200}): load with CkptStoreLoadPlanner()",
                path=key,
            ) from error
        stream.seek(0)
        self._planner.load_bytes(item, stream)


class _Target:
    """Where a part of a stored tensor goes."""

    def __init__(self, item: ReadItem, chunk: _Chunk, tensor: torch.Tensor) -> None:
        self.item, self.tensor = item, tensor
        lengths, spec = tuple(item.lengths), chunk.spec
        if tensor.shape != item.lengths:
            raise StateError(
                f"the planner gave {list(tensor.shape)} for {list(lengths)} of {spec.name!r}", path=spec.name
            )
        tail = chunk.region.shape[len(lengths) :]
        self.region = Region((*item.storage_offsets, *(0,) * len(tail)), lengths + tail)
        self.item_bytes = ITEM_BYTES[spec.dtype]
        self._bytes_left = prod(self.region.shape) * self.item_bytes
        self._straight = _is_straight(tensor, torch_dtype(spec.dtype, spec.logical))
        own = spec._replace(shape=self.region.shape)
        self._destination: Destination | None = Destination(own, tensor if self._straight else None)
        self._lock = threading.Lock()

    def put(self, begin: int, data: memoryview) -> None:
        """Take the bytes of it that begin at ``begin``; any thread."""
        assert self._destination is not None
        copy_bytes(self._destination.host()[begin : begin + len(data)], data)
        with self._lock:
            self._bytes_left -= len(data)
            done = not self._bytes_left
        if done:
            if not self._straight:
                with torch.no_grad():
                    self.tensor.copy_(self._destination.tensor())
            self._destination = None


def _is_straight(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether the bytes may go into the tensor's own memory."""
    plain = type(tensor) in PLAIN_TENSORS and tensor.layout is torch.strided and not tensor.is_neg()
    return plain and tensor.is_cpu and tensor.dtype == dtype and tensor.is_contiguous() and not tensor.is_conj()


class _Wanted:
    """All that is wanted of one stored tensor."""

    def __init__(self) -> None:
        self.targets: list[_Target] = []

    def add(self, target: _Target) -> None:
        self.targets.append(target)

    @cached_property
    def region(self) -> Region:
        """The smallest box around all of it; asked for when all have been added."""
        boxes = [target.region for target in self.targets]
        low = tuple(map(min, zip(*(box.offset for box in boxes), strict=True)))
        ends = [tuple(map(sum, zip(*box, strict=True))) for box in boxes]
        high = map(max, zip(*ends, strict=True))
        return Region(low, tuple(b - a for a, b in zip(low, high, strict=True)))

    def take(self, begin: int, data: memoryview) -> None:
        """Take bytes of the box."""
        if len(self.targets) == 1:
            self.targets[0].put(begin, data)
            return
        for target in self.targets:
            for source, there, length in runs(self.region, target.region, target.item_bytes, begin, begin + len(data)):
                target.put(there, data[source - begin : source - begin + length])
