"""Live state → a snapshot: its tensors, and a JSON tree of everything else. The inverse is in ``restore.py``."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ckptstore.state import staging
from ckptstore.state.encode import Encoder
from ckptstore.state.tensors import TensorSource
from ckptstore.state.values import TAG, Json


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
    elements: Mapping[str, int]
    """Of each parameter, under its first name."""

    def divided(self, skip: Collection[int], rename: Mapping[str, str], cut: Mapping[str, tuple[int, int]]) -> Snapshot:
        """What one of several processes stores of a state that they have in common; sources by their numbers.

        Args:
            skip: sources that another one stores.
            rename: the names of those that differ from the others' of the same name.
            cut: first row and number of rows, where only these are stored here.
        """
        names: dict[str, str] = {}
        sources = []
        for number, source in enumerate(self.sources):
            if new := rename.get(str(number)):
                names[source.spec.name] = new
                source.spec = source.spec._replace(name=new)
            if number not in skip:
                sources.append(source.rows(*cut[str(number)]) if str(number) in cut else source)
        return replace(self, tree=_renamed(self.tree, names) if names else self.tree, sources=sources)


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
    elements = {encoder.owners[key]: parameter.numel() for key, parameter in encoder.parameters.items()}
    return Snapshot(tree, encoder.sources, count, encoder.modules, encoder.optimizers, elements)


def _renamed(node: Any, names: Mapping[str, str]) -> Any:
    """A tree with other names of tensors."""
    if isinstance(node, list):
        return [_renamed(item, names) for item in node]
    if not isinstance(node, dict):
        return node
    field = {"tensor": "name", "ndarray": "name", "bytes": "tensor", "bytearray": "tensor"}.get(str(node.get(TAG)))
    if field is not None and node.get(field) in names:
        return {**node, field: names[node[field]]}
    return {key: _renamed(item, names) for key, item in node.items()}
