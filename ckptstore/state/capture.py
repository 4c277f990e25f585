"""Live state → a snapshot: its tensors, and a JSON tree of everything else. The inverse is in ``restore.py``."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ckptstore.state import staging
from ckptstore.state.encode import Encoder
from ckptstore.state.tensors import TensorSource
from ckptstore.state.values import Json


@dataclass
class Snapshot:
    """A state taken apart. Plain values are copied; tensors are read when their sources are.

    Attributes:
        tree: everything that is no tensor. The order of its keys is part of the state.
        sources: the tensors, under unique names, optimizers' last.
        parameters: number of elements in distinct parameters of the modules.
        modules, optimizers: the live ones in the state.
    """

    tree: Json
    sources: list[TensorSource]
    parameters: int
    modules: list[torch.nn.Module]
    optimizers: list[torch.optim.Optimizer]


def capture(state: object) -> Snapshot:
    """Take a nested state apart, without copying any tensor.

    Tensors that are the very same memory, shape and type are stored once and are shared again after loading. A
    container that stands at two places is stored twice.

    Raises:
        StateError: something can't be stored without pickle; ``path`` says where it is.
    """
    encoder = Encoder()
    tree = encoder.encode(state, "")
    encoder.finish()
    parameters = list(encoder.parameters.values())
    staging.mark_frozen(encoder.sources, parameters, encoder.optimizers)
    count = sum(parameter.numel() for parameter in parameters)
    return Snapshot(tree, encoder.sources, count, encoder.modules, encoder.optimizers)
