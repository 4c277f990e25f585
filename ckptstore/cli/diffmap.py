"""A map of what changed in a model, drawn with characters, so that it can be read without colours, too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ckptstore.cli.terminal import plain

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ckptstore.tools.diffmap import Cell, Map

_STEPS = ((1e-5, "░", "cyan"), (1e-3, "▒", "green"), (1e-1, "▓", "yellow"), (float("inf"), "█", "red"))
"""Up to which relative change a cell looks so."""
_STRUCTURE = {"removed": "-", "added": "+", "reshaped": "#", "cast": "~"}


def draw(found: Map, width: int | None) -> Iterator[RenderableType]:
    """The map, a line for each layer, and what its signs mean; cut into strips that are no wider than ``width``."""
    label = max((len(layer) for layer in found.layers), default=0)
    digits = len(str(len(found.kinds)))
    fits = len(found.kinds) if width is None else max(1, (width - label) // (digits + 1))
    for first in range(0, len(found.kinds), fits):
        yield from _strip(found, range(first, min(first + fits, len(found.kinds))), label, digits)
        yield ""
    yield from (f"{number:>{digits}}  {kind}" for number, kind in enumerate(found.kinds, 1))
    yield "· equal  ░ up to 1e-5  ▒ up to 1e-3  ▓ up to 0.1  █ more  - removed  + added  # reshaped  ~ cast"


def _strip(found: Map, kinds: Sequence[int], label: int, digits: int) -> Iterator[RenderableType]:
    from rich.text import Text

    yield Text(" " * label + "".join(f" {kind + 1:>{digits}}" for kind in kinds), style="bold")
    for layer in found.layers:
        line = Text(plain(layer).ljust(label))
        for kind in kinds:
            line.append(" ")
            line.append(*_sign(found.cells.get((layer, found.kinds[kind])), digits))
        line.rstrip()
        yield line


def _sign(cell: Cell | None, width: int) -> tuple[str, str]:
    if cell is None:
        return " " * width, ""
    if cell.kind is None:
        return "·" * width, "dim"
    if cell.kind in _STRUCTURE:
        return _STRUCTURE[cell.kind] * width, "magenta"
    relative = cell.relative
    # What can't be measured is a change all the same.
    sign, colour = next(((s, c) for most, s, c in _STEPS if relative is not None and relative <= most), ("█", "red"))
    return sign * width, colour
