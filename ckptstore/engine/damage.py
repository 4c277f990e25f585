"""How damage is told: warnings where the work goes on, one error where nothing is left."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping

from ckptstore.engine.catalogue import Checkpoint, Damage
from ckptstore.errors import IntegrityError
from ckptstore.format import layout


class DamageWarning(UserWarning):
    """Something on storage is damaged; the message names it."""


class FallbackWarning(DamageWarning):
    """``latest`` was damaged, and an older checkpoint was loaded in its place."""


def warn_damaged(damaged: Iterable[Damage], latest: Checkpoint | None = None) -> None:
    """A warning each; of another class where one might have been ``latest`` in the place of the one that is."""
    for damage in damaged:
        category = FallbackWarning if latest and is_newer(damage, latest) else DamageWarning
        warnings.warn(f"{damage.problem}; its checkpoint is left out", category, stacklevel=4)


def is_newer(damage: Damage, checkpoint: Checkpoint) -> bool:
    """Whether what is damaged would stand after ``checkpoint``."""
    id = layout.try_id(damage.id or "")
    return id is not None and id > checkpoint.order


def as_error(damage: Damage) -> IntegrityError:
    """The error to raise where just this one was asked for."""
    return IntegrityError(damage.problem, id=damage.id, key=damage.key)


def all_damaged(url: str, problems: Mapping[str, str]) -> IntegrityError:
    """The error where nothing good is left: never to be taken for an empty store."""
    listed = "; ".join(problems.values())
    return IntegrityError(f"{url}: every checkpoint is damaged ({len(problems)} in all): {listed[:2000]}")
