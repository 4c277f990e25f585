"""Tables in terminals that are too narrow for them: columns are left out or folded, and nothing that matters is cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.measure import Measurement
from rich.table import Table

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Column

_FOLDED = 10
"""Characters that a folded column has at least, or else each row becomes lines of its own."""
_UNBOUNDED = 10_000


def fitted(made: Table, console: Console, drop: Sequence[str]) -> Table:
    """``made`` as it fits ``console``.

    Without some of the columns in ``drop``, the first one first; then with those folded that may be; else with a line
    for each cell.
    """
    for name in drop:
        if _width(made, console) <= console.width:
            return made
        made = _of([column for column in made.columns if column.header != name], made)
    foldable = [column for column in made.columns if not column.no_wrap]
    spare = sum(max(0, max(map(_cells, _all(column))) - _FOLDED) for column in foldable)
    return made if _width(made, console) - spare <= console.width else _stacked(made)


def _of(columns: Sequence[Column], made: Table) -> Table:
    """A table of some of the columns of ``made``. A new one: a column remembers the place that it had."""
    fewer = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        fewer.add_column(column.header, justify=column.justify, no_wrap=column.no_wrap, overflow="fold")
    for row, cells in zip(made.rows, zip(*(column.cells for column in columns), strict=True), strict=True):
        fewer.add_row(*cells, style=row.style)
    return fewer


def _width(made: Table, console: Console) -> int:
    return Measurement.get(console, console.options.update(width=_UNBOUNDED), made).maximum


def _all(column: Column) -> list[RenderableType]:
    return [column.header, *column.cells]


def _cells(cell: RenderableType) -> int:
    return cell_len(str(cell))


def _stacked(made: Table) -> Table:
    """Each row as lines: the column's name, and what stands in it."""
    lines = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    lines.add_column(style="bold", no_wrap=True)
    lines.add_column(overflow="fold")
    for row, cells in zip(made.rows, zip(*(column.cells for column in made.columns), strict=True), strict=True):
        if lines.row_count:
            lines.add_row()
        for column, cell in zip(made.columns, cells, strict=True):
            if str(cell):
                lines.add_row(column.header, cell, style=row.style)
    return lines
