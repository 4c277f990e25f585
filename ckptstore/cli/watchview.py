"""What ``ckptstore watch`` draws in a terminal."""

from __future__ import annotations

import io
import math
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from ckptstore.cli import texts
from ckptstore.cli.terminal import plain, table
from ckptstore.units import duration_text

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

    from ckptstore.cli.watch import Look, Watcher
    from ckptstore.engine.catalogue import Checkpoint

_BARS = "▁▂▃▄▅▆▇█"
_PLAIN_BARS = "_.-=+*#%"
_SPARKS = 40
_METRICS = 6
_RECENT = 200
"""So many of the newest are looked at for what is drawn: steps per second, and lines of metrics."""
_MEDIUM = 70
"""Columns of a terminal from which dates are shown."""
_GAP = 2
_CUT, _CUT_LEAST = ("metrics", "why"), 12
"""What may be cut, and not to less than that."""
_TICK_S = 1.0
"""How often it is drawn while nothing happens, so that ages go on."""


def show(url: str, watcher: Watcher, interval: float, *, once: bool) -> None:
    """Draw what ``watcher`` sees until Ctrl-C; with ``once`` one time."""
    from rich.console import Console
    from rich.live import Live

    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that knows few characters shows question marks for the others.
        sys.stdout.reconfigure(errors="replace")
    console = Console(highlight=False)
    look = watcher.look()
    if once:
        console.print(picture(url, look, console, tall=False))
        return
    looked = time.monotonic()
    with Live(picture(url, look, console), console=console, auto_refresh=False, vertical_overflow="crop") as live:
        while True:
            live.update(picture(url, look, console), refresh=True)
            time.sleep(min(_TICK_S, max(interval - (time.monotonic() - looked), 0.0)))
            if time.monotonic() - looked >= interval:
                look, looked = watcher.look(), time.monotonic()


def picture(url: str, look: Look, console: Console, *, tall: bool = True) -> RenderableType:
    """All that is shown, as wide as ``console``, and with ``tall`` as high."""
    from rich.console import Group
    from rich.text import Text

    lines = [_line(Text(plain(url), style="bold")), *_state(look), *_metrics(look, console)]
    lines += [_line(Text(plain(texts.lag_text(lag)), style="yellow" if lag.behind else "")) for lag in look.lags]
    if look.catalogue.damaged:
        damaged = texts.count_text(len(look.catalogue.damaged), "commit record")
        lines.append(_line(Text(f"{damaged} damaged: 'ckptstore verify' says what is wrong", style="red")))
    # One for the header, one for the cursor.
    room = max(console.height - len(lines) - 2, 1) if tall else _RECENT
    return Group(*lines, _table(look, console.width, min(room, 20)))


def _line(text: RenderableType) -> RenderableType:
    from rich.text import Text

    if isinstance(text, Text):
        text.no_wrap, text.overflow = True, "ellipsis"
    return text


def _state(look: Look) -> list[RenderableType]:
    from rich.text import Text

    lines: list[RenderableType] = []
    if look.away is not None:
        lines.append(_line(Text(plain(f"away for {_age(look.away_s)}: {look.away}"), style="red")))
    if not look.checkpoints:
        return [*lines, _line(Text("no checkpoint yet", style="dim"))]
    newest = look.checkpoints[-1]
    parts = [f"step {newest.step:,}"]
    if newest.epoch is not None:
        parts.append(f"epoch {newest.epoch}")
    parts.append(f"saved {_age((datetime.now(UTC) - newest.created).total_seconds())} ago")
    speed = _speed(look.checkpoints)
    if speed is not None:
        parts.append(f"{speed:.3g} steps/s")
    count = texts.count_text(len(look.checkpoints), "checkpoint")
    parts.append(f"{count}, {texts.size_text(look.stored_bytes)}")
    return [*lines, _line(Text(" · ".join(parts)))]


def _age(seconds: float) -> str:
    # A clock of another machine may be ahead.
    return duration_text(max(round(seconds), 0)) if seconds < 120 else duration_text(round(seconds / 60) * 60)


