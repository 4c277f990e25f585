"""Selectors: how a person names a checkpoint, the same everywhere. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import NoReturn

from ckptstore.engine.catalogue import Checkpoint
from ckptstore.errors import FormatError, NoCheckpointError, NotFoundError
from ckptstore.near import meant, near
from ckptstore.policy.counts import count_name, parse_count
from ckptstore.policy.metrics import default_mode
from ckptstore.policy.progress import MILESTONE

SELECTORS = "latest, best:METRIC[:min|max], step:N, epoch:N, milestone:NAME, a hold's name, or the beginning of an id"

_NEWEST, _NEAREST, _LISTED = 5, 3, 20
"""How many of what there is an error shows."""


def select(checkpoints: Sequence[Checkpoint], holds: Mapping[str, str], selector: str, where: str) -> Checkpoint:
    """The one checkpoint that ``selector`` names; ``checkpoints`` stand oldest first.

    Raises:
        NoCheckpointError: there is none at all.
        NotFoundError: none matches; the message lists what there is.
        FormatError: the selector is ambiguous or no selector.
    """
    kind, colon, rest = selector.partition(":")
    if not selector or (colon and kind not in _BY_KIND):
        raise no_selector(selector)
    if not checkpoints:
        raise NoCheckpointError(f"{where} holds no checkpoint")
    if selector == "latest":
        return checkpoints[-1]
    if colon:
        found = _BY_KIND[kind](checkpoints, rest)
        return (
            found if found is not None else _nothing(checkpoints, selector, where, _near_number(checkpoints, selector))
        )
    wanted = holds.get(selector, selector)
    matches = [c for c in checkpoints if c.id.startswith(wanted)]
    if len(matches) > 1:
        ids = ", ".join(c.id for c in matches[-3:])
        raise FormatError(f"{selector!r} begins the ids of {len(matches)} checkpoints; write more of one: {ids}")
    return matches[0] if matches else _nothing(checkpoints, selector, where, _near_name(checkpoints, holds, selector))


def no_selector(text: object) -> FormatError:
    """The error for what can't name a checkpoint, with what may have been meant."""
    kind, colon, rest = text.partition(":") if isinstance(text, str) else ("", "", "")
    likely = [f"'{known}:{rest:.100}'" for known in near(kind, _BY_KIND)] if colon else []
    hint = f"did you mean {' or '.join(likely)}? Use" if likely else "use"
    return FormatError(f"{text!r:.200} is no selector; {hint} {SELECTORS}")


def _nothing(checkpoints: Sequence[Checkpoint], selector: str, where: str, hint: str) -> NoReturn:
    shown = ", ".join(str(c.step) for c in checkpoints[-_NEWEST:])
    which = "the newest are" if len(checkpoints) > _NEWEST else "there is"
    there = hint or f"; {which} step {shown}."
    raise NotFoundError(f"{where} has no checkpoint {selector!r:.200}{there} Selectors: {SELECTORS}")


def _near_number(checkpoints: Sequence[Checkpoint], selector: str) -> str:
    """What lies nearest to a step or an epoch that isn't there, or which milestones there are."""
    kind, _, rest = selector.partition(":")
    if kind == "milestone":
        saved = {reason.removeprefix(MILESTONE) for c in checkpoints for reason in c.reasons if MILESTONE in reason}
        return f"; milestones here: {listed(sorted(saved))}."
    counts = [c.step if kind == "step" else c.epoch for c in checkpoints]
    known = {count for count in counts if count is not None}
    if not known:
        return "; no checkpoint here says its epoch."
    nearest = sorted(sorted(known, key=lambda count: abs(count - int(rest)))[:_NEAREST])
    which = "the nearest are" if len(known) > len(nearest) else "there is"
    return f"; {which} {kind} {', '.join(map(str, nearest))}."


def _near_name(checkpoints: Sequence[Checkpoint], holds: Mapping[str, str], name: str) -> str:
    """What was meant by a name that is neither a hold's nor the beginning of an id."""
    if any(str(c.step) == name for c in checkpoints):
        return f"; did you mean 'step:{name}'?"
    if any(name in c.metrics for c in checkpoints):
        return f"; did you mean 'best:{name}'?"
    # Each is compared with as much of an id as was written; of those that begin alike the newest.
    ids = {c.id[: len(name)]: c.id for c in checkpoints}
    found = [ids.get(one, one) for one in near(name, [*holds, "latest", *reversed(ids)])]
    if found:
        return f"; did you mean {' or '.join(map(repr, found))}?"
    return f"; holds here: {listed(sorted(holds))}." if holds else ""


def listed(names: Sequence[str]) -> str:
    """``names`` in a row, as many as a person reads."""
    return ", ".join(names[:_LISTED]) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "") or "none"


def _best(checkpoints: Sequence[Checkpoint], rest: str) -> Checkpoint | None:
    name, _, mode = rest.partition(":")
    if mode not in ("", "min", "max") or not name:
        raise FormatError(f"'best:{rest}' is no selector; write best:METRIC, best:METRIC:min or best:METRIC:max")
    found = best_of(checkpoints, name, mode)
    if found is None:
        known = sorted({metric for c in checkpoints for metric in c.metrics})
        raise NotFoundError(
            f"no checkpoint has metric {name!r:.200}; metrics here: {listed(known)}{meant(name, known)}"
        )
    return found[0]


def best_of(checkpoints: Sequence[Checkpoint], name: str, mode: str = "") -> tuple[Checkpoint, str] | None:
    """The best of ``checkpoints`` by the metric ``name``, and whether "min" or "max" was best; None where none has it.

    Without ``mode`` as the newest that has the metric says, or as its name does.
    """
    rated = [c for c in checkpoints if not math.isnan(c.metrics.get(name, math.nan))]
    if not rated:
        return None
    mode = mode or rated[-1].modes.get(name) or default_mode(name)
    sign = 1 if mode == "max" else -1
    # Of equally good ones the newest.
    return max(rated, key=lambda c: (sign * c.metrics[name], c.order)), mode


def _number(kind: str, rest: str) -> int:
    if not rest.isascii() or not rest.isdigit() or len(rest) > 15:
        raise FormatError(f"'{kind}:{rest}' is no selector; write a number, as {kind}:1000")
    return int(rest)


def _step(checkpoints: Sequence[Checkpoint], rest: str) -> Checkpoint | None:
    step = _number("step", rest)
    return next((c for c in reversed(checkpoints) if c.step == step), None)


def _epoch(checkpoints: Sequence[Checkpoint], rest: str) -> Checkpoint | None:
    epoch = _number("epoch", rest)
    return next((c for c in reversed(checkpoints) if c.epoch == epoch), None)


def _milestone(checkpoints: Sequence[Checkpoint], rest: str) -> Checkpoint | None:
    wanted = {f"{MILESTONE}{rest}"}
    with suppress(FormatError):
        # 1.0B and 1000M are 1B, of whatever was counted.
        name = f"{MILESTONE}{count_name(parse_count(rest))}"
        wanted |= {name, f"{name} tokens", f"{name} steps"}
    return next((c for c in reversed(checkpoints) if not wanted.isdisjoint(c.reasons)), None)


_BY_KIND: dict[str, Callable[[Sequence[Checkpoint], str], Checkpoint | None]] = {
    "best": _best,
    "step": _step,
    "epoch": _epoch,
    "milestone": _milestone,
}
