"""What a report shows, as JSON: everything is worked out here, and the page only draws it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from ckptstore.engine.catalogue import Checkpoint
from ckptstore.engine.select import best_of
from ckptstore.format.layout import try_id
from ckptstore.format.records import metric
from ckptstore.policy.kinds import kinds
from ckptstore.policy.thin import own_bytes
from ckptstore.tools.lineage import Origin, Save, origins, speeds
from ckptstore.tools.survey import Survey, Unfinished, saved

Document = dict[str, Any]

_BEST_LANES, _REASON_LANES = 8, 14
"""So many rows of the timeline have a name of their own; what is rarer shares one."""


def document(survey: Survey) -> Document:
    """All that a page about ``survey`` shows."""
    there = survey.catalogue.checkpoints
    best = bests(there)
    rows = _rows(survey, best)
    return {
        "url": survey.url,
        "store_id": survey.store.store_id if survey.store is not None else survey.catalogue.store_id,
        "created": survey.store.created if survey.store is not None else None,
        "created_by": survey.store.created_by if survey.store is not None else None,
        "made": _time(survey.made),
        "summary": _summary(survey, best),
        "saves": rows,
        "lanes": _lanes(rows, list(best)),
        "metrics": _metrics(there, best),
        "writers": _writers(survey),
        "backups": [{**dataclasses.asdict(lag), "since": _time(lag.since)} for lag in survey.lags],
        "verifications": [{**vars(one), "created": _time(one.created), "ok": one.ok} for one in survey.verifications],
        "damaged": _damaged(survey),
        "unfinished": [_unfinished(one) for one in survey.unfinished],
        "retention": _retention(survey),
    }


def bests(there: Sequence[Checkpoint]) -> dict[str, tuple[Checkpoint, str]]:
    """For each metric the best checkpoint, and whether "min" or "max" is best."""
    having: dict[str, list[Checkpoint]] = {}
    for checkpoint in there:
        for name in checkpoint.metrics:
            having.setdefault(name, []).append(checkpoint)
    found = ((name, best_of(those, name)) for name, those in having.items())
    return {name: best for name, best in found if best is not None}


def history(checkpoints: Iterable[Checkpoint], there: Iterable[Checkpoint]) -> list[Save]:
    """``checkpoints``, oldest first, as ``lineage`` takes them; ``there`` are those that exist."""
    ids = {c.id for c in there}
    return [Save(c.order, c.id in ids, c.created, c.reasons) for c in checkpoints]


def _rows(survey: Survey, best: Mapping[str, tuple[Checkpoint, str]]) -> list[Document]:
    """One for each save, oldest first, whatever became of it."""
    known = {c.order: c for c in saved(survey)}
    lost = set(filter(None, (try_id(damage.id or "") for damage in survey.catalogue.damaged)))
    past = history(known.values(), survey.catalogue.checkpoints)
    past += [Save(order, False) for order in {*survey.gone, *lost} - known.keys()]
    past.sort(key=lambda save: save.order)
    came = origins(past)
    verdicts = {} if survey.judgement is None else {v.id: v for v in survey.judgement.verdicts}
    roles = _roles(survey, best)
    holds: dict[str, list[str]] = {}
    for name, pinned in sorted(survey.holds.items()):
        holds.setdefault(pinned, []).append(name)
    rows = []
    for save, origin, speed in zip(past, came, speeds(past, came), strict=True):
        id, checkpoint = str(save.order), known.get(save.order)
        status = "there" if save.there else "damaged" if save.order in lost else "gone"
        if checkpoint is not None and not save.there:
            status = "deleted"
        row = _row(save, origin, speed, status) | _facts(checkpoint)
        row["roles"] = roles.get(id, [])
        row["holds"] = holds.get(id, [])
        grave, verdict, home = survey.graves.get(id), verdicts.get(id), survey.catalogue.elsewhere.get(id)
        row["deleted"] = {"created": grave.created, "reason": grave.reason} if grave is not None else None
        row["verdict"] = {"stays": verdict.stays, "why": verdict.why} if verdict is not None else None
        row["only_in"] = home.url if home is not None else None
        rows.append(row)
    return rows


def _row(save: Save, origin: Origin, speed: float | None, status: str) -> Document:
    return {
        "id": str(save.order),
        "status": status,
        "step": save.order.step,
        "writer": save.order.writer,
        "parent": origin.parent,
        "branch": origin.branch,
        "abandoned": origin.abandoned,
        "steps_per_s": speed,
    }


def _facts(checkpoint: Checkpoint | None) -> Document:
    """What the commit record says; of one that is gone nothing is known."""
    if checkpoint is None:
        names = "epoch created parameters tensors files world_size raw_bytes stored_bytes borrowed_bytes own_bytes"
        empty: Document = {"metrics": {}, "modes": {}, "reasons": [], "lenders": []}
        return empty | dict.fromkeys([*names.split(), "save_s", "stall_s", "bytes_per_s"])
    return {
        "epoch": checkpoint.epoch,
        "created": _time(checkpoint.created),
        "metrics": {name: metric(value) for name, value in checkpoint.metrics.items()},
        "modes": dict(checkpoint.modes),
        "reasons": list(checkpoint.reasons),
        "parameters": checkpoint.parameters,
        "tensors": checkpoint.tensors,
        "files": checkpoint.files,
        "world_size": checkpoint.world_size,
        "raw_bytes": checkpoint.raw_bytes,
        "stored_bytes": checkpoint.stored_bytes,
        "borrowed_bytes": checkpoint.borrowed_bytes,
        "own_bytes": own_bytes(checkpoint),
        "lenders": list(checkpoint.lenders),
        **_timing(checkpoint),
    }


def _timing(checkpoint: Checkpoint) -> Document:
    """How long the save took, and training waited for it, in seconds; None where it isn't recorded."""
    timing = checkpoint.timing
    save_s = None if timing is None else timing.save_s
    return {
        "save_s": save_s,
        "stall_s": None if timing is None else timing.stall_s,
        "bytes_per_s": own_bytes(checkpoint) / save_s if save_s else None,
    }


