"""Numbers, times and checkpoints as people and scripts read them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from ckptstore.units import count_text, rate_text, size_text

if TYPE_CHECKING:
    from ckptstore.engine.catalogue import Checkpoint, Damage, Timing
    from ckptstore.maintenance.receipts import Lag
    from ckptstore.maintenance.verifications import Verification

__all__ = [
    "checkpoint_fields",
    "count_text",
    "damage_fields",
    "holds_of",
    "lag_fields",
    "lag_text",
    "metrics_text",
    "one_line",
    "rate_text",
    "short_ids",
    "size_text",
    "time_text",
    "timing_text",
    "verification_fields",
    "verification_text",
]


def time_text(created: datetime) -> str:
    """Local time to the second."""
    return f"{created.astimezone():%Y-%m-%d %H:%M:%S}"


def metrics_text(metrics: Mapping[str, float]) -> str:
    """Metrics in a row, as ``val_loss 3.1, acc 0.52``."""
    return ", ".join(f"{name} {value:.5g}" for name, value in metrics.items())


def timing_text(timing: Timing | None) -> str:
    """How long a save took, as far as it is known."""
    if timing is None:
        return ""
    save = f"in {_seconds_text(timing.save_s)}" if timing.save_s is not None else ""
    stall = f"training waited {_seconds_text(timing.stall_s)}" if timing.stall_s is not None else ""
    return ", ".join(filter(None, (save, stall)))


def _seconds_text(seconds: float) -> str:
    """Seconds to a hundredth, short ones to a ten thousandth."""
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{round(seconds, 4):g} s"


def one_line(checkpoint: Checkpoint) -> str:
    """A checkpoint in a sentence: which one it is and what would be lost with it."""
    parts = [f"step {checkpoint.step}"]
    if checkpoint.epoch is not None:
        parts.append(f"epoch {checkpoint.epoch}")
    if checkpoint.metrics:
        parts.append(metrics_text(checkpoint.metrics))
    parts += [size_text(checkpoint.stored_bytes), f"saved {time_text(checkpoint.created)}"]
    return f"{checkpoint.id} ({', '.join(parts)})"


def short_ids(ids: Iterable[str]) -> dict[str, str]:
    """For each id its shortest beginning, cut at a "-", that names no other one."""
    ordered = sorted(ids)
    short = {}
    for index, id in enumerate(ordered):
        neighbours = ordered[max(index - 1, 0) : index] + ordered[index + 1 : index + 2]
        parts = id.split("-")
        beginnings = ("-".join(parts[:count]) for count in range(2, len(parts)))
        short[id] = next((b for b in beginnings if not any(n.startswith(b) for n in neighbours)), id)
    return short


def checkpoint_fields(checkpoint: Checkpoint, holds: Mapping[str, str]) -> dict[str, Any]:
    """A checkpoint as JSON. Metrics that are no finite numbers are text, as in the commit record."""
    from ckptstore.format.records import metric

    return {
        "id": checkpoint.id,
        "step": checkpoint.step,
        "epoch": checkpoint.epoch,
        "created": checkpoint.created.isoformat(),
        "metrics": {name: metric(value) for name, value in checkpoint.metrics.items()},
        "modes": dict(checkpoint.modes),
        "reasons": list(checkpoint.reasons),
        "holds": holds_of(checkpoint.id, holds),
        "parameters": checkpoint.parameters,
        "tensor_count": checkpoint.tensors,
        "file_count": checkpoint.files,
        "raw_bytes": checkpoint.raw_bytes,
        "stored_bytes": checkpoint.stored_bytes,
        "world_size": checkpoint.world_size,
        "save_s": checkpoint.timing.save_s if checkpoint.timing is not None else None,
        "stall_s": checkpoint.timing.stall_s if checkpoint.timing is not None else None,
    }


def damage_fields(damage: Damage) -> dict[str, Any]:
    """Damage as JSON."""
    return {
        "key": damage.key,
        "problem": damage.problem,
        "id": damage.id,
        "block": damage.block,
        "tensors": list(damage.tensors),
    }


def holds_of(id: str, holds: Mapping[str, str]) -> list[str]:
    """The names of the holds that pin ``id``."""
    return sorted(name for name, held in holds.items() if held == id)


def lag_text(lag: Lag) -> str:
    """How far a backup is behind."""
    if not lag.behind:
        return f"backup {lag.place}: has all {lag.copied}"
    since = time_text(lag.since) if lag.since is not None else "?"
    what = f"{count_text(lag.behind, 'checkpoint')}, {size_text(lag.behind_bytes)}"
    return f"backup {lag.place}: lacks {what}, the oldest saved {since}"


def lag_fields(lag: Lag) -> dict[str, Any]:
    """The same as JSON."""
    return {
        "place": lag.place,
        "copied": lag.copied,
        "behind": lag.behind,
        "behind_bytes": lag.behind_bytes,
        "since": lag.since.isoformat() if lag.since is not None else None,
    }


def verification_text(verified: Verification, since: int) -> str:
    """What came of a verification; ``since``: how many checkpoints are newer than all that it read."""
    notes = [
        f"only {verified.id}" if verified.id is not None else "",
        f"a sample of {verified.sample:.4g}" if verified.sample < 1 else "",
        f"{count_text(verified.repaired, 'damage')} repaired" if verified.repaired else "",
        f"{since:,} saved since" if since else "",
    ]
    noted = ", ".join(filter(None, notes))
    result = "good" if verified.ok else count_text(verified.damages, "damage")
    return f"last verified {_age_text(verified.created)} ago: {result}{f' ({noted})' if noted else ''}"


def _age_text(then: datetime) -> str:
    """Time since ``then``, in the largest unit of which there are two."""
    seconds = max(0, int((datetime.now(UTC) - then).total_seconds()))
    size, unit = next(((s, u) for s, u in ((86400, "d"), (3600, "h"), (60, "min")) if seconds >= 2 * s), (1, "s"))
    return f"{seconds // size} {unit}"


def verification_fields(verified: Verification) -> dict[str, Any]:
    """The same as JSON."""
    return {**vars(verified), "created": verified.created.isoformat(), "ok": verified.ok}
