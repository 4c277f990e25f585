"""Values that a run reports: of single steps, read only when they are saved, and of evaluations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckptstore.engine.facts import Facts
from ckptstore.policy.events import OnBest
from ckptstore.policy.metrics import default_mode
from ckptstore.policy.schedule import Schedule, parts_of


class Reports:
    """What was reported last.

    Attributes:
        best: of each metric of an evaluation, the best value so far.
    """

    def __init__(self, schedule: Schedule | None) -> None:
        self.best: dict[str, float] = {}
        # Whoever saves the best by what single steps give wants each of them looked at.
        watched = parts_of(schedule) if schedule is not None else ()
        self._watched = {part.metric for part in watched if isinstance(part, OnBest)}
        self._latest: dict[str, Any] = {}

    def latest(self, values: dict[str, Any]) -> dict[str, float]:
        """Note the values of a step, as they are; those that the schedule goes by, as numbers."""
        self._latest = {name: value.detach() if hasattr(value, "detach") else value for name, value in values.items()}
        if self._watched.isdisjoint(values):
            return {}
        return Facts.of(0, metrics={name: values[name] for name in self._watched & values.keys()}).metrics

    def watches(self, values: Mapping[str, Any]) -> bool:
        """Whether the schedule goes by one of them."""
        return not self._watched.isdisjoint(values)

    def values(self) -> dict[str, float]:
        """Those of the last step, as numbers. Reading a tensor waits until it is computed.

        Raises:
            StateError: one is no number.
        """
        return Facts.of(0, metrics=self._latest).metrics

    def add(self, values: Mapping[str, Any], modes: Mapping[str, str]) -> dict[str, float]:
        """Values of an evaluation, as numbers.

        Raises:
            StateError: one is no number.
        """
        given = Facts.of(0, metrics=values).metrics
        for name, value in given.items():
            sign = -1 if (modes.get(name) or default_mode(name)) == "min" else 1
            # Nothing is better than nan, and nan than nothing.
            if name not in self.best or sign * value > sign * self.best[name]:
                self.best[name] = value
        return given