def _roles(survey: Survey, best: Mapping[str, tuple[Checkpoint, str]]) -> dict[str, list[str]]:
    roles: dict[str, list[str]] = {}
    for newest in survey.catalogue.checkpoints[-1:]:
        roles[newest.id] = ["latest"]
    for name, (checkpoint, _) in best.items():
        roles.setdefault(checkpoint.id, []).append(f"best {name}")
    return roles


def _lanes(rows: Sequence[Document], metrics: Sequence[str]) -> list[Document]:
    """The rows of the timeline, each with the places of the saves that it shows."""
    # Not as the reason, which says that it was the best when it was saved.
    names = {f"best {name}": f"best by {name}" for name in metrics[:_BEST_LANES]} | {"latest": "latest"}
    lanes: dict[str, list[int]] = {name: [] for name in ("latest", *names.values(), "best by others", "held")}
    reasons: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        if row["status"] not in ("there", "deleted"):
            continue
        for role in row["roles"]:
            lanes[names.get(role, "best by others")].append(place)
        if row["holds"]:
            lanes["held"].append(place)
        for kind in kinds(row["reasons"]) or ["no reason given"]:
            reasons.setdefault(kind, []).append(place)
    common = sorted(reasons, key=lambda kind: -len(reasons[kind]))
    few = common if len(common) <= _REASON_LANES else common[: _REASON_LANES - 1]
    made = [{"name": name, "kind": "role", "saves": places} for name, places in lanes.items() if places]
    # In the order in which they came up first, not by their number, which changes as a run goes on.
    made += [{"name": kind, "kind": "reason", "saves": reasons[kind]} for kind in reasons if kind in few]
    rest = sorted({place for kind in common[len(few) :] for place in reasons[kind]})
    return [*made, {"name": "other reasons", "kind": "reason", "saves": rest}] if rest else made


def _metrics(there: Sequence[Checkpoint], best: Mapping[str, tuple[Checkpoint, str]]) -> list[Document]:
    made: list[Document] = []
    for name in dict.fromkeys(name for c in there for name in c.metrics):
        # One that was never a number has no best.
        checkpoint, mode = best.get(name, (None, None))
        value = None if checkpoint is None else metric(checkpoint.metrics[name])
        id, step = (None, None) if checkpoint is None else (checkpoint.id, checkpoint.step)
        made.append({"name": name, "mode": mode, "best": id, "step": step, "value": value})
    return made


def _summary(survey: Survey, best: Mapping[str, tuple[Checkpoint, str]]) -> Document:
    there, buried = survey.catalogue.checkpoints, survey.catalogue.buried
    here = [c for c in there if c.id not in survey.catalogue.elsewhere]
    latest = there[-1] if there else None
    return {
        "checkpoints": len(there),
        "deleted": len(buried),
        "gone": len(survey.gone),
        "latest": latest.id if latest is not None else None,
        "step": latest.step if latest is not None else None,
        "epoch": latest.epoch if latest is not None else None,
        "created": _time(latest.created) if latest is not None else None,
        "parameters": latest.parameters if latest is not None else None,
        "raw_bytes": sum(c.raw_bytes for c in there),
        "stored_bytes": sum(own_bytes(c) for c in here),
        "borrowed_bytes": sum(c.borrowed_bytes for c in here),
        "trash_bytes": sum(own_bytes(c) for c in buried),
        "bytes_there": survey.bytes_there,
        "best": len(best),
    }


def _writers(survey: Survey) -> list[Document]:
    counts: dict[int, int] = {}
    for checkpoint in saved(survey):
        counts[checkpoint.order.writer] = counts.get(checkpoint.order.writer, 0) + 1
    made: list[Document] = []
    for number in sorted(counts.keys() | survey.writers.keys()):
        record, unknown = survey.writers.get(number), dict.fromkeys(("host", "pid", "created"))
        who = unknown if record is None else {"host": record.host, "pid": record.pid, "created": record.created}
        made.append({"number": number, "saves": counts.get(number, 0)} | who)
    return made


def _damaged(survey: Survey) -> list[Document]:
    return [{"key": damage.key, "id": damage.id, "problem": damage.problem} for damage in survey.damaged]


def _unfinished(one: Unfinished) -> Document:
    return {
        "id": str(one.id),
        "step": one.id.step,
        "writer": one.id.writer,
        "files": one.files,
        "stored_bytes": one.stored_bytes,
        "touched": _time(one.touched),
        "condemned": one.condemned,
    }


def _retention(survey: Survey) -> Document | None:
    if survey.keep is None:
        return None
    judgement = survey.judgement
    return {
        "rules": str(survey.keep),
        "problem": survey.unjudged,
        "going": [] if judgement is None else [verdict.id for verdict in judgement.going],
        "going_bytes": 0 if judgement is None else judgement.going_bytes,
        "staying": 0 if judgement is None else len(judgement.verdicts) - len(judgement.going),
        "needs_force": None if judgement is None else judgement.needs_force,
    }


def _time(when: datetime | None) -> str | None:
    if when is None:
        return None
    return when.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
