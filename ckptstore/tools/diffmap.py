"""Where in a model it changed: a map of its layers and of the kinds of parameters in them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from ckptstore.tools.diff import Diff
from ckptstore.tools.difftensors import TensorChange

_NUMBER = re.compile(r"(\d+)")


class Cell(NamedTuple):
    """A tensor: ``kind`` of its change, None where it is equal, and ``relative`` change, None where there is none."""

    kind: str | None
    relative: float | None


class Map(NamedTuple):
    """Layers by kinds of parameters, in the order of their names and numbers."""

    layers: Sequence[str]
    kinds: Sequence[str]
    cells: dict[tuple[str, str], Cell]


def diff_map(found: Diff) -> Map:
    """The map of all weights that were compared."""
    changes: dict[str, TensorChange] = {change.name: change for change in found.tensors}
    components = {name.partition("/")[0] for name in found.weights if "/" in name}
    cells = {}
    for name in found.weights:
        # Of one model its name says nothing.
        layer, kind = split(name.partition("/")[2] if len(components) == 1 and "/" in name else name)
        change = changes.get(name)
        cells[layer, kind] = Cell(change.kind, change.relative) if change is not None else Cell(None, 0.0)
    layers = sorted({layer for layer, _ in cells}, key=_natural)
    kinds = sorted({kind for _, kind in cells}, key=_natural)
    return Map(layers, kinds, cells)


def split(name: str) -> tuple[str, str]:
    """Layer and kind of a parameter: ``h.3`` and ``attn.weight`` of ``h.3.attn.weight``."""
    parts = re.split(r"(?<=[./])", name)
    number = next((index for index, part in enumerate(parts[:-1]) if part.rstrip("./").isdigit()), len(parts) - 2)
    layer, kind = "".join(parts[: number + 1]).rstrip("./"), "".join(parts[number + 1 :])
    return layer, kind


def _natural(text: str) -> list[tuple[int, str]]:
    # 2 before 10.
    return [(int(part), "") if part.isdigit() and part.isascii() else (-1, part) for part in _NUMBER.split(text)]
