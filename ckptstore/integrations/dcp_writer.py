"""``CkptStoreWriter``: what ``dcp.save`` and ``dcp.async_save`` write, in a store."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NoReturn

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from ckptstore.engine.catalogue import Checkpoint
from ckptstore.engine.committer import Told
from ckptstore.engine.contents import Contents
from ckptstore.engine.facts import Facts
from ckptstore.engine.planned import Place
from ckptstore.engine.saver import Durable
from ckptstore.engine.stopwatch import Stopwatch
from ckptstore.engine.workers import Progress
from ckptstore.errors import FormatError, SaveFailedError, StateError
from ckptstore.format.digest import sha256
from ckptstore.format.jsontext import compact
from ckptstore.format.records import FileEntry, PartEntry
from ckptstore.integrations.dcp_planners import CkptStoreSavePlanner
from ckptstore.integrations.dcp_tree import build, key_path, tensor_name
from ckptstore.state.encode import Encoder
from ckptstore.state.values import TAG, Json
from ckptstore.store import Store, check_durable
from ckptstore.tools.importing.dcpstream import from_stream


@dataclass(frozen=True)
class Written:
    """What one rank tells the first of what it has written.

    Attributes:
        part: of the rank's own part; None for the first rank, who writes it at the end.
        names: what the tensors are called, by DCP's key.
        objects: the nodes of objects, by DCP's key.
        tensors: names of all whole tensors of which something was written.
    """

    part: PartEntry | None
    names: dict[str, str]
    objects: dict[str, Json]
    tensors: list[str]


class CkptStoreWriter(StorageWriter):
    """Saves in a store what DCP plans: all ranks one checkpoint, like any other of the store.

    Each rank makes its own, of a store that it has opened at the same place::

        dcp.save(state, storage_writer=CkptStoreWriter(store, step=1000))

    Objects become JSON; nothing is pickled, also with DCP's own planner. The first rank commits when all ranks' parts
    were read back; if one fails, nothing is ever committed, and ``prune`` collects what the others have written. DCP
    wraps all errors raised here in its ``CheckpointException``, which names the ranks. What ``dcp.async_save`` does
    behind must have ended before the store is closed.

    Attributes:
        checkpoint: on the first rank, what was committed last.
    """

    def __init__(
        self,
        store: Store,
        *,
        step: int,
        epoch: int | None = None,
        metrics: Mapping[str, Any] | None = None,
        modes: Mapping[str, Literal["min", "max"]] | None = None,
        reasons: Iterable[str] = (),
        durable: Durable | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Nothing is written yet.

        Args:
            store: where to save.
            step, epoch, metrics, modes, reasons, durable: as ``Store.save``; the first rank's count.
            progress: called with (bytes done, bytes in all) of this rank.

        Raises:
            StateError, FormatError: an option can't be.
        """
        super().__init__()
        self._saves, self._progress = store.planned, progress
        self._durable = durable or self._saves.durable
        check_durable(self._durable, self._saves.has_backup)
        self._facts = Facts.of(step, epoch, metrics or {}, modes or {}, reasons)
        self._place: Place | None = None
        self._files: list[FileEntry] = []
        self.checkpoint: Checkpoint | None = None
        self._watch: Stopwatch | None = None

    @property
    def id(self) -> str | None:
        """On all ranks, the id of the save that was begun last; committed, if ``dcp.save`` has returned."""
        return str(self._place.id) if self._place is not None else None

    def __reduce__(self) -> NoReturn:
        raise StateError(
            "a CkptStoreWriter can't go to another process: use AsyncCheckpointerType.THREAD", path="storage_writer"
        )

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin anew. A store names its checkpoints itself (StateError where a name is given)."""
        if checkpoint_id is not None:
            raise StateError(
                f"checkpoint_id={os.fspath(checkpoint_id)!r}: the store names its checkpoints itself; leave it out, "
                "and find this one by its step, or by the writer's id",
                path="checkpoint_id",
            )

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Begin a save.

        Raises:
            StateError: each rank would commit by itself.
        """
        if not kwargs.get("use_collectives", True):
            raise StateError(
                "use_collectives=False: each rank would save by itself, and nothing belong together: leave it out",
                path="use_collectives",
            )
        if self._place is not None and self._place.rank == 0 and self.checkpoint is None:
            # Another rank has failed, or is gone.
            self._saves.condemn(self._place, "it was broken off, and the next save has begun")
        self._place, self._files, self.checkpoint = None, [], None
        # What training waits for, DCP knows alone: it may have copied the state, and save behind.
        self._watch = Stopwatch(stalled=lambda: None)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Nothing is to be planned here."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """On the first rank: begin the checkpoint, and tell all its id."""
        store, id = self._saves.begin(self._facts, len(plans))
        digest = sha256(compact([[_index(item.index) for item in plan.items] for plan in plans]))
        places = [Place(store, id, rank, len(plans), digest) for rank in range(len(plans))]
        self._place = places[0]
        return [replace(plan, storage_data=place) for plan, place in zip(plans, places, strict=True)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's files, and its part.

        Raises:
            StateError: an object can't be stored without pickle, or comes as the bytes of a planner unknown here.
            SaveFailedError: the storage failed.
        """
        self._place = place = _place(plan, planner)
        with self._saves.condemning(place):
            share = _Share(plan, planner)
        self._files = self._saves.write(place, share.encoder.sources, self._progress)
        part = self._saves.put_part(place, self._files) if place.rank else None
        tensors = sorted({source.whole.name for source in share.encoder.sources})
        results = [WriteResult(item.index, share.sizes.get(item.index, 0), None) for item in plan.items]
        told = Written(part, share.names, share.objects, tensors)
        future: Future[list[WriteResult]] = Future()
        future.set_result([*results, WriteResult(MetadataIndex(""), 0, told)])
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the first rank: read back what all have written, and commit it.

        Raises:
            SaveFailedError: something is missing; certainly not committed.
            CommitUnknownError, StaleWriterError, UnavailableError: as ``Store.save``.
        """
        place = self._place
        assert place is not None
        with self._saves.condemning(place):
            reports = [_report(rank, each) for rank, each in enumerate(results)]
            nodes = _nodes(metadata, reports)
            own = place.part(self._files, build(nodes, metadata.planner_data))
        tensors = {name for report in reports for name in report.tensors}
        names = {key: name for report in reports for key, name in report.names.items()}
        self.checkpoint = self._saves.commit(
            place,
            Told(self._facts, 0, len(tensors), place.size, self._watch),
            own,
            [report.part for report in reports if report.part is not None],
            check=lambda contents: _check(contents, metadata, names),
            durable=self._durable,
        )

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether a place is one for this writer: it must always be given an open store."""
        return False


