"""Keys of other training programs' configs, read as they stand there and translated into ours.

A file is such a one if none of its keys at the top is ours, and if it has a section ``checkpointing`` or
``progressive_checkpoints``, or one of ``TRAINING`` in its section ``training``, or one of ``FLAGS`` there or at the
top. All else in it (the model, the data, the optimizer) is none of our business.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ckptstore.config.files import Keys
from ckptstore.config.model import names, read_place, read_resume
from ckptstore.config.problems import Problems, listed
from ckptstore.errors import FormatError
from ckptstore.policy.epochs import epoch_plan
from ckptstore.policy.progress import check_count
from ckptstore.policy.retention import Keep
from ckptstore.policy.rules import last, milestones
from ckptstore.policy.schedule import Schedule
from ckptstore.policy.steps import at, every

TRAINING = (
    "auto_generate_checkpoints",
    "first_epoch_checkpoints",
    "subsequent_epochs_spacing",
    "log_base",
    "linear_interval",
    "min_checkpoint_interval",
    "checkpoint_schedule",
    "target_checkpoints",
    "log_steps_first_epoch",
)
FLAGS: Mapping[str, tuple[str, str]] = {
    "save_optimizer_state": ("include", "optimizer"),
    "save_scheduler_state": ("include", "scheduler"),
    "restore_optimizer_state": ("restore", "optimizer"),
    "restore_scheduler_state": ("restore", "scheduler"),
    "resume_from_checkpoint": ("resume", ""),
    "save_total_limit": ("keep", ""),
}
SECTIONS = ("training", "checkpointing", "progressive_checkpoints")

_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
"""What these programs' YAML took for true and false."""
_FOLDER = re.compile(r"(?:.*/)?checkpoint-(\d{1,15})/?", re.DOTALL)
_INERT_INTERVAL = 100
_NOTHING_SAVES = (
    "nothing says when to save: checkpointing needs save_at_steps (a list of steps) or save_steps (an interval), or "
    "training a checkpoint_schedule; a config of ckptstore has save: every(steps=250)"
)


@dataclass
class _Translation:
    """What was understood so far."""

    problems: Problems
    ours: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    saves: list[Schedule] = field(default_factory=list)
    keeps: list[Keep] = field(default_factory=list)

    def save(self, schedule: Schedule, path: Keys) -> None:
        """Save by ``schedule``, too, for which the key at ``path`` asks."""
        self.saves.append(schedule)
        self.problems.aliases.setdefault(("save",), path)

    def section(self, data: Mapping[str, Any], name: str) -> Mapping[str, Any]:
        """A section at the top; {} where there is none."""
        found = data.get(name)
        if found is not None and not isinstance(found, dict):
            self.problems.add((name,), "must be a section of keys")
        return found if isinstance(found, dict) else {}

    def flag(self, section: Mapping[str, Any], path: Keys, default: bool) -> bool:
        """A value that is true or false."""
        value = section.get(path[-1])
        if isinstance(value, str):
            value = _WORDS.get(value.lower(), value)
        if value is not None and not isinstance(value, bool):
            self.problems.add(path, f"{value!r:.60} must be true or false")
        return value if isinstance(value, bool) else default


def is_foreign(data: Mapping[str, Any]) -> bool:
    """Whether ``data`` is another program's config."""
    if not data or set(data).intersection(names()):
        return False
    training = data.get("training")
    inside = set(training) if isinstance(training, dict) else set()
    return bool(
        set(data).intersection(SECTIONS[1:]) or inside.intersection(TRAINING) or {*inside, *data}.intersection(FLAGS)
    )


def refuse_mixed(data: dict[str, Any], problems: Problems) -> None:
    """Nothing, for a config of ours.

    Raises:
        FormatError: it is a training program's that says nothing about checkpoints. What belongs to such a one in a
            config of ours is among ``problems`` then.
    """
    ours = set(data).intersection(names())
    theirs = [name for name in (*SECTIONS, *FLAGS) if name in data]
    if theirs and not ours:
        raise FormatError(f"{problems.source}: {_NOTHING_SAVES}")
    for name in theirs:
        del data[name]
        problems.add(
            (name,),
            f"is understood only in another program's config, which has no keys of ckptstore, and this has "
            f"{listed(sorted(ours))}: say it with ckptstore's keys ({', '.join(names())})",
        )


