"""A plan as a drawing in the terminal: a row of marks for each reason, and what lies on storage below them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from ckptstore.cli.terminal import plain
from ckptstore.policy.kinds import kinds

if TYPE_CHECKING:
    from rich.text import Text

    from ckptstore.policy.plan import Moment, Plan
    from ckptstore.policy.progress import Length

STAYS, GOES = "●", "·"
BLOCKS = " ▁▂▃▄▅▆▇█"
_STORAGE = "on storage"
_HEIGHT = 4
_WIDEST_LABEL = 20
_MOST_ROWS = 12


def timeline(plan: Plan, length: Length, width: int, amount: Callable[[int], str]) -> Iterator[Text]:
    """Lines of ``width`` characters: the run from left to right.

    Args:
        plan: with at least one save.
        length: of the run.
        width: of the terminal.
        amount: bytes as text.
    """
    rows, total = _rows(plan), length.require_total("a plan")
    highest = max(plan.moments, key=lambda moment: moment.peak_bytes)
    numbers = max(len(amount(highest.peak_bytes)), len(_STORAGE))
    # A reason may be cut, a number never.
    left = max(min(max(len(label) for label, _ in rows), _WIDEST_LABEL, width // 3), numbers) + 2
    columns = width - left
    stays = {verdict.step for verdict in plan.final}
    for label, steps in rows:
        yield _marks(label, steps, stays, total, left, columns)
    yield _epochs(length, left, columns)
    yield from _bars(plan.moments, total, left, columns, amount(highest.peak_bytes))
    yield _ruler(total, left, columns)
    yield _arrow(highest, total, left, columns, f"peak {amount(highest.peak_bytes)} at step {highest.step:,}")


def _rows(plan: Plan) -> list[tuple[str, list[int]]]:
    """Each kind of reason with its steps; of many kinds the rarest ones together."""
    found: dict[str, list[int]] = {}
    for moment in plan.moments:
        for kind in kinds(moment.reasons):
            found.setdefault(kind, []).append(moment.step)
    if len(found) <= _MOST_ROWS:
        return list(found.items())
    first = sorted(found, key=lambda kind: -len(found[kind]))[: _MOST_ROWS - 1]
    others = sorted({step for kind, steps in found.items() if kind not in first for step in steps})
    return [*((kind, steps) for kind, steps in found.items() if kind in first), ("others", others)]


def _column(step: int, total: int, columns: int) -> int:
    return step * (columns - 1) // total


def _marks(label: str, steps: Sequence[int], stays: set[int], total: int, left: int, columns: int) -> Text:
    cells = [" "] * columns
    for step in steps:
        column = _column(step, total, columns)
        if cells[column] != STAYS:
            cells[column] = STAYS if step in stays else GOES
    styles = {STAYS: "bold cyan", GOES: "dim"}
    return _styled(_line((label, ""), left), [(cell, styles.get(cell, "")) for cell in cells])


def _epochs(length: Length, left: int, columns: int) -> Text:
    """The numbers of the epochs where they end; as many as there is room for."""
    if not length.epochs and not length.steps_per_epoch:
        return _line(("", ""), left)
    ends, total = length.epoch_ends(), length.require_total("a plan")
    cells, free = [" "] * columns, 0
    for number, end in enumerate(ends, 1):
        name = str(number)
        start = min(_column(end, total, columns), columns - len(name))
        if start >= free:
            cells[start : start + len(name)] = name
            free = start + len(name) + 2
    return _line(("epoch", ""), left).append("".join(cells), style="dim")


def _bars(moments: Sequence[Moment], total: int, left: int, columns: int, top: str) -> Iterator[Text]:
    """What lies on storage in each column, at its highest."""
    heights = _heights(moments, total, columns)
    peak = max(heights)
    levels = [-(-height * _HEIGHT * 8 // peak) if peak else 0 for height in heights]
    for row in range(_HEIGHT - 1, -1, -1):
        text = _line(("", {_HEIGHT - 1: top, 0: _STORAGE}.get(row, "")), left)
        blocks = [BLOCKS[min(max(level - row * 8, 0), 8)] for level in levels]
        styles = ["bold yellow" if height == peak else "blue" for height in heights]
        yield _styled(text, list(zip(blocks, styles, strict=True)))


def _heights(moments: Sequence[Moment], total: int, columns: int) -> list[int]:
    heights, left = [0] * columns, 0
    coming = iter(moments)
    moment = next(coming, None)
    for column in range(columns):
        heights[column] = left
        while moment is not None and _column(moment.step, total, columns) == column:
            heights[column] = max(heights[column], moment.peak_bytes)
            left = moment.left_bytes
            moment = next(coming, None)
    return heights


def _ruler(total: int, left: int, columns: int) -> Text:
    """The numbers of the steps at both ends and between, as many as there is room for."""
    text = _line(("step", ""), left)
    last = f"{total:,}"
    parts = max(min(columns // (3 * len(last) + 4), 4), 1)
    cells = [" "] * columns
    for number in range(parts + 1):
        step = total * number // parts
        name = f"{step:,}"
        start = min(max(_column(step, total, columns) - len(name) // 2, 0), columns - len(name))
        cells[start : start + len(name)] = name
    return text.append("".join(cells), style="dim")


def _arrow(highest: Moment, total: int, left: int, columns: int, words: str) -> Text:
    place = left + _column(highest.step, total, columns)
    if place + len(words) + 2 <= left + columns:
        text = " " * place + f"▲ {words}"
    else:
        # Below the labels there is room, too.
        text = f"{words} ▲".rjust(place + 1)[-(place + 1) :]
    return _line(("", ""), 2).append(text[2:], style="bold yellow")


def _styled(text: Text, cells: Sequence[tuple[str, str]]) -> Text:
    """``text`` with ``cells`` behind it, those of the same style in one piece."""
    for style, run in groupby(cells, key=lambda cell: cell[1]):
        text.append("".join(cell for cell, _ in run), style=style)
    return text


def _line(labels: tuple[str, str], left: int) -> Text:
    """The beginning of a line: a label at the left, or one close to what follows."""
    from rich.text import Text

    name, number = (plain(label) for label in labels)
    if len(name) > left - 2:
        name = name[: left - 3] + "…"
    text = Text(no_wrap=True, overflow="crop", end="\n")
    text.append(name.ljust(left - 2) if not number else number.rjust(left - 2))
    return text.append("  ")
