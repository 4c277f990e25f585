"""The numbers in tensors, for ``ckptstore show --tensor``."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ckptstore.cli import texts
from ckptstore.cli.access import looking
from ckptstore.cli.terminal import answer, byte_progress, emit, plain, table

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from ckptstore.tools.examine import TensorStats

_BAR = 40
"""Characters of the longest one."""
_EIGHTHS = " ▏▎▍▌▋▊▉"
_NUMBERS = ("min", "max", "mean", "std", "norm")


def show_tensors(url: str, selector: str, names: Sequence[str], as_json: bool) -> None:
    """Answer with the numbers of all tensors that ``names`` match."""
    from ckptstore.tools.examine import examine_all

    with looking(url) as (store, _):
        checkpoint = store.resolve(selector)
        with byte_progress("reading") as progress:
            found = examine_all(store, checkpoint.id, names, progress=progress)
    if as_json:
        emit({"id": checkpoint.id, "tensors": [_fields(stats) for stats in found]})
    elif len(found) == 1:
        answer(*_one(found[0]))
    else:
        answer(_many(found))


def _fields(stats: TensorStats) -> dict[str, Any]:
    homes = [{"key": h.key, "blocks": [h.first, h.last], "codecs": list(h.codecs)} for h in stats.homes]
    return {
        **{name: _json(value) for name, value in vars(stats).items()},
        "homes": homes,
        "percentiles": stats.percentiles and {str(p): _json(value) for p, value in stats.percentiles.items()},
    }


def _json(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_json(item) for item in value]
    if isinstance(value, complex) or (isinstance(value, float) and not math.isfinite(value)):
        return str(value)
    return value


def _one(stats: TensorStats) -> Iterator[RenderableType]:
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    made.add_column(style="bold")
    made.add_column(overflow="fold")
    for name, value in _facts(stats):
        if value:
            made.add_row(name, Text(plain(value)))
    yield made
    if stats.counts:
        yield ""
        yield from _bars(stats)


def _facts(stats: TensorStats) -> Iterator[tuple[str, str]]:
    yield "tensor", stats.name
    yield "type", f"{stats.dtype}{list(stats.shape)}, {stats.elements:,} elements, {texts.size_text(stats.nbytes)}"
    for home in stats.homes[:_FEW]:
        blocks = f"block {home.first}" if home.first == home.last else f"blocks {home.first} to {home.last}"
        yield "lies in", f"{home.key}, {blocks} ({', '.join(home.codecs)})"
    yield "", f"and {len(stats.homes) - _FEW} shards more" if len(stats.homes) > _FEW else ""
    for name in _NUMBERS:
        yield name, _number(getattr(stats, name))
    if stats.nan is not None:
        yield "zeros", f"{stats.zeros:,}" if stats.zeros else "none"
        yield "nan", f"{stats.nan:,}" if stats.nan else "none"
        yield "infinite", f"{stats.inf:,}" if stats.inf else "none"
    if stats.percentiles:
        yield "percentiles", ", ".join(f"{p} %: {value:.4g}" for p, value in stats.percentiles.items())
    more = ", …" if stats.elements > len(stats.first) else ""
    yield "first", ", ".join(_number(value) or "''" for value in stats.first) + more


_FEW = 3


def _number(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float | complex) else str(value)


def _bars(stats: TensorStats) -> Iterator[str]:
    most = max(stats.counts)
    edges = [f"{edge:.4g}" for edge in stats.edges]
    width, digits = max(map(len, edges)), len(f"{most:,}")
    for number, count in enumerate(stats.counts):
        eighths = round(8 * _BAR * count / most) or (1 if count else 0)
        bar = "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()
        yield f"{edges[number]:>{width}}  {count:>{digits},}  {bar}".rstrip()
    yield f"{edges[-1]:>{width}}"


def _many(found: Sequence[TensorStats]) -> Table:
    from rich.text import Text

    numbers = (*_NUMBERS, "zeros", "nan", "inf")
    made = table("tensor", "type", *numbers, right=numbers, drop=("norm", "zeros", "mean"), fold=("tensor", "type"))
    for stats in found:
        counts = ("" if count is None else f"{count:,}" for count in (stats.zeros, stats.nan, stats.inf))
        cells = (
            stats.name,
            f"{stats.dtype}{list(stats.shape)}",
            *(f"{value:.4g}" if (value := getattr(stats, name)) is not None else "" for name in _NUMBERS),
            *counts,
        )
        made.add_row(*(Text(plain(cell)) for cell in cells))
    return made