def translated(data: Mapping[str, Any], problems: Problems) -> tuple[dict[str, Any], list[str]]:
    """``data`` in our keys, and what was corrected or replaced; what is wrong goes to ``problems``."""
    made = _Translation(problems)
    training = made.section(data, "training")
    _training(made, training)
    if "checkpointing" in data:
        _checkpointing(made, made.section(data, "checkpointing"))
    _flags(made, (((), data), (("training",), training)))
    _progressive(made, made.section(data, "progressive_checkpoints"))
    if made.saves:
        made.ours["save"] = made.saves
    if made.keeps:
        made.ours["keep"] = made.keeps
    return made.ours, made.notes


def _training(made: _Translation, training: Mapping[str, Any]) -> None:
    run = {ours: training[name] for name, ours in (("train_steps", "total_steps"), ("epochs", "epochs"))
           if type(training.get(name)) is int and training[name] > 0}  # fmt: skip
    if run:
        made.ours["run"] = run
        made.problems.aliases |= {("run", "total_steps"): ("training", "train_steps"), ("run",): ("training",)}
    replacements = {
        "target_checkpoints": "first_epoch_checkpoints says how many there are in the first epoch",
        "log_steps_first_epoch": "first_epoch_checkpoints spreads them evenly over the first epoch",
    }
    made.notes += [f"training.{name} is no longer used: {text}" for name, text in replacements.items()
                   if name in training]  # fmt: skip
    if not set(training).intersection(TRAINING):
        return
    steps, auto = training.get("checkpoint_schedule"), made.flag(training, ("training", TRAINING[0]), False)
    if steps is not None and not isinstance(steps, list):
        made.problems.add(("training", "checkpoint_schedule"), f"{steps!r:.60} must be a list of steps, as [0, 10, 30]")
        return
    if auto or not steps:
        _epoch_plan(made, training, used=auto and not steps)
    if steps:
        with made.problems.at(("training", "checkpoint_schedule")):
            made.save(_save_at(steps), ("training", "checkpoint_schedule"))
        if auto:
            made.notes.append("training.checkpoint_schedule governs; auto_generate_checkpoints is not used beside it")
    elif not auto:
        made.notes.append(
            "training.auto_generate_checkpoints is off and checkpoint_schedule empty: they ask for no saves"
        )


def _epoch_plan(made: _Translation, training: Mapping[str, Any], *, used: bool) -> None:
    """The generated schedule. Its keys are checked also where it isn't used: who turns it on shall not be surprised."""
    first = training.get("first_epoch_checkpoints", 20)
    then, interval = training.get("subsequent_epochs_spacing", "log"), training.get("linear_interval")
    base, least = training.get("log_base", 2), training.get("min_checkpoint_interval", _INERT_INTERVAL)
    if type(first) is int and first < 0:
        made.notes.append(f"training.first_epoch_checkpoints: {first} is taken as 0")
        first = 0
    found = len(made.problems.found)
    checked: dict[str, Callable[[], object]] = {
        "first_epoch_checkpoints": lambda: epoch_plan(first),
        "subsequent_epochs_spacing": lambda: epoch_plan(then=then),
        "log_base": lambda: epoch_plan(base=base),
        "linear_interval": lambda: check_count(interval, "linear_interval"),
        "min_checkpoint_interval": lambda: check_count(least, "min_checkpoint_interval"),
    }
    for name, check in checked.items():
        with made.problems.at(("training", name)):
            check()
    if not used or len(made.problems.found) > found:
        return
    if then != "linear" and interval is not None:
        made.notes.append(f"training.linear_interval is for linear spacing, and subsequent_epochs_spacing is {then}")
        interval = None
    inert = least == _INERT_INTERVAL
    plan = epoch_plan(first, then, base=base, interval=interval, min_interval=None if inert else least)
    made.save(plan, ("training",))
    if inert and "min_checkpoint_interval" in training:
        made.notes.append(
            f"training.min_checkpoint_interval: {_INERT_INTERVAL}, the default there, never had an effect, nor has it "
            "here; another value leaves out what comes sooner"
        )
    if then == "log":
        made.notes.append(
            "training: in later epochs gaps grow from each epoch's first step on, as is documented there, and step 0, "
            "the ends of epochs and the last step are saved; the program multiplied the step itself, and missed some"
        )


