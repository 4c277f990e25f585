"""Schedules of steps that are named one by one, or that follow at regular intervals."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, TypeAlias

from ckptstore.errors import FormatError
from ckptstore.policy.counts import count_name, parse_count
from ckptstore.policy.progress import Length, Past, Progress, is_number
from ckptstore.policy.schedule import Schedule, crossed, within_limit

_SEGMENT = re.compile(r"\s*(\d{1,15})\s*-\s*(\d{1,15})\s*/\s*(\d{1,15})\s*", re.ASCII)
_LAST = 10**15

Unit: TypeAlias = Literal["steps", "epochs", "minutes", "tokens", "fraction"]


@dataclass(frozen=True)
class At(Schedule):
    """See ``at``."""

    wanted: tuple[int, ...]
    written: tuple[int | str, ...]

    def due(self, now: Progress, past: Past, length: Length) -> list[str]:
        """ "step N", at each of the steps."""
        return [f"step {now.step}"] if crossed(self.wanted, past.step, now.step) else []

    def enumerate(self, length: Length) -> list[int]:
        """The steps."""
        return list(self.wanted)

    def is_counted(self) -> bool:
        """By steps."""
        return True

    def check(self, length: Length) -> None:
        """No step may lie behind the end, where that is known."""
        total = length.total_steps
        if total is not None and self.wanted[-1] > total:
            beyond = [step for step in self.wanted if step > total]
            shown = ", ".join(map(str, beyond[:5])) + (", …" if len(beyond) > 5 else "")
            raise FormatError(f"{self}: step {shown} would never come, the run ends at step {total}: leave it out")

    def __str__(self) -> str:
        return f"at({', '.join(repr(part) if isinstance(part, int) else f'{part!r}' for part in self.written)})"


def at(*steps: int | str) -> At:
    """Save at just these steps. 0 is the state before any update, as fully resumable as any.

    Args:
        steps: numbers, and segments ``"FIRST-LAST/EVERY"``: ``at(0, 10, 30, "2000-10000/1000")`` saves 2000, 3000, …,
            10000, too. Order and repetitions don't matter.

    Raises:
        FormatError: what is no step, and no segment; or none at all.
    """
    wanted: set[int] = set()
    listed = 0
    for part in steps:
        if type(part) is int and 0 <= part <= _LAST:
            wanted.add(part)
        elif isinstance(part, str) and (match := _SEGMENT.fullmatch(part)):
            segment = _segment(part, int(match[1]), int(match[2]), int(match[3]))
            # Before they are listed, and all segments together.
            listed += len(segment)
            within_limit(listed, f"at(… {part!r} …)")
            wanted.update(segment)
        else:
            raise FormatError(_no_step(part))
    if not wanted:
        raise FormatError("at(): give at least one step, as at(0, 10, 30)")
    return At(tuple(sorted(wanted)), tuple(dict.fromkeys(steps)))


def _segment(text: str, first: int, last: int, every: int) -> range:
    if every < 1 or last < first:
        raise FormatError(
            f"at({text!r}): a segment is FIRST-LAST/EVERY with EVERY at least 1 and LAST not before FIRST, as "
            "'2000-10000/1000'"
        )
    return range(first, last + 1, every)


def _no_step(part: object) -> str:
    way_out = "write whole numbers from 0, and segments as '2000-10000/1000'"
    if isinstance(part, str) and part.strip().isdecimal():
        way_out = f"write it without quotes: {part.strip()}"
    elif isinstance(part, float) and part.is_integer() and part >= 0:
        way_out = f"write {int(part)}"
    elif isinstance(part, list | tuple | set | range):
        way_out = "write at(*steps) for a list"
    return f"at({part!r:.60}): that is no step; {way_out}"


@dataclass(frozen=True)
class Every(Schedule):
    """See ``every``."""

    unit: Unit
    amount: int | float

    def due(self, now: Progress, past: Past, length: Length) -> list[str]:
        """Where a multiple of the interval was passed since the decision before."""
        if self.unit == "epochs":
            ended = self._multiple(now.epoch)
            return [f"epoch {ended}"] if ended > self._multiple(past.epoch) else []
        if self.unit == "minutes":
            return [self._reason()] if self._passed(now.elapsed_s) > self._passed(past.elapsed_s) else []
        if self.unit == "tokens":
            return [self._reason()] if self._passed(now.tokens) > self._passed(past.tokens) else []
        each = self._steps(length)
        # A run that begins has passed no multiple, though it comes from step -1.
        return [self._reason()] if now.step // each > max(past.step, 0) // each else []

    def enumerate(self, length: Length) -> list[int]:
        """The steps at which a multiple is passed."""
        if self.unit == "epochs":
            return length.epoch_ends()[int(self.amount) - 1 :: int(self.amount)]
        total = length.require_total(str(self))
        if self.unit in ("steps", "fraction"):
            each = self._steps(length)
            within_limit(total // each, self)
            return list(range(each, total + 1, each))
        per_step = (length.tokens_per_step if self.unit == "tokens" else length.step_s) or 0
        passed = self._passed(total * per_step)
        within_limit(min(passed, total), self)
        if passed >= total:
            steps = range(1, total + 1)
            return [step for step in steps if self._passed(step * per_step) > self._passed((step - 1) * per_step)]
        return sorted({self._first(number, per_step) for number in range(1, passed + 1)})

    def open_ends(self, length: Length) -> list[str]:
        """Time and tokens can't be told in steps, unless it is known what one step takes."""
        if self.unit == "minutes" and length.step_s is None:
            return [f"{self} depends on how long a step takes: give step_s"]
        if self.unit == "tokens" and length.tokens_per_step is None:
            return [f"{self} depends on how many tokens a step has: give tokens_per_step"]
        return []

    def is_counted(self) -> bool:
        """All but time."""
        return self.unit != "minutes"

    def check(self, length: Length) -> None:
        """The interval has to pass at least once."""
        if self.unit == "fraction":
            length.require_total(str(self))
        limit = {
            "steps": length.total_steps,
            "epochs": self._epochs(length),
            "tokens": length.total_steps and length.tokens_per_step and length.total_steps * length.tokens_per_step,
        }.get(self.unit)
        if limit is not None and self.amount > limit:
            raise FormatError(f"{self} would never save: the run has {limit} {self.unit}; write a shorter interval")

    def __str__(self) -> str:
        amount = repr(count_name(int(self.amount))) if self.unit == "tokens" else f"{self.amount!r}"
        return f"every({self.unit}={amount})"

    def _epochs(self, length: Length) -> int | None:
        """Those that end within the run, which may end before its last epoch does."""
        if length.total_steps is None or length.steps_per_epoch is None:
            return length.epochs
        ending = length.total_steps // length.steps_per_epoch
        return ending if length.epochs is None else min(length.epochs, ending)

    def _multiple(self, count: int) -> int:
        return count // int(self.amount) * int(self.amount)

    def _steps(self, length: Length) -> int:
        if self.unit == "steps":
            return int(self.amount)
        # Exactly, as it is written: 0.1 of 1000 steps are 100. Rounded up, as the Hugging Face Trainer does.
        return math.ceil(Fraction(str(self.amount)) * length.require_total(str(self)))

    def _interval(self) -> int | float:
        return self.amount * 60 if self.unit == "minutes" else self.amount

    def _passed(self, done: float) -> int:
        """How many intervals lie behind ``done`` tokens or seconds."""
        return int(done // self._interval())

    def _first(self, number: int, per_step: float) -> int:
        """The step at which that many intervals are passed."""
        near = math.ceil(number * Fraction(self._interval()) / Fraction(per_step))
        # Seconds are floats: what they round to decides, here as in ``due``.
        return next(step for step in (near - 1, near, near + 1) if self._passed(step * per_step) >= number)

    def _reason(self) -> str:
        if self.unit == "tokens":
            return f"every {count_name(int(self.amount))} tokens"
        if self.unit == "fraction":
            return f"every {float(Fraction(str(self.amount)) * 100):g} % of the run"
        return f"every {self.amount:g} {self.unit}" if self.amount != 1 else f"every {self.unit.removesuffix('s')}"


_WRITTEN = re.compile(r"(\d{1,15}(?:\.\d{1,9})?)\s*(ba|ep|dur|tok|sec|s|min|m|h|d)", re.ASCII)
_WRITTEN_UNITS: dict[str, tuple[Unit, float]] = {
    "ba": ("steps", 1),
    "ep": ("epochs", 1),
    "dur": ("fraction", 1),
    "tok": ("tokens", 1),
    "sec": ("minutes", 1 / 60),
    "s": ("minutes", 1 / 60),
    "min": ("minutes", 1),
    "m": ("minutes", 1),
    "h": ("minutes", 60),
    "d": ("minutes", 24 * 60),
}
_LIMITS: dict[Unit, tuple[float, float]] = {"minutes": (1e-6, 1e9), "fraction": (1e-15, 1)}
_EXAMPLES = "every(steps=250), every(epochs=1), every(minutes=30), every(tokens='1B'), every(fraction=0.1)"


def every(
    text: str | None = None,
    /,
    *,
    steps: int | None = None,
    epochs: int | None = None,
    minutes: float | None = None,
    tokens: int | str | None = None,
    fraction: float | None = None,
) -> Every:
    """Save at regular intervals. They are counted from the run's beginning: a save in between doesn't shift the next.

    Args:
        text: the interval as MosaicML Composer writes it: "250ba" (steps), "1ep", "0.1dur", "600s", "1000000tok".
        steps: in optimizer steps.
        epochs: when so many epochs have ended.
        minutes: of training.
        tokens: learnt from; a number, or as "1B".
        fraction: of the whole run, over 0 and at most 1; rounded up to whole steps.

    Raises:
        FormatError: none of them or more than one is given, or it is no interval.
    """
    choices: dict[Unit, object] = {
        "steps": steps, "epochs": epochs, "minutes": minutes, "tokens": tokens, "fraction": fraction,
    }  # fmt: skip
    given = {unit: amount for unit, amount in choices.items() if amount is not None}
    if len(given) + (text is not None) != 1:
        named = ", ".join(f"{unit}={amount!r}" for unit, amount in given.items()) or "nothing"
        raise FormatError(f"every({named}): give just one interval, as {_EXAMPLES}; combine two with |")
    if text is not None:
        return _written(text)
    [(unit, amount)] = given.items()
    if unit == "tokens" and isinstance(amount, str):
        amount = parse_count(amount, "every(tokens=…)")
    return Every(unit, _checked(unit, amount))


def _checked(unit: Unit, amount: object) -> int | float:
    whole = unit in ("steps", "epochs", "tokens")
    least, most = _LIMITS.get(unit, (1, _LAST))
    fits = isinstance(amount, int | float) and is_number(amount) and least <= amount <= most
    if fits and (type(amount) is int or not whole):
        return amount  # type: ignore[return-value]
    shown = "over 0 and at most 1" if unit == "fraction" else f"from {least:g} to {most:g}"
    shown = f"a whole number {shown}" if whole else shown
    raise FormatError(f"every({unit}={amount!r:.60}) must be {shown}; for example {_EXAMPLES}")


def _written(text: object) -> Every:
    match = _WRITTEN.fullmatch(text.strip()) if isinstance(text, str) else None
    if match is None:
        raise FormatError(f"every({text!r}): write '250ba', '1ep', '0.1dur', '600s' or '1000000tok', or {_EXAMPLES}")
    unit, factor = _WRITTEN_UNITS[match[2]]
    if unit in ("steps", "epochs", "tokens") and "." in match[1]:
        raise FormatError(f"every({text!r}): {unit} come whole")
    amount: int | float = int(match[1]) if "." not in match[1] and factor == 1 else float(match[1]) * factor
    return every(**{unit: amount})  # type: ignore[arg-type]