class _Share:
    """What one rank writes: its tensors become sources, its objects nodes."""

    def __init__(self, plan: SavePlan, planner: SavePlanner) -> None:
        self.encoder = Encoder()
        self.names: dict[str, str] = {}
        self.objects: dict[str, Json] = {}
        self.sizes: dict[MetadataIndex, int] = {}
        for item in plan.items:
            name = tensor_name(item.index.fqn, key_path(item.index.fqn, plan.planner_data))
            if item.type is WriteItemType.BYTE_IO:
                self._object(item, name, planner)
            else:
                self._tensor(item, name, planner)
        self.encoder.finish()

    def _tensor(self, item: WriteItem, name: str, planner: SavePlanner) -> None:
        key, data = item.index.fqn, item.tensor_data
        assert data is not None
        tensor = planner.resolve_data(item)
        if not isinstance(tensor, torch.Tensor) or tensor.shape != data.chunk.sizes:
            shown = list(tensor.shape) if isinstance(tensor, torch.Tensor) else f"a {type(tensor).__name__}"
            raise StateError(
                f"the planner gave {shown} for {key!r}, of which {list(data.chunk.sizes)} was planned", path=key
            )
        box = tuple(data.chunk.offsets), tuple(data.chunk.sizes)
        self.names[key] = name
        self.sizes[item.index] = tensor.nbytes
        self.encoder.piece(tensor.detach(), name, tuple(data.size), box)

    def _object(self, item: WriteItem, name: str, planner: SavePlanner) -> None:
        key, before = item.index.fqn, len(self.encoder.sources)
        self.objects[key] = self.encoder.encode(_object(item, planner), name)
        self.encoder.finish()
        for source in self.encoder.sources[before:]:
            if source.shard is not None:
                raise StateError(
                    f"{key!r} is an object in which there is a DTensor, and no other rank would write its part of it: "
                    "save with flatten_state_dict=True, or by Store.save",
                    path=key,
                )


def _object(item: WriteItem, planner: SavePlanner) -> object:
    """What stands behind an entry that DCP would pickle."""
    key = item.index.fqn
    if isinstance(planner, DefaultSavePlanner):
        return planner.lookup_object(item.index)
    stream = planner.resolve_data(item)
    try:
        if isinstance(stream, io.BytesIO):
            stream.seek(0)
            return from_stream(stream, key)
    except FormatError:
        pass
    raise StateError(
        f"the planner {type(planner).__name__} gave bytes of its own for {key!r}, which can't be stored, as nobody "
        "could load them without running them: derive it from CkptStoreSavePlanner",
        path=key,
    )


def _place(plan: SavePlan, planner: SavePlanner) -> Place:
    if getattr(planner, "_enable_plan_caching", False) and not isinstance(planner, CkptStoreSavePlanner):
        raise StateError(
            f"{type(planner).__name__} keeps the plan of an older save, with its id: use "
            "CkptStoreSavePlanner(enable_plan_caching=True)",
            path="planner",
        )
    if not isinstance(plan.storage_data, Place):
        raise StateError(
            f"{type(planner).__name__} has dropped the plan's storage_data, where the checkpoint's id stands",
            path="plan",
        )
    return plan.storage_data


def _index(index: MetadataIndex) -> list[Any]:
    return [index.fqn, None if index.offset is None else list(index.offset)]


def _report(rank: int, results: Sequence[WriteResult]) -> Written:
    told = results[-1].storage_data if results else None
    if not isinstance(told, Written) or (told.part is None) != (rank == 0):
        raise SaveFailedError(f"nothing was saved: rank {rank} hasn't told what it has written")
    return told


def _nodes(metadata: Metadata, reports: Sequence[Written]) -> dict[str, Json]:
    names = {key: name for report in reports for key, name in report.names.items()}
    objects = {key: node for report in reports for key, node in report.objects.items()}
    nodes: dict[str, Json] = {}
    for key, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, BytesStorageMetadata) and key in objects:
            nodes[key] = objects[key]
        elif isinstance(entry, TensorStorageMetadata) and key in names:
            nodes[key] = {TAG: "tensor", "name": names[key]}
        else:
            raise SaveFailedError(f"nothing was saved: {key!r} was planned, and no rank has written it")
    return nodes


def _check(contents: Contents, metadata: Metadata, names: Mapping[str, str]) -> None:
    """Nothing, if what was written makes up the tensors that were planned."""
    for key, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            row = contents.tensors.get(names[key])
            if row is None or row.shape[: len(entry.size)] != tuple(entry.size):
                raise SaveFailedError(f"nothing was saved: parts of {key!r} were not written by any rank")