def _checkpointing(made: _Translation, section: Mapping[str, Any]) -> None:
    steps, interval = section.get("save_at_steps"), section.get("save_steps")
    if steps is not None:
        with made.problems.at(("checkpointing", "save_at_steps")):
            made.save(_save_at(steps), ("checkpointing", "save_at_steps"))
        if interval is not None:
            made.notes.append("checkpointing.save_at_steps governs; save_steps is not used beside it")
        if isinstance(steps, list) and 0 in steps:
            made.notes.append("checkpointing: step 0 is saved with all that a run resumes from, not the weights alone")
    elif interval is not None:
        with made.problems.at(("checkpointing", "save_steps")):
            made.save(_interval(interval), ("checkpointing", "save_steps"))
    elif not made.saves:
        made.problems.add(("checkpointing",), _NOTHING_SAVES)
    if section.get("eval_steps") is not None:
        with made.problems.at(("checkpointing", "eval_steps")):
            made.ours["eval"] = _interval(section["eval_steps"])
            made.problems.aliases[("eval",)] = ("checkpointing", "eval_steps")


def _save_at(steps: object) -> Schedule:
    if not isinstance(steps, list):
        raise FormatError(f"{steps!r:.60} must be a list of steps, as [0, 10, 30]")
    if not steps:
        raise FormatError("the list is empty: name the steps, or leave it out and give save_steps")
    wrong = []
    for step in steps:
        try:
            at(step)
        except FormatError as error:
            wrong.append(str(error))
    if wrong:
        raise FormatError("; ".join(wrong[:5]) + ("; …" if len(wrong) > 5 else ""))
    return at(*steps)


def _interval(value: object) -> Schedule:
    """An interval in steps, or below 1 the share of the run."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, float) and 0 < value < 1:
        return every(fraction=value)
    if type(value) is int and value >= 1:
        return every(steps=value)
    raise FormatError(
        f"{value!r:.60} is no interval: write a whole number of steps, as 500, or a share of the run below 1, as 0.005"
    )


def _flags(made: _Translation, places: tuple[tuple[Keys, Mapping[str, Any]], ...]) -> None:
    for name, (key, part) in FLAGS.items():
        path, section = next((((*path, name), section) for path, section in places if name in section), ((), {}))
        if not path or section[name] is None:
            continue
        if part:
            made.ours.setdefault(key, {})[part] = made.flag(section, path, True)
        elif key == "keep":
            _limit(made, section[name], path)
        else:
            _resume(made, section, path)


def _limit(made: _Translation, count: object, path: Keys) -> None:
    if type(count) is not int or count < 1:
        made.problems.add(path, f"{count!r:.60} must be a whole number of at least 1; leave it out to keep all")
        return
    made.keeps.append(last(count))


def _resume(made: _Translation, section: Mapping[str, Any], path: Keys) -> None:
    value = section[path[-1]]
    if not isinstance(value, str) or value.lower() in _WORDS:
        made.ours["resume"] = made.flag(section, path, True)
    elif match := _FOLDER.fullmatch(value):
        made.ours["resume"] = f"step:{int(match[1])}"
        made.notes.append(f"{'.'.join(path)}: {value} is taken as step:{int(match[1])} of the store")
    elif "/" in value:
        made.problems.add(
            path, f"{value!r:.100} is a folder of another program: write true, false, latest, or step:N of the store"
        )
    else:
        with made.problems.at(path):
            made.ours["resume"] = read_resume(value)


def _progressive(made: _Translation, section: Mapping[str, Any]) -> None:
    if not section or not made.flag(section, ("progressive_checkpoints", "enabled"), True):
        return
    counts, folder = section.get("milestones"), section.get("save_dir")
    if isinstance(counts, list):
        counts = [int(count) if isinstance(count, float) and count.is_integer() else count for count in counts]
    if not isinstance(counts, list | str):
        made.problems.add(("progressive_checkpoints", "milestones"), f"{counts!r:.60}: write them as '1B,5B,10B'")
        return
    with made.problems.at(("progressive_checkpoints", "milestones")):
        made.save(milestones(counts), ("progressive_checkpoints", "milestones"))
        if made.keeps:
            # They were files of their own there, which no limit removed.
            made.keeps.append(milestones())
    if folder is not None:
        with made.problems.at(("progressive_checkpoints", "save_dir")):
            made.ours["storage"] = read_place(folder)
        made.notes.append(f"progressive_checkpoints.save_dir: {folder} is the storage, of these and all other saves")
