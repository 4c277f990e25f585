"""A plan for the terminal, and as JSON."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ckptstore.cli import texts
from ckptstore.cli.terminal import answer, plain, table

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from ckptstore.cli.plan import Asked
    from ckptstore.policy.plan import Moment, Plan

_ALL = 40
"""So many rows are shown as they are; of more only some at either end."""
_ENDS = 12
_WHY_ENDS = 8
_GOING = 3
_LONGEST_POLICY = 400


def document(asked: Asked, plan: Plan) -> dict[str, Any]:
    """All of it, for a script."""
    size, length = asked.checkpoint_bytes, asked.length
    highest = max(plan.moments, key=lambda moment: moment.peak_bytes, default=None)

    def in_bytes(amount: int) -> int | None:
        return None if size is None else amount

    return {
        "save": str(asked.save),
        "keep": None if asked.keep is None else str(asked.keep),
        "length": {
            "total_steps": length.total_steps,
            "epochs": length.epochs,
            "steps_per_epoch": length.steps_per_epoch,
            "tokens_per_step": length.tokens_per_step,
            "step_s": length.step_s,
        },
        "checkpoint_bytes": size,
        "trash_s": asked.trash_s,
        "saves": [_save(moment, size) for moment in plan.moments],
        "final": [{"step": it.step, "why": it.why, "bytes": in_bytes(it.own_bytes)} for it in plan.final],
        "peak": {
            "step": None if highest is None else highest.step,
            "foreseen_bytes": in_bytes(0 if highest is None else highest.peak_bytes),
            "bytes": in_bytes(plan.peak_bytes),
            "checkpoints": plan.peak_bytes // (size or 1),
            "at_most": plan.at_most,
        },
        "notes": [*asked.notes, *plan.notes],
    }


def _save(moment: Moment, size: int | None) -> dict[str, Any]:
    return {
        "step": moment.step,
        "epoch": moment.epoch,
        "time_s": moment.time_s,
        "reasons": list(moment.reasons),
        "goes": [{"step": verdict.step, "why": verdict.why} for verdict in moment.going],
        "goes_at": moment.goes_at,
        "there": moment.count,
        "peak_bytes": None if size is None else moment.peak_bytes,
        "left_bytes": None if size is None else moment.left_bytes,
    }


def show(asked: Asked, plan: Plan) -> None:
    """For a person: the policies, the run from left to right, every save, and what stays."""
    # Where nobody looks, it is as wide as it would be in the smallest usual terminal.
    width = max(shutil.get_terminal_size((80, 24)).columns, 40)
    answer(*_parts(asked, plan, width))


def _parts(asked: Asked, plan: Plan, width: int) -> Iterator[RenderableType]:
    from ckptstore.cli.plantimeline import timeline

    yield _head(asked)
    yield ""
    if plan.moments:
        yield from timeline(plan, asked.length, width, lambda count: amount(asked, count))
        yield ""
        yield _table(asked, plan)
        yield ""
    yield from _end(asked, plan)
    yield from (f"note: {text}" for text in (*asked.notes, *plan.notes))
    if asked.checkpoint_bytes is None:
        yield "note: --size 1.5GB, what one checkpoint takes, tells bytes"


def amount(asked: Asked, count: int) -> str:
    """``count`` bytes; where it isn't known what a checkpoint takes, each counts as one."""
    return texts.count_text(count, "checkpoint") if asked.checkpoint_bytes is None else texts.size_text(count)


def _head(asked: Asked) -> Table:
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    made.add_column(style="bold", no_wrap=True)
    made.add_column(overflow="fold")
    for name, value in (("save", str(asked.save)), ("keep", str(asked.keep or "all")), ("run", _run(asked))):
        text = value if len(value) <= _LONGEST_POLICY else f"{value[:_LONGEST_POLICY]}…"
        made.add_row(name, Text(plain(text)))
    return made


def _run(asked: Asked) -> str:
    length = asked.length
    parts = [texts.count_text(length.require_total("a plan"), "step")]
    if length.epochs:
        parts.append(texts.count_text(length.epochs, "epoch"))
    if length.step_s is not None:
        parts.append(clock(length.require_total("a plan") * length.step_s))
    if asked.checkpoint_bytes is not None:
        parts.append(f"{texts.size_text(asked.checkpoint_bytes)} a checkpoint")
    return ", ".join(parts)


