"""A map of what changed in a model as a picture. Needs matplotlib."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING, Any

from ckptstore.errors import FormatError
from ckptstore.tools.diffmap import Map

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("svg", "png")

_INK, _NOTHING, _EQUAL, _STRUCTURE = "#333333", "#FFFFFF", "#EEEEEE", "#CC79A7"
_STYLE: dict[Any, Any] = {
    # The same map gives the same file, and text stays text.
    "svg.hashsalt": "ckptstore",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 8,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    # A parameter may be called by any name, and none is a formula.
    "text.parse_math": False,
}
_MOST = 400
"""Layers, or kinds, that a picture has room for."""
_FEW = 600
"""So few cells are numbered."""
_LONGEST = 40


def picture(found: Map, format: str, *, title: str) -> bytes:
    """A map drawn as "svg" or "png": a cell for each tensor, the darker the more it changed, by powers of ten.

    Raises:
        FormatError: another format, nothing to draw, or more than a picture has room for.
        ImportError: there is no matplotlib.
    """
    if format not in FORMATS:
        raise FormatError(f"{format!r} is no format of pictures: write svg or png")
    if not found.cells:
        raise FormatError("there are no weights to draw: only optimizers, random states and values were compared")
    if max(len(found.layers), len(found.kinds)) > _MOST:
        raise FormatError(
            f"{len(found.layers)} layers with {len(found.kinds)} kinds of parameters are more than a picture has room "
            "for; draw a part with only="
        )
    import matplotlib as mpl

    with mpl.rc_context({**mpl.rcParamsDefault, **_STYLE, "backend": "agg"}):
        figure, made = _figure(found, title), io.BytesIO()
        # Without the time and the versions of what drew it.
        nothing = {"Date": None, "Creator": None} if format == "svg" else {"Software": None}
        figure.savefig(made, format=format, dpi=150, facecolor="white", metadata=nothing)
    return made.getvalue()


def _figure(found: Map, title: str) -> Figure:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle
    from matplotlib.ticker import FuncFormatter

    rows, columns = len(found.layers), len(found.kinds)
    figure = Figure(figsize=(2.8 + 0.55 * columns, 2.2 + 0.24 * rows), layout="constrained")
    panel = figure.subplots()
    sizes = [c.relative for c in found.cells.values() if c.relative and math.isfinite(c.relative)]
    # A range of at least one power of ten, so that numbers that are nearly alike look so.
    low, high = min(sizes, default=0.1), max(sizes, default=1.0)
    norm, colours = LogNorm(min(low, high / 10), high), colormaps["YlGnBu"]
    for (layer, kind), cell in found.cells.items():
        place = found.kinds.index(kind), found.layers.index(layer)
        colour: Any = _EQUAL if cell.relative == 0 else _STRUCTURE
        if cell.relative and not math.isnan(cell.relative):
            colour = colours(norm(min(cell.relative, high)))
        panel.add_patch(Rectangle(place, 1, 1, facecolor=colour, edgecolor="white", linewidth=1))
        if len(found.cells) <= _FEW and (cell.kind is not None):
            dark = cell.relative is not None and cell.relative > 0 and norm(min(cell.relative, high)) > 0.55
            words = cell.kind if cell.relative is None else f"{cell.relative:.1g}"
            at = place[0] + 0.5, place[1] + 0.5
            panel.text(*at, words, ha="center", va="center", size=6, color="white" if dark else _INK)
    panel.set_xlim(0, columns)
    panel.set_ylim(rows, 0)
    panel.set_xticks([n + 0.5 for n in range(columns)], [_short(k) for k in found.kinds], rotation=45, ha="right")
    panel.set_yticks([n + 0.5 for n in range(rows)], [_short(layer) for layer in found.layers])
    panel.tick_params(length=0)
    panel.set_frame_on(False)
    panel.set_title(title, loc="left", size=9)
    if sizes:
        bar = figure.colorbar(ScalarMappable(norm, colours), ax=panel, label="‖change‖ / ‖before‖", shrink=0.8)
        # The usual labels are formulas.
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        bar.ax.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
    patches = [Patch(color=_EQUAL, label="equal"), Patch(color=_STRUCTURE, label="not comparable")]
    figure.legend(handles=patches, loc="outside lower left", frameon=False, ncols=2, fontsize=7)
    return figure


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST else f"…{name[1 - _LONGEST :]}"
