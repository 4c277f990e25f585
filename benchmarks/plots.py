"""Drawings of what was measured, as SVG beside this file."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HERE = Path(__file__).parent
COLOURS = {"ckptstore": "tab:blue", "torch": "tab:red"}
LABELS = {
    "none": "no save",
    "write": "as many bytes written, nothing else",
    "ckptstore": "ckptstore",
    "ckptstore_overlapped": "ckptstore, overlapped",
    "ckptstore_async": "ckptstore, async",
    "dcp": "dcp.async_save",
    "dcp_overlapped": "dcp.async_save, staging in a thread",
    "dcp_process": "dcp.async_save, staging in a thread, a process writes",
    "torch": "torch.save + fsync",
}


def draw(results: dict[str, Any], folder: Path = HERE) -> list[Path]:
    """Draw what ``results`` has: ``growth.svg``, ``training.svg`` and ``scale.svg``.

    Raises:
        ImportError: there is no matplotlib.
    """
    import matplotlib as mpl

    # The same figures give the same file; text stays text.
    mpl.rcParams |= {"svg.hashsalt": "ckptstore", "svg.fonttype": "none"}
    drawings = {"growth": _growth, "training": _training, "scale": _scale}
    return [drawings[name](results[name], folder / f"{name}.svg") for name in drawings if name in results]


def _growth(measured: dict[str, Any], path: Path) -> Path:
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    _lines(panels[0], measured["by_bytes"], "bytes", 1e9, "GB, fp32 tensors as a GPT has them")
    _lines(panels[1], measured["by_tensors"], "tensors", 1, "tensors of 1 KiB")
    panels[0].set_ylabel("seconds, median")
    panels[0].legend(fontsize="small")
    return _keep(figure, path)


def _lines(axes: Axes, points: list[dict[str, Any]], key: str, unit: float, label: str) -> None:
    xs = [point[key] / unit for point in points]
    for name in points[0]["savers"]:
        for verb, style in (("save", "o-"), ("load", "s:")):
            drawn = [(x, p["savers"][name][f"{verb}_s"]) for x, p in zip(xs, points, strict=True)]
            drawn = [(x, statistics.median(seconds)) for x, seconds in drawn if seconds]
            axes.plot(*zip(*drawn, strict=True), style, color=COLOURS[name], label=f"{LABELS[name]}, {verb}")
    # Through our save of the largest: what grows in proportion runs along it.
    top = statistics.median(points[-1]["savers"]["ckptstore"]["save_s"])
    axes.plot(xs, [top * x / xs[-1] for x in xs], "--", color="grey", label="in proportion")
    axes.set(xscale="log", yscale="log", xlabel=label)
    axes.grid(which="major", alpha=0.3)


def _scale(measured: dict[str, Any], path: Path) -> Path:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    points = measured["points"]
    ranks = [point["ranks"] for point in points]
    lines = {
        "commit_s": "commit on rank 0, behind training",
        "plan_first_s": "first agreement, training waits",
        "plan_again_s": "every later agreement, training waits",
        "load_s": "before a load by as many ranks",
        "other_load_s": "before a load by more or fewer ranks",
    }
    for key, label in lines.items():
        axes.plot(ranks, [point[key] for point in points], "o-", label=label)
    axes.set(xscale="log", yscale="log", xlabel="ranks, each with 10 GB", ylabel="seconds", xticks=ranks)
    axes.set_xticklabels([str(n) for n in ranks])
    axes.minorticks_off()
    axes.grid(which="major", alpha=0.3)
    # Above all lines.
    axes.set_ylim(top=1e4)
    axes.legend(fontsize="small", ncols=2, loc="upper left")
    return _keep(figure, path)


def _training(measured: dict[str, Any], path: Path) -> Path:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    numbers = range(1, measured["steps"] + 1)
    for name, times in measured["savers"].items():
        limits = {"none": "--", "write": ":"}
        style = {"color": "black", "linestyle": limits[name]} if name in limits else {"marker": "o"}
        medians = [statistics.median(step) for step in zip(*times["step_s"], strict=True)]
        axes.plot(numbers, medians, label=LABELS[name], **style)
    axes.set(xlabel="steps after the save began", ylabel="seconds of the step, median", xticks=list(numbers))
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")
    return _keep(figure, path)


def _keep(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot

    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return path
