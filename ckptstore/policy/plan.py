"""What a run will save and keep, told before it begins."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import takewhile

from ckptstore.errors import FormatError
from ckptstore.policy.judge import Verdict, staying, too_many, verdict
from ckptstore.policy.progress import Length, Past, Progress
from ckptstore.policy.retention import Keep, rules_of
from ckptstore.policy.room import Room
from ckptstore.policy.rules import Best, Epochs, Within
from ckptstore.policy.schedule import Schedule, parts_of

FINAL = "final"
"""Why the last step of a run is saved, where nothing else asks for it."""
_BEGIN = datetime(2000, 1, 1, tzinfo=UTC)
_LONGEST_S = 100e9
"""A run of 3,000 years; what is later no calendar has."""


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
        count: how many checkpoints lie on storage then, without those in the trash.
        peak_bytes: the most that lies there meanwhile: the new one and all that was there before.
        left_bytes: what lies there after.
        goes_at: the save after which it goes itself, None where it stays to the end.
    """

    step: int
    epoch: int | None
    time_s: float | None
    reasons: Sequence[str]
    going: Sequence[Verdict]
    count: int
    peak_bytes: int
    left_bytes: int
    _goes: Mapping[int, int | None] = field(repr=False, compare=False)

    @property
    def goes_at(self) -> int | None:
        return self._goes[self.step]

    @property
    def there(self) -> Sequence[int]:
        """The steps that lie on storage then."""
        # Not kept for every moment: a long run that keeps all would fill the memory with them.
        upto = takewhile(lambda item: item[0] <= self.step, self._goes.items())
        return [step for step, end in upto if end is None or end > self.step]


@dataclass(frozen=True)
class Plan:
    """What a run will save and keep.

    Attributes:
        moments: one for each save, in order.
        final: what lies on storage at the end, with the rules that keep it.
        peak_bytes: the most that ever lies there, with room for what can't be foreseen, as the best ones.
        at_most: whether it can't be more; where anything may be saved besides, and stay, the peak is "at least" that.
        notes: what can't be told beforehand, for people.
    """

    moments: Sequence[Moment]
    final: Sequence[Verdict]
    peak_bytes: int
    at_most: bool
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
    moments, staying_on = _moments(foreseen(save, length, checkpoint_bytes, final=final), keep, length, trash_s)
    room = Room(save, keep, length, checkpoint_bytes, in_trash=trash_s > 0)
    peaks = [room.peak(moment.peak_bytes, saved) for saved, moment in enumerate(moments, 1)]
    notes = [*_notes(save, keep, length, trash_s, room), *_refused(moments)]
    return Plan(moments, staying_on, max(peaks, default=0), room.is_known, notes)


def _moments(
    saves: Iterable[Foreseen], keep: Keep | None, length: Length, trash_s: float
) -> tuple[list[Moment], Sequence[Verdict]]:
    """What happens, and what the rules say of those that lie there at the end."""
    present: list[Foreseen] = []
    # When each is reclaimed, and its bytes; the first one goes first.
    trash: deque[tuple[datetime, int]] = deque()
    present_bytes = trash_bytes = 0
    goes: dict[int, int | None] = {}
    moments = []
    reasons: Mapping[str, str] = {}
    for saved in saves:
        present.append(saved)
        present_bytes += saved.stored_bytes
        goes[saved.step] = None
        # Also what has been in the trash for long enough: it is reclaimed after this save, not in between.
        peak = present_bytes + trash_bytes
        while trash and trash[0][0] <= saved.created:
            trash_bytes -= trash.popleft()[1]
        going: list[Verdict] = []
        if keep is not None:
            reasons = staying(keep, present, now=saved.created)
            going = [verdict(c, reasons, keep) for c in present if c.id not in reasons]
        if going:
            present = [c for c in present if c.id in reasons]
            goes |= dict.fromkeys((each.step for each in going), saved.step)
            present_bytes -= sum(each.own_bytes for each in going)
            if trash_s:
                until = saved.created + timedelta(seconds=trash_s)
                trash.extend((until, each.own_bytes) for each in going)
                trash_bytes += sum(each.own_bytes for each in going)
        limit = None if keep is None else keep.limit_bytes
        while trash and limit is not None and present_bytes + trash_bytes > limit:
            trash_bytes -= trash.popleft()[1]
        time_s = None if length.step_s is None else saved.step * length.step_s
        left = present_bytes + trash_bytes
        moments.append(Moment(saved.step, saved.epoch, time_s, saved.reasons, going, len(present), peak, left, goes))
    if keep is None:
        return moments, [Verdict(c.id, c.step, True, "all are kept", c.stored_bytes) for c in present]
    return moments, [verdict(c, reasons, keep) for c in present]


def foreseen(save: Schedule, length: Length, checkpoint_bytes: int, *, final: bool = True) -> Iterator[Foreseen]:
    """What a run of ``length`` saves, in order, as far as it can be told beforehand.

    Raises:
        FormatError: the schedule doesn't fit the run.
    """
    total = length.require_total("a plan")
    if length.step_s is not None and total * length.step_s > _LONGEST_S:
        raise FormatError(f"{total} steps of {length.step_s:g} s each take longer than {_LONGEST_S:g} s: write less")
    steps = save.steps(length=length, known_only=True)
    known = [part for part in parts_of(save) if not part.open_ends(length)]
    ends = length.epoch_ends() if length.epochs or length.steps_per_epoch else None
    past = Past()
    for step in sorted({*steps, total}) if final else steps:
        before, now = _progress(max(step - 1, 0), length, ends), _progress(step, length, ends)
        past = past.decided(before) if step else past
        reasons = list(dict.fromkeys(reason for part in known for reason in part.due(now, past, length)))
        reasons = reasons or [FINAL]
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


def _notes(save: Schedule, keep: Keep | None, length: Length, trash_s: float, room: Room) -> list[str]:
    notes = save.open_ends(length)
    if notes and not room.is_known:
        notes.append("what is saved besides comes on top of the peak")
    rules = rules_of(keep)
    notes += [
        f"{rule} depends on what is measured: room for {rule.count} more is in the peak"
        for rule in rules
        if isinstance(rule, Best)
    ]
    if not length.epochs and not length.steps_per_epoch:
        notes += [
            f"{rule} keeps nothing here, as nobody knows where epochs end: give epochs"
            for rule in rules
            if isinstance(rule, Epochs)
        ]
    timed = [str(rule) for rule in rules if isinstance(rule, Within)] + (["the trash"] if trash_s else [])
    if timed and length.step_s is None:
        notes.append(f"{' and '.join(timed)}: nothing grows older here, as nobody knows what a step takes: give step_s")
    return notes


def _refused(moments: Sequence[Moment]) -> Iterator[str]:
    """A note on the first save after which so many go that a person is asked."""
    for moment in moments:
        if (why := too_many(len(moment.going), moment.count + len(moment.going))) is not None:
            yield f"after step {moment.step} {why}: without a backup, none does until somebody prunes with --force"
            return