def _speed(checkpoints: Sequence[Checkpoint]) -> float | None:
    """Steps per second, as the newest checkpoints tell."""
    from ckptstore.tools.lineage import origins, speeds
    from ckptstore.tools.reportdata import history

    # Several: a step may have been saved twice, and another writer begun.
    saves = history(checkpoints[-10:], checkpoints[-10:])
    known = [speed for speed in speeds(saves, origins(saves)) if speed is not None]
    return known[-1] if known else None


def _metrics(look: Look, console: Console) -> list[RenderableType]:
    """A small line for each metric of the newest checkpoints, with its last value."""
    from rich.cells import cell_len, set_cell_size
    from rich.text import Text

    recent = look.checkpoints[-_RECENT:]
    names = list(dict.fromkeys(name for c in reversed(recent) for name in c.metrics))[:_METRICS]
    width = max((cell_len(plain(name)) for name in names), default=0)
    width = min(width, max(console.width // 3, 4))
    bars = _BARS if console.encoding.lower().startswith("utf") else _PLAIN_BARS
    lines: list[RenderableType] = []
    for name in names:
        values = [c.metrics[name] for c in recent if name in c.metrics]
        drawn = sparkline(values[-max(min(_SPARKS, console.width - width - 12), 4) :], bars)
        line = Text(f"{set_cell_size(plain(name), width)} ")
        line.append(drawn, style="cyan")
        line.append(f" {values[-1]:.5g}")
        if name in look.best:
            best = look.best[name][0]
            line.append(f", best {best.metrics[name]:.5g} at step {best.step:,}", style="dim")
        lines.append(_line(line))
    return lines


def sparkline(values: Sequence[float], bars: str = _BARS) -> str:
    """``values`` as a line of bars, the lowest and the highest of which are the least and the largest of them."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return "?" * len(values)
    low, high = min(finite), max(finite)
    # Halved: of two very large ones the difference alone is too large for a number.
    span = high / 2 - low / 2
    top = len(bars) - 1

    def bar(value: float) -> str:
        if not math.isfinite(value):
            return "?"
        return bars[round((value / 2 - low / 2) / span * top)] if span else bars[top // 2]

    return "".join(map(bar, values))


def _table(look: Look, width: int, room: int) -> Table:
    from rich.text import Text

    # On a narrow one only the time of day.
    when = 0 if width >= _MEDIUM else len("2026-01-31 ")
    rows = [
        {
            "id": look.short[checkpoint.id],
            "step": f"{checkpoint.step:,}",
            "saved": texts.time_text(checkpoint.created)[when:],
            "size": texts.size_text(checkpoint.stored_bytes),
            "metrics": plain(texts.metrics_text(checkpoint.metrics)),
            "why": plain(", ".join([*look.marks.get(checkpoint.id, ()), *checkpoint.reasons])),
        }
        for checkpoint in look.checkpoints[-room:]
    ]
    widths = _widths(rows, width)
    made = table(*widths, right=("step", "size"))
    for column, wanted in zip(made.columns, widths.values(), strict=True):
        column.width, column.overflow = wanted, "ellipsis"
    for checkpoint, row in zip(look.checkpoints[-room:], rows, strict=True):
        made.add_row(*(Text(row[name]) for name in widths), style="bold" if checkpoint.id in look.marks else "")
    return made


def _widths(rows: Sequence[Mapping[str, str]], width: int) -> dict[str, int]:
    """The columns that there is room for, and how wide each is: only the last ones are ever cut."""
    from rich.cells import cell_len

    widths: dict[str, int] = {}
    for name in ("id", "step", "saved", "size", "metrics", "why"):
        wanted = max([len(name), *(cell_len(row[name]) for row in rows)])
        left = width - sum(widths.values()) - _GAP * len(widths)
        if wanted <= left or (name in _CUT and left >= _CUT_LEAST) or not widths:
            widths[name] = min(wanted, left)
        elif name not in _CUT:
            break
    return widths
