"""A plan of many saves in the first epoch, and of fewer in each that follows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Literal, TypeAlias

from ckptstore.errors import FormatError
from ckptstore.policy.progress import Length, Past, Progress, check_count, is_number
from ckptstore.policy.schedule import Schedule, crossed, within_limit

Spacing: TypeAlias = Literal["log", "linear", "log_offset"]
_SPACINGS = ("log", "linear", "log_offset")
_AUTO = 10
"""Into how many pieces "linear" cuts an epoch where no interval is given."""


@dataclass(frozen=True)
class EpochPlan(Schedule):
    """See ``epoch_plan``."""

    first: int
    then: Spacing
    base: int | float
    interval: int | None
    min_interval: int | None

    def due(self, now: Progress, past: Past, length: Length) -> list[str]:
        """ "epoch plan", at each of its steps."""
        return [f"epoch plan, step {now.step}"] if crossed(_planned(self, length), past.step, now.step) else []

    def enumerate(self, length: Length) -> list[int]:
        """The steps."""
        return list(_planned(self, length))

    def is_counted(self) -> bool:
        """By steps."""
        return True

    def check(self, length: Length) -> None:
        """It has to be known where epochs end."""
        _planned(self, length)

    def __str__(self) -> str:
        given = {"base": self.base, "interval": self.interval, "min_interval": self.min_interval}
        defaults = {"base": 2, "interval": None, "min_interval": None}
        more = [f"{name}={value!r}" for name, value in given.items() if value != defaults[name]]
        return f"epoch_plan({', '.join([f'first={self.first}', f'then={self.then!r}', *more])})"


def epoch_plan(
    first: int = 20,
    then: Spacing = "log",
    *,
    base: float = 2,
    interval: int | None = None,
    min_interval: int | None = None,
) -> EpochPlan:
    """Save often while the model learns fastest, in the first epoch, and ever more rarely in each later one.

    The end of each epoch, and of the run, is always saved. In the first epoch ``first`` saves are spread evenly, step 0
    and its end among them: floor(i * steps / (first - 1)) for i = 0, 1, …. In each later one, which begins at step s:

    * "log": s, then gaps of base, base², base³, …;
    * "linear": s, s + interval, s + 2 * interval, …;
    * "log_offset": s + base, s + base², s + base³, ….

    Args:
        first: saves in the first epoch; 1 is its end alone, 0 too.
        then: spacing in the later epochs.
        base: over 1.
        interval: for "linear"; by default a tenth of an epoch's steps.
        min_interval: leave out what comes sooner than so many steps after the one before, or before an epoch's end.
            Step 0 and the ends of epochs stay.

    Raises:
        FormatError: a number that can't be, or an unknown spacing.
    """
    if type(first) is not int or first < 0:
        raise FormatError(f"epoch_plan(first={first!r}) must be a whole number, 0 or more")
    if then not in _SPACINGS:
        raise FormatError(f"epoch_plan(then={then!r}) must be one of {', '.join(map(repr, _SPACINGS))}")
    if not is_number(base) or base <= 1:
        raise FormatError(f"epoch_plan(base={base!r}) must be over 1, or the saves never get rarer; 2 is usual")
    check_count(interval, "epoch_plan(interval=…)")
    check_count(min_interval, "epoch_plan(min_interval=…)")
    if interval is not None and then != "linear":
        raise FormatError(f"epoch_plan(interval={interval}) is for then='linear', and then={then!r}: leave out one")
    return EpochPlan(first, then, base, interval, min_interval)


@lru_cache(maxsize=8)
def _planned(plan: EpochPlan, length: Length) -> tuple[int, ...]:
    total = length.require_total(str(plan))
    ends = length.epoch_ends()
    if not ends or ends[-1] < total:
        # The run ends before this epoch does.
        ends.append(total)
    within_limit(_at_most(plan, ends), plan)
    steps = set(first_epoch(ends[0], plan.first))
    for start, end in pairwise(ends):
        steps.update(_later_epoch(plan, start + 1, end))
    return tuple(_thinned(sorted(steps.union(ends)), {0, *ends}, plan.min_interval or 1))


def _at_most(plan: EpochPlan, ends: list[int]) -> int:
    """More than the plan has steps, without listing them."""
    longest = max(end - start for start, end in pairwise([0, *ends]))
    if plan.then == "linear":
        each = longest // (plan.interval or max(1, longest // _AUTO))
    else:
        # The gap before the end of an epoch is a power of the base, and no longer than the epoch.
        each = math.ceil(math.log(longest) / math.log(plan.base))
        # Gaps are over 1; offsets grow by less where the base is close to 1, and many of them are one step.
        each = min(each, longest) if plan.then == "log" else each
    return min(plan.first, ends[0] + 1) + len(ends) * (each + 2)


def first_epoch(steps: int, count: int) -> list[int]:
    """``count`` steps from 0 to ``steps``, evenly spread and rounded down; its end alone for 1, none for less."""
    if count <= 1:
        return [steps] if count == 1 else []
    if count > steps:
        return list(range(steps + 1))
    return [number * steps // (count - 1) for number in range(count)]


def _later_epoch(plan: EpochPlan, start: int, end: int) -> Iterator[int]:
    """The steps before ``end`` of an epoch whose first step is ``start``."""
    if plan.then == "linear":
        # The auto interval is a tenth of the epoch's steps, of which ``start`` is the first.
        yield from range(start, end, plan.interval or max(1, (end - start + 1) // _AUTO))
        return
    step = float(start) if isinstance(plan.base, float) else start
    gap, offset = plan.base, plan.then == "log_offset"
    if offset:
        step += gap
    while step < end:
        yield int(step)
        step = start + gap * plan.base if offset else step + gap
        gap *= plan.base


def _thinned(steps: list[int], forced: set[int], least: int) -> Iterator[int]:
    """``steps`` without those nearer than ``least`` to the one before or to a ``forced`` one."""
    ends = iter(sorted(forced))
    coming, last = next(ends), -least
    for step in steps:
        while coming < step:
            coming = next(ends, step)
        if step in forced or (step - last >= least and coming - step >= least):
            yield step
            last = step
