"""The README's table of speed, made from the measured seconds."""

from __future__ import annotations

import re
import statistics
from pathlib import Path
from typing import Any

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


def markdown(results: dict[str, Any]) -> str:
    """Tables with medians, the range over the rounds, and ratios of medians."""
    parts = [
        f"Measured side by side in one run on {results['cores']} {results['machine']} cores: durable save and load "
        f"with a cold page cache, seconds as median (min to max) of {results['rounds']} interleaved rounds."
    ]
    parts += [_throughput(TITLES[name], results[name]) for name in TITLES if name in results]
    if "listing" in results:
        found = results["listing"]
        parts.append(f"Listing {found['checkpoints']:,} checkpoints: {found['median_s']:.2f} s.")
    return "\n\n".join(parts)


def write_readme(table: str) -> None:
    """Put ``table`` between the marks in README.md."""
    text = README.read_text()
    marks = r"(<!-- speed[^>]*-->\n).*?(<!-- end of speed -->)"
    README.write_text(re.sub(marks, lambda found: f"{found[1]}{table}\n{found[2]}", text, flags=re.DOTALL))


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
