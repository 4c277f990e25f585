"""Tensors that are spread over several processes (``DTensor``): which part of one this process has."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch

from ckptstore.errors import StateError

if TYPE_CHECKING:
    from ckptstore.state.tensors import TensorSpec

Box: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]
"""Offset and shape, in elements."""


class Shard(NamedTuple):
    """What a stored tensor is a part of."""

    tensor: str
    """The name of the whole."""
    shape: tuple[int, ...]
    """Of the whole, in stored elements."""
    region: Box
    """Where the part lies, in stored elements."""


def is_sharded(value: object) -> bool:
    """Whether a tensor is a ``DTensor``."""
    # Not imported for the sake of this question: where nobody has imported it, there is none.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def local_of(value: torch.Tensor) -> torch.Tensor:
    """The tensor that this process has of ``value``: itself where it isn't spread."""
    if not is_sharded(value):
        return value
    with torch.no_grad():
        local: torch.Tensor = value.to_local()  # type: ignore[attr-defined]
    return local


def box_of(value: torch.Tensor, path: str) -> Box | None:
    """Where the part of this process lies in a ``DTensor``; None where it has nothing of it.

    Raises:
        StateError: its value is the sum over processes, which none of them has.
    """
    sharded: Any = value
    if any(placement.is_partial() for placement in sharded.placements):
        raise StateError(
            f"the tensor at {path!r} is a DTensor whose value is a reduction that is still to be done "
            f"({sharded.placements}): redistribute() it before it is saved or loaded",
            path=path,
        )
    local = local_of(value)
    if not local.numel() and value.numel():
        return None
    (chunk,) = sharded.__create_chunk_list__()
    box = tuple(chunk.offsets), tuple(chunk.sizes)
    if box[1] != tuple(local.shape):
        raise StateError(
            f"the tensor at {path!r} is a DTensor whose part here, {list(local.shape)}, is no single box of it, "
            f"{list(box[1])}: {sharded.placements} can't be stored unevenly; pad it, or shard it otherwise",
            path=path,
        )
    return box


def cut(spec: TensorSpec, box: Box) -> tuple[TensorSpec, Box]:
    """The part of a stored tensor that lies in ``box``, and where it lies in stored elements."""
    tail = spec.shape[len(box[1]) :]
    return spec._replace(shape=box[1] + tail), (box[0] + (0,) * len(tail), box[1] + tail)


def like(value: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    """``local`` as the part that this process has of a tensor spread as ``value`` is."""
    sharded: Any = value
    made: torch.Tensor = type(sharded).from_local(
        local, sharded.device_mesh, sharded.placements, run_check=False, shape=value.shape, stride=value.stride()
    )
    return made
