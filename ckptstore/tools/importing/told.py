"""What a checkpoint's own content tells of it, and which files are of one save.

``Found.facts_in`` names the places of plain facts; what needs more than a place is here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from ckptstore.tools.importing.folder import by_numbers
from ckptstore.tools.importing.found import Found
from ckptstore.tools.importing.noted import count_of, metrics_of, time_of

METRIC = "metric:"
_MARKS = 256
"""So many tensors are compared where two files may be of one save."""
_STEP_NAMES = ("step", "global_step", "iteration", "iter_num", "iter", "steps")
_METRIC_NAMES = ("loss", "train_loss", "val_loss", "best_val_loss", "accuracy", "val_accuracy")


@dataclass(frozen=True)
class Told:
    """What the content tells; None where it doesn't.

    Attributes:
        save: what the files of one save have in common, where there may be several.
        position: orders those of one step.
        spare: gives way to another of the same save.
    """

    step: int | None = None
    epoch: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    created: datetime | None = None
    save: Hashable | None = None
    position: tuple[int, ...] = ()
    spare: int = 0


def told(found: Found, state: Mapping[Any, Any]) -> Told:
    """What the loaded state tells of the checkpoint; its leaves are values or tensors of one element."""
    return _BY_KIND.get(found.kind, _plainly)(found, state)


def settled(read: Sequence[tuple[Found, Told]]) -> list[Found]:
    """Each save once, oldest first, with what its content tells; what else holds the same is named as left out."""
    groups: dict[Hashable, list[tuple[Found, Told]]] = {}
    for number, (found, says) in enumerate(read):
        key = number if says.save is None else (found.path.parent, says.save)
        groups.setdefault(key, []).append((found, says))
    return [found for found, _ in sorted(map(_one, groups.values()), key=_order)]


def value_at(state: Any, path: str) -> Any:
    """What lies at ``trainer/global_step``; None where there is nothing."""
    for key in path.split("/"):
        if isinstance(state, Mapping):
            state = state.get(key, state.get(int(key)) if key.isdecimal() and len(key) < 16 else None)
        elif isinstance(state, list | tuple) and key.isdecimal() and len(key) < 16 and int(key) < len(state):
            state = state[int(key)]
        else:
            return None
    return state


def number_of(value: Any) -> int | float | None:
    """A number, or the one in a tensor of one element."""
    if type(value) in (int, float):
        return value  # type: ignore[no-any-return]
    try:
        one = value.item() if value.numel() == 1 else None
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return None
    return one if type(one) in (int, float) else None


def _count(value: Any) -> int | None:
    number = number_of(value)
    return count_of(int(number) if isinstance(number, float) and number.is_integer() else number)


def _one(group: list[tuple[Found, Told]]) -> tuple[Found, Told]:
    """One of the files of one save, which says what all of them say."""
    group = sorted(group, key=lambda pair: (pair[1].spare, by_numbers(pair[0].path.name)))
    (found, says), *others = group
    same = {other.path.name: f"holds the same as {found.path.name}" for other, _ in others}
    reasons = dict.fromkeys(reason for each, _ in group for reason in each.reasons)
    metrics: dict[str, float] = {}
    epochs = [epoch for pair in group for epoch in (pair[0].epoch, pair[1].epoch) if epoch is not None]
    left_out: dict[str, str] = {}
    for each, its in reversed(group):
        left_out |= each.left_out
        metrics |= {**each.metrics, **its.metrics}
    return replace(
        found,
        step=found.step if says.step is None else says.step,
        epoch=max(epochs, default=None),
        metrics=metrics,
        created=found.created or says.created,
        facts_in={},
        left_out=left_out | same,
        reasons=tuple(reasons),
    ), says


def _order(pair: tuple[Found, Told]) -> tuple[Any, ...]:
    found, says = pair
    time = found.created.timestamp() if found.created else 0.0
    return found.step is None, found.step or 0, says.position, time, by_numbers(found.path.name)


def _plainly(found: Found, state: Mapping[Any, Any]) -> Told:
    """What lies at the places that ``facts_in`` names."""
    places = found.facts_in
    metrics = {
        name.removeprefix(METRIC): number_of(value_at(state, place))
        for name, place in places.items()
        if name.startswith(METRIC)
    }
    created = value_at(state, places["created"]) if "created" in places else None
    return Told(
        step=_count(value_at(state, places["step"])) if "step" in places else None,
        epoch=_count(value_at(state, places["epoch"])) if "epoch" in places else None,
        metrics=metrics_of(metrics),
        created=time_of(created),
    )


def _accelerate(found: Found, state: Mapping[Any, Any]) -> Told:
    """Steps are what Adam and its like count for each parameter; one that takes part since later counts fewer."""
    says = _plainly(found, state)
    if found.step is not None:
        return says
    for name in sorted(name for name in state if isinstance(name, str) and name.startswith("optimizer")):
        per_parameter = value_at(state, f"{name}/state")
        states = per_parameter.values() if isinstance(per_parameter, Mapping) else ()
        counts = [_count(one.get("step")) for one in states if isinstance(one, Mapping)]
        if known := [count for count in counts if count is not None]:
            return replace(says, step=max(known))
    return replace(says, step=None)


def _tiers(found: Found, state: Mapping[Any, Any]) -> Told:
    """A save that a signal asked for carries the number of the step that it comes before, and no loss of its own."""
    says, recorded = _plainly(found, state), _count(value_at(state, "step"))
    if recorded is None:
        return replace(says, step=None)
    interrupted = number_of(value_at(state, "train_loss")) == 0.0 or found.path.name.startswith("emergency_")
    return replace(
        says,
        step=max(recorded - 1, 0) if interrupted else recorded,
        metrics={} if interrupted else says.metrics,
        save=(recorded, number_of(value_at(state, "timestamp")), _marks(state, "model", "optimizer")),
        # What is named for its step stays longest in mind; latest.pt and best_model.pt are roles.
        spare=0 if found.step is not None else 1,
    )


def _lightning(found: Found, state: Mapping[Any, Any]) -> Told:
    """The epoch that runs counts as complete once its end was reached; a score belongs to the file it was saved for."""
    says = _plainly(found, state)
    if says.epoch is None:
        # Versions before 1.6 record no loops: the number of the running epoch.
        says = replace(says, epoch=_count(value_at(state, "epoch")))
    fit = value_at(state, "loops/fit_loop") or value_at(state, "meta/loops/fit_loop")
    batches = _count(value_at(fit, "epoch_loop.batch_progress/total/completed")) or 0
    position = (says.epoch or 0, batches)
    last = found.path.name.startswith("last")
    callbacks = value_at(state, "callbacks") or value_at(state, "meta/callbacks")
    return replace(
        says,
        metrics=metrics_of(_scores(callbacks, found.path.name, says.step)),
        # Another run into the same folder saves other weights at the same step.
        save=(says.step, *position, _marks(state, "state_dict", "optimizer_states")),
        position=position,
        spare=int(last),
    )


def _marks(state: Mapping[Any, Any], *names: str) -> tuple[str, ...]:
    """Three elements of each tensor: two states of a training differ in some of them."""
    marks: list[str] = []
    left = [state[name] for name in reversed(names) if name in state]
    while left and len(marks) < _MARKS:
        value = left.pop()
        if isinstance(value, Mapping):
            left.extend(value.values())
        elif isinstance(value, list | tuple):
            left.extend(value)
        elif getattr(value, "ndim", None) is not None:
            marks.append(_mark(value))
    return tuple(marks)


def _mark(tensor: Any) -> str:
    try:
        places = ((0,) * tensor.ndim, tuple(size // 2 for size in tensor.shape), (-1,) * tensor.ndim)
        return f"{tuple(tensor.shape)} {[tensor[place].item() for place in places]}"
    except (AttributeError, TypeError, ValueError, IndexError, RuntimeError):
        # An empty one has no elements, and what stands for a tensor may have none.
        return ""


def _scores(callbacks: Any, name: str, step: int | None) -> dict[str, Any]:
    """Metric → what it was at this save: the score of the file itself, or of one that was named for the same step.

    The newest score, which is there, too, may be that of an earlier save.
    """
    same = re.compile(rf"(?:.*-)?step={step}(?:[-.].*)?", re.DOTALL)
    found: dict[str, Any] = {}
    for callback in callbacks.values() if isinstance(callbacks, Mapping) else ():
        monitor = callback.get("monitor") if isinstance(callback, Mapping) else None
        if not isinstance(monitor, str):
            continue
        scores = callback.get("best_k_models")
        for path, score in scores.items() if isinstance(scores, Mapping) else ():
            saved = path.rsplit("/", 1)[-1] if isinstance(path, str) else ""
            if saved == name or same.fullmatch(saved):
                found[monitor] = number_of(score)
    return found


def _torch(found: Found, state: Mapping[Any, Any]) -> Told:
    """A file of one's own: under the names that most give to them."""
    says = _plainly(found, state)
    steps = (_count(state.get(name)) for name in _STEP_NAMES)
    numbers = {name: number_of(state.get(name)) for name in _METRIC_NAMES}
    given = state.get("metrics")
    given = {name: number_of(value) for name, value in given.items()} if isinstance(given, Mapping) else {}
    return replace(
        says,
        step=says.step if says.step is not None else next((step for step in steps if step is not None), None),
        epoch=says.epoch if says.epoch is not None else _count(state.get("epoch")),
        metrics=metrics_of({**numbers, **given, **says.metrics}),
    )


_BY_KIND: Mapping[str, Callable[[Found, Mapping[Any, Any]], Told]] = {
    "accelerate": _accelerate,
    "tiers": _tiers,
    "lightning": _lightning,
    "torch": _torch,
}
