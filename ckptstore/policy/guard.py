"""Whether training has gone astray: a metric that is no number any more, or far from where it has been."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ckptstore.errors import FormatError
from ckptstore.policy.metrics import Mode, check_metric, mode_of
from ckptstore.policy.progress import is_number

_SHORT, _LONG = 0.1, 0.01
"""What a new value weighs in the short mean and in the long ones."""
_REACH = 1.2
"""Values count for the short mean up to this many times the line, so that it takes about 20 to draw it over."""
_LEARNT = 2.0
"""Values count for the long means up to this many deviations on the bad side."""
_BETTER = 5.0
"""Values count for all means up to this many times the line on the good side: any loss that falls, but no outlier."""
_FLOOR, _FLOOR_EVER = 3e-2, 1e-4
"""The least deviation, relative to the long mean and to the highest that it ever was: a rise by less than 30 % is far
in no run, nor is rounding noise where a loss is as good as zero."""
_HUGE = 1e300
"""As good as infinite, and still safe to reckon with."""
_STATE = ("seen", "short", "long", "deviation", "highest")


@dataclass(frozen=True)
class Divergence:
    """Training has gone astray.

    Attributes:
        step: where it was found.
        metric: by which.
        value: what that was.
        why: what is wrong with it, for people.
        since: the last step at which all was still well: checkpoints up to it are good.
    """

    step: int
    metric: str
    value: float
    why: str
    since: int

    def __str__(self) -> str:
        return f"step {self.step}: {self.metric} {self.why}; all was well until step {self.since}"


@dataclass(frozen=True)
class Diverged:
    """See ``diverged``."""

    metric: str
    far: float
    after: int
    mode: Mode

    def watch(self) -> Watch:
        """What sees the values of one run."""
        return Watch(self)

    def __str__(self) -> str:
        more = "" if self.far == 10 else f", far={self.far:g}"
        more += "" if self.after == 100 else f", after={self.after}"
        more += "" if self.mode == "auto" else f", mode={self.mode!r}"
        return f"diverged({self.metric!r}{more})"


def diverged(metric: str = "loss", *, far: float = 10.0, after: int = 100, mode: Mode = "auto") -> Diverged:
    """Training has gone astray: ``metric`` is nan or infinite, or has been far worse than usual for a while.

    Two running means are compared, a short and a long one, as is common for finding changes in a stream of numbers:
    exponential ones, in which a new value weighs 0.1 and 0.01 (the first ones more: all the same). Far is where the
    short mean lies more than ``far`` deviations on the bad side of the long one. The deviation is the long mean of how
    far values lie from the short mean, and at least 3 % of the long mean and 0.01 % of the highest that it ever was.

    No single value, however bad, is a divergence unless it is nan or infinite: for the short mean values count up to
    1.2 times the line, so that about 20 in a row have to lie over it. For the long ones they count up to 2 deviations
    on the bad side, so that a blow-up doesn't become usual. What gets worse more slowly than these follow isn't found.

    Where a loss with noise up to a twentieth of it has moved little for 500 steps, and then triples or jumps back to
    where it began (twice what it is, or more), this is found within 30 steps; where it grows by 5 % a step within 40,
    by 1 % a step within 80. It takes longer while a loss still falls fast, and isn't found with noise of a fifth.

    Args:
        metric: its name, as it is reported.
        far: how many deviations are far; give more where the metric may get much worse for some dozen steps and
            recover, as when the learning rate is restarted.
        after: values that are seen before any is called far; nan and infinity are found from the first on.
        mode: whether "min" or "max" is best; "auto" goes by the name: smaller is better with loss, error or perplexity
            in it.

    Raises:
        FormatError: no name, no mode, or a number that can't be.
    """
    check_metric("diverged", metric, mode)
    if not (is_number(far) and far > 0):
        raise FormatError(f"diverged(far={far!r}) must be a number of deviations over 0, as 10")
    if type(after) is not int or after < 1:
        raise FormatError(f"diverged(after={after!r}) must be a whole number of values, of at least 1")
    return Diverged(metric, float(far), after, mode)


class Watch:
    """Sees the values of one run, one after the other."""

    def __init__(self, rule: Diverged) -> None:
        self.rule = rule
        # Where large values are good all is reckoned with the opposite sign, so that worse is always more.
        self._sign = 1 if mode_of(rule.metric, rule.mode) == "min" else -1
        self._seen, self._short, self._long, self._deviation, self._highest = 0, 0.0, 0.0, 0.0, 0.0
        self._since: int | None = None

    def see(self, step: int, value: float) -> Divergence | None:
        """What is wrong, if anything.

        Args:
            step: of the state that was measured, in completed optimizer steps. The loss of a training step is taken
                before its update: it speaks for the state of the step before.
            value: of the metric.
        """
        value = float(value)
        worse = self._sign * value
        # Also false for nan.
        if not abs(worse) <= _HUGE:
            return self._found(step, value, f"is {value:g}")
        unit = max(self._deviation, _FLOOR * abs(self._long), _FLOOR_EVER * self._highest)
        line = self.rule.far * unit
        # Without a unit, as after nothing but zeros, nothing can be called far.
        learning = self._seen < self.rule.after or unit == 0
        near = unit == 0 or worse - self._long <= line / 2
        self._learn(worse, math.inf if learning else line, math.inf if learning else unit)
        apart = self._short - self._long
        if not learning and apart > line:
            lately, usual = self._sign * self._short, self._sign * self._long
            return self._found(step, value, f"is {value:.4g}, lately {lately:.4g} on average, far from {usual:.4g}")
        if near and (unit == 0 or apart <= unit):
            self._since = step
        return None

    def state_dict(self) -> dict[str, float]:
        """All that it has learnt, as plain numbers."""
        known = {} if self._since is None else {"since": self._since}
        return {name: getattr(self, f"_{name}") for name in _STATE} | known

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on where the watch was whose ``state_dict`` this is; it may have gone by another rule.

        Raises:
            FormatError: it is something else; nothing has changed then.
        """
        wrong = [name for name in _STATE if not is_number(state.get(name))]
        wrong += [name for name in ("seen", "since") if type(state.get(name, 0)) is not int]
        if not wrong and state["seen"] < 0:
            wrong = ["seen"]
        if wrong:
            raise FormatError(f"this is no state of {self.rule}: {wrong[0]} is no number that can be")
        for name in _STATE:
            setattr(self, f"_{name}", state[name])
        since = state.get("since")
        self._since = None if since is None else int(since)

    def _learn(self, worse: float, line: float, unit: float) -> None:
        self._seen += 1
        first = 1 / self._seen
        worse = max(worse, self._long - _BETTER * line)
        self._short += max(_SHORT, first) * (min(worse, self._long + _REACH * line) - self._short)
        # From the short mean, or a loss that falls would seem to deviate.
        away = min(abs(worse - self._short), _LEARNT * unit)
        self._deviation += max(_LONG, first) * (away - self._deviation)
        self._long += max(_LONG, first) * (min(worse, self._long + _LEARNT * unit) - self._long)
        self._highest = max(self._highest, abs(self._long))

    def _found(self, step: int, value: float, why: str) -> Divergence:
        return Divergence(step, self.rule.metric, value, why, step - 1 if self._since is None else self._since)
