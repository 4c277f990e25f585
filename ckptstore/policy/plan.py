"""What a run will save and keep, told before it begins."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from ckptstore.errors import FormatError
from ckptstore.policy.judge import Verdict, judge
from ckptstore.policy.progress import Length, Past, Progress
from ckptstore.policy.retention import Keep
from ckptstore.policy.rules import Best, Within
from ckptstore.policy.schedule import Schedule

FINAL = "final"
"""Why the last step of a run is saved, where nothing else asks for it."""
_BEGIN = datetime(2000, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Foreseen:
    """A checkpoint that a run will save."""

    id: str
    step: int
    epoch: int | None
    reasons: Sequence[str]
    created: datetime
    stored_bytes: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    modes: Mapping[str, str] = field(default_factory=dict)
    borrowed_bytes: int = 0
    lenders: Sequence[str] = ()


@dataclass(frozen=True)
class Moment:
    """One save, and what follows from it.

    Attributes:
        step: the step that is saved.
        epoch: completed epochs, None where nobody knows where they end.
        time_s: seconds since the beginning, None where nobody knows what a step takes.
        reasons: why it is saved.
        going: what the rules let go of right after.
        there: the steps that lie on storage then.
        peak_bytes: the most that lies there meanwhile: the new one and all that was there before.
        left_bytes: what lies there after.
    """

    step: int
    epoch: int | None
    time_s: float | None
    reasons: Sequence[str]
    going: Sequence[Verdict]
    there: Sequence[int]
    peak_bytes: int
    left_bytes: int


@dataclass(frozen=True)
class Plan:
    """What a run will save and keep.

    Attributes:
        moments: one for each save, in order.
        final: what lies on storage at the end, with the rules that keep it.
        peak_bytes: the most that ever lies there, with room for the best ones that can't be foreseen.
        notes: what can't be told beforehand, for people.
    """

    moments: Sequence[Moment]
    final: Sequence[Verdict]
    peak_bytes: int
    notes: Sequence[str]


def foresee(
    save: Schedule,
    keep: Keep | None,
    length: Length,
    *,
    checkpoint_bytes: int,
    trash_s: float = 0.0,
    final: bool = True,
) -> Plan:
    """What a run of ``length`` saves under ``save``, and what stays under ``keep``.

    Args:
        save: when to save.
        keep: what stays; None keeps all.
        length: of the run; ``total_steps`` has to be known.
        checkpoint_bytes: what one checkpoint takes on storage.
        trash_s: how long after its removal a checkpoint still takes up space, in seconds.
        final: whether the last step is saved in any case.

    Raises:
        FormatError: the schedule doesn't fit the run.
    """
    if type(checkpoint_bytes) is not int or checkpoint_bytes < 0:
        raise FormatError(f"checkpoint_bytes={checkpoint_bytes!r} must be a whole number of at least 0")
    length.require_total("a plan")
    saves = list(foreseen(save, length, checkpoint_bytes, final=final))
    present: list[Foreseen] = []
    trash: list[tuple[datetime, int]] = []
    moments = []
    for saved in saves:
        trash = [(until, count) for until, count in trash if until > saved.created]
        peak = sum(c.stored_bytes for c in (*present, saved)) + sum(count for _, count in trash)
        present.append(saved)
        going: list[Verdict] = []
        if keep is not None:
            buried = sum(count for _, count in trash)
            going = judge(keep, present, now=saved.created, other_bytes=buried).going
            gone = {verdict.id for verdict in going}
            present = [c for c in present if c.id not in gone]
            if trash_s:
                until = saved.created + timedelta(seconds=trash_s)
                trash += [(until, verdict.own_bytes) for verdict in going]
        left = sum(c.stored_bytes for c in present) + sum(count for _, count in trash)
        time_s = None if length.step_s is None else saved.step * length.step_s
        there = [c.step for c in present]
        moments.append(Moment(saved.step, saved.epoch, time_s, saved.reasons, going, there, peak, left))
    reserve = checkpoint_bytes * sum(rule.count for rule in _parts(keep) if isinstance(rule, Best))
    highest = max((moment.peak_bytes for moment in moments), default=0)
    peak_bytes = highest + reserve if moments else 0
    return Plan(moments, _final(keep, present, saves), peak_bytes, _notes(save, keep, length, trash_s))


def foreseen(save: Schedule, length: Length, checkpoint_bytes: int, *, final: bool = True) -> Iterator[Foreseen]:
    """What a run of ``length`` saves, in order, as far as it can be told beforehand.

    Raises:
        FormatError: the schedule doesn't fit the run.
    """
    total = length.require_total("a plan")
    steps = save.steps(length=length, known_only=True)
    ends = length.epoch_ends() if length.epochs or length.steps_per_epoch else None
    past = Past()
    for step in sorted({*steps, total}) if final else steps:
        before, now = _progress(max(step - 1, 0), length, ends), _progress(step, length, ends)
        past = past.decided(before) if step else past
        reasons = save.due(now, past, length) or ([FINAL] if step == total and final else [])
        past = past.saved(now, reasons)
        epoch = None if ends is None else now.epoch
        yield Foreseen(f"step {step}", step, epoch, reasons, _time(now), checkpoint_bytes)


def _progress(step: int, length: Length, ends: Sequence[int] | None) -> Progress:
    return Progress(
        step=step,
        epoch=bisect_right(ends, step) if ends else 0,
        tokens=step * (length.tokens_per_step or 0),
        elapsed_s=step * (length.step_s or 0.0),
    )


def _time(now: Progress) -> datetime:
    return _BEGIN + timedelta(seconds=now.elapsed_s)


def _final(keep: Keep | None, present: Sequence[Foreseen], saves: Sequence[Foreseen]) -> Sequence[Verdict]:
    if keep is None or not saves:
        return [Verdict(c.id, c.step, True, "all are kept", c.stored_bytes) for c in present]
    return judge(keep, present, now=saves[-1].created).verdicts


def _parts(keep: Keep | None) -> Sequence[Keep]:
    return [] if keep is None else getattr(keep, "parts", (keep,))


def _notes(save: Schedule, keep: Keep | None, length: Length, trash_s: float) -> list[str]:
    notes = save.open_ends(length)
    notes += [
        f"{rule} depends on what is measured: room for {rule.count} more is in the peak"
        for rule in _parts(keep)
        if isinstance(rule, Best)
    ]
    timed = [str(rule) for rule in _parts(keep) if isinstance(rule, Within)] + (["the trash"] if trash_s else [])
    if timed and length.step_s is None:
        notes.append(f"{' and '.join(timed)}: nothing grows older here, as nobody knows what a step takes: give step_s")
    return notes
