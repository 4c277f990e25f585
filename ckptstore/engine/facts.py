"""What a person says of a checkpoint, checked before anything else happens."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ckptstore.errors import StateError
from ckptstore.policy.metrics import default_mode


@dataclass(frozen=True, slots=True)
class Facts:
    """What a person says of a checkpoint; it stands in the commit record."""

    step: int
    epoch: int | None
    metrics: dict[str, float]
    modes: dict[str, str]
    reasons: Sequence[str]

    @classmethod
    def of(
        cls,
        step: int,
        epoch: int | None = None,
        metrics: Mapping[str, Any] | None = None,
        modes: Mapping[str, str] | None = None,
        reasons: Iterable[str] = (),
    ) -> Facts:
        """What the user said, checked.

        Raises:
            StateError: naming what is no step, no number, no mode.
        """
        values, modes = {name: _number(name, value) for name, value in (metrics or {}).items()}, modes or {}
        for name, mode in modes.items():
            if mode not in ("min", "max") or name not in values:
                raise StateError(f"modes: {name!r}: {mode!r} must be 'min' or 'max', for a metric given", path="modes")
        texts = [] if isinstance(reasons, str) else list(reasons)
        if isinstance(reasons, str) or not all(isinstance(text, str) for text in texts):
            raise StateError("reasons must be a list of texts", path="reasons")
        return cls(
            _whole(step, "step"),
            None if epoch is None else _whole(epoch, "epoch"),
            values,
            {name: modes.get(name) or default_mode(name) for name in values},
            texts,
        )


def _whole(value: int, name: str) -> int:
    try:
        number = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = -1
    if not 0 <= number < 10**15:
        raise StateError(f"{name}={value!r} must be an int from 0 to 10**15 - 1", path=name)
    return number


def _number(name: object, value: Any) -> float:
    if not isinstance(name, str):
        raise StateError(f"metrics: the name {name!r:.100} is no text", path="metrics")
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise StateError(f"metric {name!r} is {value!r:.100}, no number", path=f"metrics/{name}") from error
