"""Planners for ``torch.distributed.checkpoint`` that turn objects into JSON and back, where its own pickle them."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.planner import ReadItem, SavePlan, WriteItem, WriteItemType

from ckptstore.tools.importing.dcpstream import from_stream, to_stream


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
