"""The README's tables of speed, made from what was measured."""

from __future__ import annotations

import re
import statistics
from collections.abc import Collection
from pathlib import Path
from typing import Any

from benchmarks import figures, rankstable, s3table

README = Path(__file__).parent.parent / "README.md"
NAMES = {
    "raw": "the disk's limit (plain direct blocks, no hash)",
    "ckptstore": "**ckptstore**, hashed and verified",
    "torch": "`torch.save` + fsync, `torch.load`",
    "safetensors": "safetensors + fsync, `load_file`",
    "dcp": "`torch.distributed.checkpoint`",
}
TITLES = {
    "gpt2": "GPT-2 124M with AdamW state, fp32, 444 tensors, 1.49 GB",
    "many": "100,000 tensors of 1 KiB",
}


DRAWINGS = {
    "training": "Seconds of each training step after a save began",
    "growth": "Seconds of a save and a load by bytes and by tensors",
}
SCALE = "Seconds of a commit, of agreeing, and of what is read before a load, by ranks"


def markdown(results: dict[str, Any]) -> str:
    """Tables with medians, the range over the rounds, and ratios round by round."""
    rounds = _rounds(list(results["rounds"].values()))
    parts = [
        f"Measured side by side on {results['cores']} {results['machine']} cores: medians (min to max) of {rounds} "
        "interleaved rounds. Saves are durable, loads begin with a cold page cache."
    ]
    parts += [_throughput(TITLES[name], results[name]) for name in TITLES if name in results]
    parts += [table] if (table := figures.markdown(results)) else []
    parts += [f"![{text}](benchmarks/{name}.svg)" for name, text in DRAWINGS.items() if name in results]
    if "listing" in results:
        found = results["listing"]
        parts.append(f"Listing {found['checkpoints']:,} checkpoints: {found['median_s']:.2f} s.")
    parts += [_policies(results["policies"])] if "policies" in results else []
    parts += [table] if (table := rankstable.markdown(results)) else []
    parts += [f"![{SCALE}](benchmarks/scale.svg)"] if "scale" in results else []
    parts += ["### Object stores", s3table.markdown(results["s3"])] if "s3" in results else []
    return "\n\n".join(parts)


def _policies(measured: dict[str, Any]) -> str:
    rows = [f"| deciding what stays of {measured['checkpoints']:,} checkpoints, under | takes |", "|---|---|"]
    for name, seconds in measured["seconds"].items():
        median, least, most = (value * 1000 for value in (statistics.median(seconds), min(seconds), max(seconds)))
        rows.append(f"| `{name}` | {median:.1f} ms ({least:.1f} to {most:.1f}) |")
    return "\n".join(rows)


def write_readme(table: str) -> None:
    """Put ``table`` between the marks in README.md."""
    text = README.read_text()
    marks = r"(<!-- speed[^>]*-->\n).*?(<!-- end of speed -->)"
    README.write_text(re.sub(marks, lambda found: f"{found[1]}{table}\n{found[2]}", text, flags=re.DOTALL))


def _rounds(counts: Collection[int]) -> str:
    few, many = min(counts), max(counts)
    return f"{many}" if few == many else f"{few} to {many}"


def _throughput(title: str, measured: dict[str, Any]) -> str:
    ours = measured["ckptstore"]
    rows = [f"| {title} | save | ckptstore is | load | ckptstore is |", "|---|---|---|---|---|"]
    for name, times in measured.items():
        cells = [NAMES[name]]
        for verb in ("save_s", "load_s"):
            cells += [_seconds(times[verb]), "" if name == "ckptstore" else _ratio(times[verb], ours[verb])]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _seconds(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})"


def _ratio(rival: list[float], ours: list[float]) -> str:
    # Round by round, so that a machine whose speed drifts slows both sides of each ratio.
    return f"{statistics.median(r / o for r, o in zip(rival, ours, strict=True)):.2f} x as fast"
