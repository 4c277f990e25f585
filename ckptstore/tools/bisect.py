"""The first checkpoint that fails a test, by binary search over those between a good and a bad one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from ckptstore.engine.catalogue import Checkpoint
from ckptstore.errors import FormatError, IntegrityError
from ckptstore.view import View

Verdict: TypeAlias = Literal["good", "bad", "skipped", "damaged"]


@dataclass(frozen=True)
class Trial:
    """One checkpoint that was tested.

    Attributes:
        verdict: "skipped" where the test could not tell, "damaged" where it can't be read.
        why: what is damaged, else "".
    """

    checkpoint: Checkpoint
    verdict: Verdict
    why: str = ""


@dataclass(frozen=True)
class Bisection:
    """Where good turns into bad.

    Attributes:
        last_good, first_bad: the two, next to each other but for ``undecided``.
        undecided: what lies between them, and could not be tested: the first bad one may be among these.
        trials: all that were tested, in order, the two ends first unless they were trusted.
    """

    last_good: Checkpoint
    first_bad: Checkpoint
    undecided: Sequence[Checkpoint]
    trials: Sequence[Trial]


Test: TypeAlias = Callable[[Checkpoint], bool | None]
"""True where a checkpoint is good, False where it is bad, None where it has to be skipped."""


def bisect(
    store: View,
    good: str,
    bad: str,
    test: Test,
    *,
    trust_ends: bool = False,
    told: Callable[[Trial, int], None] | None = None,
) -> Bisection:
    """Find the first checkpoint after ``good`` that fails ``test``.

    Looked at is the line that leads to ``bad``: what a roll-back has left behind is left out. One that is damaged is
    skipped, as the ``IntegrityError`` tells that ``test`` raises when it reads it.

    Args:
        good, bad: selectors of the two ends.
        test: called with one checkpoint after the other; True: good, False: bad, None: can't be tested.
        trust_ends: don't test the two ends first.
        told: called after each trial with how many more there will be at most.

    Raises:
        NotFoundError: no such checkpoint.
        FormatError: ``good`` is not before ``bad`` on one line, or one of the two isn't what it is said to be.
        IntegrityError: one of the two is damaged.
    """
    first, last = store.resolve(good), store.resolve(bad)
    line = _line(store.checkpoints(), first, last)
    search = _Search(line, test, told)
    if not trust_ends:
        search.check(first, "good")
        search.check(last, "bad")
    return search.run()


def _line(checkpoints: Sequence[Checkpoint], good: Checkpoint, bad: Checkpoint) -> list[Checkpoint]:
    """Those from ``good`` to ``bad`` that lie on the way to ``bad``, oldest first."""
    if good.id == bad.id:
        raise FormatError(f"{good.id} can't be both good and bad: there is nothing between to look for", id=good.id)
    if good.order > bad.order:
        raise FormatError(
            f"the good one ({good.id}) was saved after the bad one ({bad.id}), and what is looked for is where good "
            "turned bad. To find where bad turned good, swap them, and have the test succeed where it failed",
            id=good.id,
        )
    line = [bad]
    for checkpoint in reversed([c for c in checkpoints if c.order < bad.order]):
        # What was saved earlier and is of more steps was left behind by a roll-back.
        if checkpoint.step <= line[-1].step:
            line.append(checkpoint)
        elif checkpoint.id == good.id:
            raise FormatError(
                f"{good.id} doesn't lead to {bad.id}: a roll-back to step {line[-1].step} left it behind; choose an "
                "older one as good",
                id=good.id,
            )
        if checkpoint.id == good.id:
            break
    return line[::-1]


class _Search:
    def __init__(self, line: Sequence[Checkpoint], test: Test, told: Callable[[Trial, int], None] | None) -> None:
        self._line, self._test, self._told = line, test, told
        self._low, self._high = 0, len(line) - 1
        self._open = set(range(1, len(line) - 1))
        self._trials: list[Trial] = []

    def check(self, end: Checkpoint, wanted: Verdict) -> None:
        """Nothing, if the test says of one of the two ends what was said of it.

        Raises:
            FormatError, IntegrityError: see ``bisect``.
        """
        trial = self._try(end)
        if trial.verdict == "damaged":
            raise IntegrityError(f"the {wanted} one can't be tested: {trial.why}", id=end.id, step=end.step)
        if trial.verdict != wanted:
            problem = "the test skips it" if trial.verdict == "skipped" else f"the test says {trial.verdict}"
            other = "an older" if wanted == "good" else "a newer"
            raise FormatError(
                f"{end.id} (step {end.step}) was given as {wanted}, and {problem}: choose {other} one, or look at the "
                "test itself",
                id=end.id,
                step=end.step,
            )

    def run(self) -> Bisection:
        """Halve what is left until nothing is."""
        while self._open:
            middle = (self._low + self._high) / 2
            number = min(self._open, key=lambda n: (abs(n - middle), n))
            self._open.discard(number)
            self._try(self._line[number], number)
        undecided = self._line[self._low + 1 : self._high]
        return Bisection(self._line[self._low], self._line[self._high], undecided, self._trials)

    def _try(self, checkpoint: Checkpoint, number: int | None = None) -> Trial:
        try:
            good = self._test(checkpoint)
            trial = Trial(checkpoint, "skipped" if good is None else "good" if good else "bad")
        except IntegrityError as error:
            trial = Trial(checkpoint, "damaged", str(error))
        self._trials.append(trial)
        if number is not None and trial.verdict == "good":
            self._low = number
        elif number is not None and trial.verdict == "bad":
            self._high = number
        self._open = {n for n in self._open if self._low < n < self._high}
        if self._told is not None:
            # Halving n leaves n.bit_length() tests.
            self._told(trial, len(self._open).bit_length())
        return trial
