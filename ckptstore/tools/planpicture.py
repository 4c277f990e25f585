"""A plan as a picture: how long each checkpoint lives, and what lies on storage meanwhile. Needs matplotlib."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ckptstore.errors import FormatError
from ckptstore.policy.kinds import kept_as, saved_as
from ckptstore.policy.plan import Plan
from ckptstore.policy.progress import Length

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = ("svg", "png")

# Okabe and Ito's colours, which the colour-blind can tell apart; without yellow, which is too light for lines on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_OWN_COLOURS = {"epochs": 1, "ends of epochs": 1, "milestones": 2}
"""The same in every picture, as their places among the colours."""
_GOES = "#B8B8B8"
_STORAGE = "#56B4E9"
_EPOCH = "#DDDDDD"
_INK = "#333333"
_STYLE: dict[Any, Any] = {
    # The same plan gives the same file, and text stays text.
    "svg.hashsalt": "ckptstore",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": _INK,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    # A metric may be called by any name, and none is a formula.
    "text.parse_math": False,
}
_FEW = 45
"""So many lines have room for a dot at each end and for the number of their step."""
_LINES = 600
"""More lines than this lie closer than a viewer can tell apart, and are drawn as a surface."""
_SAVES = 4000
_EPOCH_NAMES, _EPOCH_LINES = 10, 120
_NAMED = 100
_LONGEST_TITLE = 130
_PANEL_POINTS = 250
"""How high the upper panel is at least, in points, of which a number needs eight."""


@dataclass(frozen=True)
class _Life:
    """One line: the checkpoint in its row lies there from one step to another; ``kind`` is None where it goes."""

    row: int
    first: int
    last: int
    kind: str | None


def picture(plan: Plan, length: Length, format: str, *, title: str, unit_bytes: int | None) -> bytes:
    """``plan`` drawn as "svg" or "png".

    Args:
        plan: what a run saves and keeps.
        length: of that run.
        format: one of ``FORMATS``.
        title: the policies.
        unit_bytes: None, if bytes are bytes; else checkpoints are counted, each of so many.

    Raises:
        FormatError: another format, or a plan that saves nothing.
        ImportError: there is no matplotlib.
    """
    if format not in FORMATS:
        raise FormatError(f"{format!r} is no format of pictures: write svg or png")
    if not plan.moments:
        raise FormatError("this run saves nothing, so there is nothing to draw")
    import matplotlib as mpl

    with mpl.rc_context({**mpl.rcParamsDefault, **_STYLE, "backend": "agg"}):
        figure = _figure(plan, length, title, unit_bytes)
        made = io.BytesIO()
        # Without the time and the versions of what drew it.
        nothing = {"Date": None, "Creator": None} if format == "svg" else {"Software": None}
        figure.savefig(made, format=format, dpi=150, facecolor="white", metadata=nothing)
    return made.getvalue()


def _figure(plan: Plan, length: Length, title: str, unit_bytes: int | None) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(10, 6.4), layout="constrained")
    lives, storage = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1.35))
    total = length.require_total("a picture")
    for panel in (lives, storage):
        panel.set_xlim(-total * 0.008, total)
        panel.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    _epochs(lives, storage, length)
    _lives(lives, list(_all_lives(plan, total)), total)
    _storage(storage, plan, total, unit_bytes)
    lives.tick_params(labelbottom=False)
    storage.set_xlabel("step" if length.step_s is None else f"step, of {length.step_s:g} s")
    saved, stay = len(plan.moments), len(plan.final)
    heading = f"{saved:,} saves, " + ("all stay" if saved == stay else f"of which {stay:,} stay")
    above: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points"}
    lines = [line if len(line) <= _LONGEST_TITLE else f"{line[:_LONGEST_TITLE]}…" for line in title.splitlines()]
    lives.annotate("\n".join(lines), (0, 1), (0, 19), size=8, **above)
    lives.annotate(heading, (0, 1), (0, 25 + 11 * len(lines)), weight="bold", size=13, **above)
    return figure


def _all_lives(plan: Plan, total: int) -> Iterator[_Life]:
    whys = {verdict.step: verdict.why for verdict in plan.final}
    # Where no rule says what stays, why it was saved tells more.
    by_save = all(why == "all are kept" for why in whys.values())
    for row, moment in enumerate(plan.moments):
        kind = None
        if moment.step in whys:
            kind = saved_as(moment.reasons[0]) if by_save else kept_as(whys[moment.step])
        yield _Life(row, moment.step, total if moment.goes_at is None else moment.goes_at, kind)


def _lives(panel: Axes, lives: Sequence[_Life], total: int) -> None:
    kinds = list(dict.fromkeys(life.kind for life in lives if life.kind is not None))
    free = [colour for place, colour in enumerate(_COLOURS) if place not in _OWN_COLOURS.values()]
    others = [kind for kind in kinds if kind not in _OWN_COLOURS]
    colours = {kind: free[min(number, len(free) - 1)] for number, kind in enumerate(others)}
    colours |= {kind: _COLOURS[place] for kind, place in _OWN_COLOURS.items()}
    panel.set_ylim(-0.7, len(lives) - 0.3)
    groups: list[tuple[str | None, str]] = [*((kind, colours[kind]) for kind in kinds), (None, _GOES)]
    for kind, colour in groups:
        group = [life for life in lives if life.kind == kind]
        if group:
            name = "goes" if kind is None else kind
            _group(panel, group, colour, f"{name} ({len(group):,})", len(lives))
    panel.legend(loc="upper left", frameon=True, framealpha=0.9, edgecolor="none", fontsize=8)
    if len(lives) <= _FEW:
        panel.set_yticks(range(len(lives)), [f"{life.first:,}" for life in lives], size=7)
        panel.set_ylabel("saved at step")
    else:
        panel.yaxis.set_major_formatter(lambda row, _: f"{row:,.0f}")
        panel.set_ylabel("saves, in order")
        staying = [life for life in lives if life.kind is not None]
        # The numbers of hundreds would be a column of their own that nobody reads.
        if len(staying) <= _NAMED:
            _name(panel, staying, total, len(lives))


def _name(panel: Axes, staying: Sequence[_Life], total: int, rows: int) -> None:
    """The steps of those that stay at the ends of their lines, where there is room."""
    apart = rows * 8 / _PANEL_POINTS
    last = -apart
    for life in staying:
        if life.row - last >= apart:
            panel.annotate(
                f"{life.first:,}", (total, life.row), (5, 0), textcoords="offset points", va="center", size=7,
                annotation_clip=False,
            )  # fmt: skip
            last = life.row


def _group(panel: Axes, group: Sequence[_Life], colour: str, label: str, rows: int) -> None:
    """The lines of one colour."""
    from matplotlib.collections import LineCollection

    stays = group[0].kind is not None
    if len(group) > _LINES:
        _surface(panel, group, colour, label, rows)
        return
    # As thick as there is room for; those that stay have to be seen among thousands.
    width = min(3.5 if stays else 2.2, max(0.7 * _PANEL_POINTS / rows, 1.0 if stays else 0.4))
    segments = [[(life.first, life.row), (life.last, life.row)] for life in group]
    lines = LineCollection(segments, colors=colour, linewidths=width, label=label, zorder=3 if stays else 2)
    lines.set_gid(f"lives-{'stay' if stays else 'go'}")
    lines.set_capstyle("round")
    panel.add_collection(lines)
    if rows <= _FEW:
        panel.scatter(
            [life.first for life in group], [life.row for life in group], s=16, color=colour, zorder=4, clip_on=False
        )
        if not stays:
            gone = [life.last for life in group], [life.row for life in group]
            panel.scatter(*gone, s=18, color=colour, marker="x", linewidths=1, zorder=4, clip_on=False)


def _surface(panel: Axes, group: Sequence[_Life], colour: str, label: str, rows: int) -> None:
    """Lines that lie too close to be told apart, as one shape; of neighbours the longest is drawn."""
    from matplotlib.collections import PolyCollection

    bundle = -(-rows // _LINES)
    found: dict[int, tuple[int, int]] = {}
    for life in group:
        first, last = found.get(life.row // bundle, (life.first, life.last))
        found[life.row // bundle] = min(first, life.first), max(last, life.last)
    boxes = [
        [(first, low), (last, low), (last, low + bundle), (first, low + bundle)]
        for low, (first, last) in ((number * bundle - 0.5, ends) for number, ends in found.items())
    ]
    stays = group[0].kind is not None
    shape = PolyCollection(boxes, facecolors=colour, edgecolors="none", label=label, zorder=3 if stays else 2)
    shape.set_gid(f"lives-{'stay' if stays else 'go'}")
    panel.add_collection(shape)


def _storage(panel: Axes, plan: Plan, total: int, unit_bytes: int | None) -> None:
    highest = max(plan.moments, key=lambda moment: moment.peak_bytes)
    unit, name = (unit_bytes, "checkpoints") if unit_bytes else _unit(plan.peak_bytes)
    steps, counts = _heights(plan, total)
    amounts = [count / unit for count in counts]
    panel.fill_between(steps, amounts, color=_STORAGE, alpha=0.45, linewidth=0)
    panel.plot(steps, amounts, color="#0072B2", linewidth=1.0 if len(plan.moments) < 300 else 0.5, gid="on-storage")
    top = max(plan.peak_bytes, highest.peak_bytes) / unit
    panel.set_ylim(0, top * 1.32 or 1)
    panel.set_ylabel(f"{name} on storage")
    foreseen, end = highest.peak_bytes / unit, amounts[-1]
    words = f"peak {_amount(foreseen, name)} at step {highest.step:,}"
    # Close under the line of the bound there is no room for words.
    _peak(panel, highest.step / total, foreseen, top if top < foreseen * 1.3 else foreseen, words)
    panel.annotate(
        f"{_amount(end, name)} at the end", (total, end), (4, 0), textcoords="offset points",
        va="center", size=8, annotation_clip=False,
    )  # fmt: skip
    if plan.peak_bytes > highest.peak_bytes or not plan.at_most:
        _bound(panel, plan, top, name, on_the_left=highest.step > 0.4 * total)


def _heights(plan: Plan, total: int) -> tuple[list[int], list[int]]:
    """The line of what lies there: up as a checkpoint is written, down as others go."""
    steps, counts = [0], [0]
    bundle = -(-len(plan.moments) // _SAVES)
    for start in range(0, len(plan.moments), bundle):
        # Of more saves than a viewer can tell apart some are drawn as one, which is as high as the highest.
        group = plan.moments[start : start + bundle]
        highest = max(group, key=lambda moment: moment.peak_bytes)
        steps += [group[0].step, highest.step, group[-1].step]
        counts += [counts[-1], highest.peak_bytes, group[-1].left_bytes]
    return [*steps, total], [*counts, counts[-1]]


def _peak(panel: Axes, place: float, amount: float, height: float, words: str) -> None:
    """A dot at ``amount``, and words over ``height``; ``place`` is a share of the run."""
    side = "right" if place > 0.6 else "left"
    step = place * panel.get_xlim()[1]
    panel.plot([step], [amount], "o", color="#D55E00", markersize=5, clip_on=False, zorder=5)
    panel.annotate(
        words, (step, height), (-6 if side == "right" else 6, 4), textcoords="offset points", ha=side, weight="bold",
        size=9, color="#A34000",
    )  # fmt: skip


def _bound(panel: Axes, plan: Plan, top: float, name: str, *, on_the_left: bool) -> None:
    """A line at the most that may lie there, with its words where those of the peak are not."""
    word = "at most" if plan.at_most else "at least"
    panel.axhline(top, color="#D55E00", linewidth=1, linestyle=(0, (4, 3)))
    panel.annotate(
        f"{word} {_amount(top, name)}, with what can't be foreseen", (0.012 if on_the_left else 0.988, top), (0, 4),
        xycoords=panel.get_yaxis_transform(), textcoords="offset points", ha="left" if on_the_left else "right", size=8,
    )  # fmt: skip


def _epochs(lives: Axes, storage: Axes, length: Length) -> None:
    """A light line where each epoch ends, with its number where there is room."""
    if not length.epochs and not length.steps_per_epoch:
        return
    ends = length.epoch_ends()
    if len(ends) > _EPOCH_LINES:
        return
    # 1, 2, 5, 10, …: so that no more than a few are named.
    steps = (digit * 10**power for power in range(8) for digit in (1, 2, 5))
    named = next(step for step in steps if len(ends) / step <= _EPOCH_NAMES)
    for number, end in enumerate(ends, 1):
        for panel in (lives, storage):
            panel.axvline(end, color=_EPOCH, linewidth=0.8 if len(ends) <= 50 else 0.5, zorder=0)
        if number % named == 0:
            lives.annotate(
                f"epoch {number}", (end, 1), (0, 4), xycoords=lives.get_xaxis_transform(),
                textcoords="offset points", ha="center", size=7, color="#777777",
            )  # fmt: skip


def _unit(count: int) -> tuple[int, str]:
    units = ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB"))
    return next(((unit, name) for unit, name in units if count >= unit), (1, "B"))


def _amount(amount: float, name: str) -> str:
    return f"{amount:,.0f} {name}" if name == "checkpoints" else f"{amount:,.3g} {name}"