def clock(seconds: float) -> str:
    """Hours, minutes and seconds, with days where there are some: ``2d 03:04:05``."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return (f"{days}d " if days else "") + f"{hour:02}:{minute:02}:{second:02}"


def _table(asked: Asked, plan: Plan) -> Table:
    from rich.text import Text

    lines = [_cells(asked, moment) for moment in _shown(plan.moments, _ENDS)]
    columns = ["step", "epoch", "time", "why", "goes", "there", "bytes"]
    # What nobody knows, and what never happens, takes no room.
    used = [name for name in columns if any(line.get(name) for line in lines)]
    numbers = ("step", "epoch", "time", "there", "bytes")
    made = table(*used, right=numbers, drop=("there", "epoch"), fold=("why", "goes"))
    stays = {verdict.step for verdict in plan.final}
    hidden = len(plan.moments) - len(lines)
    for number, (moment, line) in enumerate(zip(_shown(plan.moments, _ENDS), lines, strict=True)):
        if hidden and number == _ENDS:
            gap = {"step": "…", "why": f"{hidden:,} more, --json lists all"}
            made.add_row(*(Text(gap.get(name, "")) for name in used), style="dim")
        style = "" if moment.step in stays else "dim"
        made.add_row(*(Text(plain(line.get(name, ""))) for name in used), style=style)
    return made


def _shown(rows: Sequence[Any], ends: int) -> Sequence[Any]:
    return rows if len(rows) <= max(_ALL, 2 * ends) else [*rows[:ends], *rows[-ends:]]


def _cells(asked: Asked, moment: Moment) -> dict[str, str]:
    going = [f"{verdict.step}" for verdict in moment.going]
    goes = ", ".join(going[:_GOING])
    if len(going) > _GOING:
        goes += f", … {len(going)} in all"
    return {
        "step": str(moment.step),
        "epoch": "" if moment.epoch is None else str(moment.epoch),
        "time": "" if moment.time_s is None else clock(moment.time_s),
        "why": ", ".join(moment.reasons),
        "goes": goes,
        "there": str(moment.count),
        "bytes": "" if asked.checkpoint_bytes is None else texts.size_text(moment.left_bytes),
    }


def _end(asked: Asked, plan: Plan) -> Iterator[RenderableType]:
    if not plan.moments:
        yield "nothing is saved"
        return
    count, left = len(plan.final), plan.moments[-1].left_bytes
    size = "" if asked.checkpoint_bytes is None else f", {texts.size_text(left)}"
    if asked.keep is None:
        yield f"all {count:,} stay{size}"
    else:
        yield f"{texts.count_text(count, 'checkpoint')} stay{'s' if count == 1 else ''} to the end{size}:"
        yield _final(plan)
        yield ""
    yield _peak(asked, plan)


def _final(plan: Plan) -> Table:
    from rich.text import Text

    made = table("step", "why", right=("step",), fold=("why",))
    shown = _shown(plan.final, _WHY_ENDS)
    for number, verdict in enumerate(shown):
        if len(shown) < len(plan.final) and number == _WHY_ENDS:
            hidden = len(plan.final) - len(shown)
            made.add_row(Text("…"), Text(f"{hidden:,} more, --json lists all"), style="dim")
        made.add_row(Text(str(verdict.step)), Text(plain(verdict.why)))
    return made


def _peak(asked: Asked, plan: Plan) -> str:
    highest = max(plan.moments, key=lambda moment: moment.peak_bytes)
    at = f"{amount(asked, highest.peak_bytes)}, when step {highest.step} is saved"
    if plan.at_most and plan.peak_bytes == highest.peak_bytes:
        return f"peak: {at}"
    word = "at most" if plan.at_most else "at least"
    if plan.peak_bytes == highest.peak_bytes:
        return f"peak: {word} {at}"
    return f"peak: {word} {amount(asked, plan.peak_bytes)}; foreseen are {at}"
