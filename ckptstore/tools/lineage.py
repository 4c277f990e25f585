"""The history of a store: which checkpoint each one continued, where a run went back, how fast it was. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from ckptstore.format.layout import CheckpointId

ROLLBACK = "rollback to "
"""How the reason of a checkpoint begins that repeats an older one."""


@dataclass(frozen=True)
class Save:
    """One save, as far as it is still known.

    Attributes:
        order: its id.
        there: whether it exists; else it was deleted.
        created: when it was saved; None where only its id is left.
        reasons: why.
    """

    order: CheckpointId
    there: bool
    created: datetime | None = None
    reasons: Sequence[str] = ()


@dataclass(frozen=True)
class Origin:
    """Where a save comes from.

    Attributes:
        parent: the place, in the order of all saves, of the one it continued; None for a beginning.
        branch: the number of its branch, from 0 on: a new one begins wherever a run went back.
        abandoned: whether the newest checkpoint doesn't continue it.
    """

    parent: int | None
    branch: int
    abandoned: bool


def origins(saves: Sequence[Save]) -> list[Origin]:
    """Where each of ``saves``, oldest first, comes from.

    Which one a run continued isn't recorded. It is the save before, as long as steps don't fall; where they do, the
    nearest one before on the same branch that has fewer steps. A roll-back by hand names it.
    """
    places: dict[str, int] = {}
    parents: list[int | None] = []
    branches: list[int] = []
    begun = -1
    for place, save in enumerate(saves):
        parent = _parent(saves, parents, places, save)
        follows = place > 0 and parent == place - 1
        parents.append(parent)
        begun += not follows
        branches.append(branches[-1] if follows else begun)
        places[str(save.order)] = place
    lasting: set[int] = set()
    at = next((place for place in reversed(range(len(saves))) if saves[place].there), None)
    while at is not None:
        lasting.add(at)
        at = parents[at]
    return [Origin(parents[at], branches[at], at not in lasting) for at in range(len(saves))]


def _parent(saves: Sequence[Save], parents: Sequence[int | None], places: dict[str, int], save: Save) -> int | None:
    for reason in save.reasons:
        if reason.startswith(ROLLBACK) and (known := places.get(reason.removeprefix(ROLLBACK))) is not None:
            return known
    at: int | None = len(parents) - 1 if parents else None
    if at is None or saves[at].order.step <= save.order.step:
        return at
    while at is not None and saves[at].order.step >= save.order.step:
        at = parents[at]
    return at


def speeds(saves: Sequence[Save], origins: Sequence[Origin]) -> list[float | None]:
    """Steps per second between each save and the one that the same writer made before; None where that isn't known."""
    found: list[float | None] = []
    for place, (save, origin) in enumerate(zip(saves, origins, strict=True)):
        before = saves[place - 1] if place and origin.parent == place - 1 else None
        found.append(_speed(before, save) if before is not None else None)
    return found


def _speed(before: Save, save: Save) -> float | None:
    steps = save.order.step - before.order.step
    if before.created is None or save.created is None or before.order.writer != save.order.writer or not steps:
        return None
    # By one writer's clock, which may have been set back.
    seconds = (save.created - before.created).total_seconds()
    return steps / seconds if seconds > 0 else None
