"""Which tensors of a checkpoint go into safetensors files, and what they are called there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from ckptstore.engine.tensorreader import TensorReader
from ckptstore.errors import FormatError, StateError
from ckptstore.state.dtypes import torch_name
from ckptstore.state.encode import join
from ckptstore.state.values import TAG, Json
from ckptstore.tools.elements import element_type
from ckptstore.tools.exporting.copying import cast_of
from ckptstore.tools.exporting.notes import Notes
from ckptstore.tools.exporting.tensorfiles import Weight, refusal
from ckptstore.tools.exporting.trees import Place, children, is_tensor, kind_of, models, walk
from ckptstore.units import count_text

_SHOWN = 20


class Weights:
    """Makes them of nodes.

    Args:
        reader: of the checkpoint.
        dtype: the type to convert to, where it is one of a model's.
        notes: told of what is converted.
    """

    def __init__(self, reader: TensorReader, dtype: torch.dtype | None, notes: Notes) -> None:
        self._reader, self._dtype, self.notes = reader, dtype, notes

    def model(self, tree: Json) -> tuple[str, list[Weight]]:
        """The path of the model in a state, and its weights by their names in it.

        A weight that has two names has both here, for whoever reads it may know only one of them.

        Raises:
            StateError: there is none, there are several, or safetensors has no type for one of its weights.
        """
        path, entries = self._only_model(tree)
        weights = []
        for name, node in entries.items():
            if not is_tensor(node):
                self.notes.left_out[join(path, name)] = "it is no tensor"
                continue
            weight = self._weight(name, node, model=True)
            if (reason := refusal(weight.row)) is not None:
                raise StateError(
                    f"the weight {name!r} of {path!r} can't be exported: {reason}; leave it out by only=, or export "
                    "to torch",
                    path=weight.tensor,
                )
            weights.append(weight)
        for beside in _beside(tree, "", path):
            self.notes.left_out[beside] = "it is no part of the model"
        return path, weights

    def all(self, tree: Json) -> tuple[str | None, list[Weight]]:
        """All tensors of a state by their paths; by their names in the model, where that is all there is.

        Raises:
            StateError: there is none.
        """
        places = [place for place in walk(tree) if kind_of(place.node) in ("tensor", "ndarray")]
        if not places:
            raise StateError(f"{self._reader.contents.commit.id} holds no tensors that could be exported", path="")
        self._note_values(tree)
        component, named = self._named(tree, places)
        weights = []
        for name, place in named.items():
            weight = self._weight(name, place.node, model=place.model)
            if (reason := refusal(weight.row)) is None:
                weights.append(weight)
            else:
                self.notes.left_out[place.path] = reason
        return component, weights

    @staticmethod
    def _named(tree: Json, places: Sequence[Place]) -> tuple[str | None, dict[str, Place]]:
        """What each is called, and the model whose names these are, if all belong to one."""
        found = models(tree)
        if len(found) == 1:
            ((path, entries),) = found.items()
            named = {name: Place(join(path, name), node, True) for name, node in entries.items() if is_tensor(node)}
            if len(named) == len(places):
                return path, named
        named = {}
        for place in places:
            name = place.path
            while name in named:
                # A key may look like a path.
                name += "~"
            named[name] = place
        return None, named

    def _only_model(self, tree: Json) -> tuple[str, Mapping[str, Json]]:
        found = models(tree)
        id = self._reader.contents.commit.id
        if not found:
            entries = ", ".join(repr(name) for name, _ in children(tree, "")[:_SHOWN])
            raise StateError(
                f"{id} has no model to export, neither a module nor a dict of tensors; it has {entries or 'nothing'}",
                path="",
            )
        if len(found) > 1:
            paths = ", ".join(map(repr, list(found)[:_SHOWN]))
            raise StateError(
                f"{id} has {len(found)} models: {paths}; name one by only=, as --only '{next(iter(found))}/*'", path=""
            )
        return next(iter(found.items()))

    def _weight(self, name: str, node: Any, *, model: bool) -> Weight:
        tensor = node.get("name")
        row = self._reader.tensors.get(tensor) if isinstance(tensor, str) else None
        if row is None:
            raise FormatError(f"{name!r} refers to the tensor {tensor!r}, which the checkpoint doesn't have")
        cast = cast_of(row, self._dtype) if model else None
        if cast is not None:
            self.notes.cast[name] = torch_name(element_type(row))
        return Weight(name, tensor, row, cast)

    def _note_values(self, tree: Json) -> None:
        """Say where there is something else than tensors."""
        counts: Counter[str] = Counter()
        for place in walk(tree):
            if not isinstance(place.node, dict):
                counts[place.path.partition("/")[0]] += not isinstance(place.node, list) or bool(place.node)
            elif TAG in place.node and kind_of(place.node) not in ("tensor", "ndarray"):
                counts[place.path.partition("/")[0]] += not children(place.node, "")
        for name, count in counts.items():
            if count:
                self.notes.left_out[name] = f"{count_text(count, 'value')}, besides the tensors"


def _beside(node: Json, path: str, wanted: str) -> Iterator[str]:
    """What stands beside the way to a path."""
    for name, child in children(node, path) if path != wanted else ():
        if wanted == name or wanted.startswith(f"{name}/"):
            yield from _beside(child, name, wanted)
        else:
            yield name
