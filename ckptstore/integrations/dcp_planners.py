"""Planners for ``torch.distributed.checkpoint`` that turn objects into JSON and back, where its own pickle them."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.planner import ReadItem, SavePlan, WriteItem, WriteItemType

from ckptstore.errors import FormatError
from ckptstore.format.jsontext import compact, parse_json
from ckptstore.state.encode import Encoder
from ckptstore.state.restore import restore_plain
from ckptstore.state.tensors import TensorSpec

STREAM_BEGIN = b'{"ckptstore":1,'
"""How each stream of JSON begins, and no archive of ``torch.save``."""

_LIMIT = 256 << 20


class CkptStoreSavePlanner(DefaultSavePlanner):
    """DCP's default planner, but for objects, which become JSON, whatever writer they are for."""

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        """What the writer gets: tensors as they are, all else as a stream of JSON.

        Raises:
            StateError: an object can't be stored without pickle.
        """
        if write_item.type is WriteItemType.BYTE_IO:
            return to_stream(object, write_item.index.fqn)
        return object

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """This rank's plan: from the cache, where nothing has changed, but with what the writer says of this save."""
        return replace(super().finish_plan(new_plan), storage_data=new_plan.storage_data)


class CkptStoreLoadPlanner(DefaultLoadPlanner):
    """DCP's default planner, but for objects: they come from JSON, so that nothing that is loaded can run."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Take over an object that ``CkptStoreSavePlanner`` made a stream of.

        Raises:
            FormatError: it is no such stream.
        """
        self.load_object(read_item, from_stream(value, read_item.dest_index.fqn))

    def load_object(self, read_item: ReadItem, value: object) -> None:
        """Take over an object."""
        key = read_item.dest_index.fqn
        if not self.flatten_state_dict:
            # The one is a copy of the other, where ShardedTensors are looked for.
            self.state_dict[key] = self.original_state_dict[key] = value
            return
        *way, last = self.mappings[key]
        container: Any = self.original_state_dict
        for part in way:
            container = container[_own_key(container, part)]
        container[_own_key(container, last)] = value


def _own_key(container: Any, part: str | int) -> Any:
    """The key itself: DCP makes text of it."""
    if isinstance(container, Mapping) and part not in container:
        return next((key for key in container if str(key) == part), part)
    return part


def to_stream(value: object, key: str) -> io.BytesIO:
    """An object as a stream of JSON; the inverse of ``from_stream``."""
    encoder = Encoder()
    tree = encoder.encode(value, key)
    encoder.finish()
    tensors = [[*source.spec, base64.b64encode(source.view(0, source.nbytes)).decode()] for source in encoder.sources]
    return io.BytesIO(compact({"ckptstore": 1, "tree": tree, "tensors": tensors}))


def from_stream(stream: io.BufferedIOBase, key: str) -> object:
    """The object that a stream describes.

    Raises:
        FormatError: the stream is of another kind, as DCP's own pickles, or malformed.
    """
    data = stream.read()
    if not data.startswith(STREAM_BEGIN):
        raise FormatError(
            f"{key!r:.100} is no JSON of CkptStoreSavePlanner: load it with DCP's own planner if you trust it, or take "
            "the checkpoint over with import_dcp"
        )
    fields = parse_json(data, key, limit=_LIMIT)
    try:
        images = {row[0]: base64.b64decode(row[4], validate=True) for row in fields["tensors"]}
        specs = [TensorSpec(name, dtype, tuple(shape), logical) for name, dtype, shape, logical, _ in fields["tensors"]]
        restoration = restore_plain(fields["tree"], specs)
        for name, destination in restoration.wanted.items():
            if len(images[name]) != destination.nbytes:
                raise FormatError(f"{key!r:.100} has a tensor of another size than it says")
            destination.host()[:] = images[name]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise FormatError(f"the object {key!r:.100} is malformed: {error}") from error
    return restoration.finish()
