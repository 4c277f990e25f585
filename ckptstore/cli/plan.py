"""``ckptstore plan``: what will a run save and keep, and how much room does that take?"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import click

from ckptstore.cli.outcome import CommandError
from ckptstore.cli.pictures import check_picture, write_picture
from ckptstore.cli.terminal import emit, json_option, note
from ckptstore.cli.units import duration_s, size_bytes
from ckptstore.errors import NotFoundError

if TYPE_CHECKING:
    from ckptstore.config import Config
    from ckptstore.policy.plan import Plan
    from ckptstore.policy.progress import Length
    from ckptstore.policy.retention import Keep
    from ckptstore.policy.schedule import Schedule

_COUNT = click.IntRange(min=1)
# What the options are called in ``Length.of``, and in a config's ``run``.
_RUN = ("total_steps", "epochs", "dataset_size", "batch_size", "accumulation", "tokens_per_step", "step_s")
_EPOCHS = ("epochs", "dataset_size", "batch_size", "accumulation")


@dataclass(frozen=True)
class Asked:
    """What is planned: the config and the options together.

    Attributes:
        save, keep, length, checkpoint_bytes, trash_s, final: as ``foresee`` takes them.
        notes: what the config says of itself.
    """

    save: Schedule
    keep: Keep | None
    length: Length
    checkpoint_bytes: int | None
    trash_s: float
    final: bool
    notes: tuple[str, ...]


@click.command()
@click.argument("config", required=False)
@click.option("--save", metavar="SCHEDULE", help="When to save: 'every(steps=250) | on_best(val_loss)'.")
@click.option("--keep", metavar="RULES", help="What stays: 'last(10) | epochs()'. All, without it.")
@click.option("--steps", "total_steps", type=_COUNT, metavar="N", help="Optimizer steps in all.")
@click.option("--epochs", type=_COUNT, metavar="N", help="Passes over the data.")
@click.option("--dataset-size", type=_COUNT, metavar="N", help="Samples in an epoch; goes with --batch-size.")
@click.option("--batch-size", type=_COUNT, metavar="N", help="Samples in a micro batch, over all ranks.")
@click.option("--accumulation", type=_COUNT, metavar="N", help="Micro batches in an optimizer step.")
@click.option("--tokens-per-step", type=_COUNT, metavar="N", help="Tokens that one step learns from.")
@click.option("--step-time", "step_s", type=duration_s, metavar="TIME", help="What one step takes: 1.2s.")
@click.option(
    "--size", type=size_bytes, metavar="SIZE", help="What one checkpoint takes: 1.5GB. Without it they are counted."
)
@click.option(
    "--first-epoch", "first", type=click.IntRange(min=0), metavar="N", help="An epoch_plan: saves in the first epoch."
)
@click.option(
    "--spacing", "then", type=click.Choice(["log", "linear", "log_offset"]), help="Its spacing in later epochs."
)
@click.option("--log-base", "base", type=float, metavar="B", help="By how much its gaps grow.")
@click.option("--linear-interval", "interval", type=_COUNT, metavar="N", help="Its interval, for linear spacing.")
@click.option("--min-interval", type=_COUNT, metavar="N", help="Leave out what comes sooner than that.")
@click.option("--picture", metavar="FILE", help="Draw it, as .svg or .png. Needs matplotlib: ckptstore[plot].")
@click.option("--write", is_flag=True, help="Write all steps into CONFIG, or into --output; the rest of it stays.")
@click.option("--output", metavar="FILE", help="Where --write writes, instead of CONFIG.")
@json_option
def plan(
    config: str | None,
    save: str | None,
    keep: str | None,
    size: int | None,
    picture: str | None,
    write: bool,
    output: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Tell beforehand what a run saves and keeps.

    Lists every step that is saved and why, what goes then, how much lies on storage at each moment, the peak, and
    what stays in the end, for which rule. CONFIG is a YAML file that says so; options come before what it says. What
    depends on metrics or time can't be foreseen; the notes say what that is, and the peak has room for it or says that
    it is the least.

    --first-epoch, --spacing, --log-base, --linear-interval and --min-interval make an epoch_plan, which saves often in
    the first epoch and ever more rarely in later ones. What they don't say is as in CONFIG's own epoch_plan.

    \b
      ckptstore plan train.yaml --size 1.5GB --picture plan.svg
      ckptstore plan --save 'every(steps=250) | every(epochs=1)' --keep 'last(3) | epochs()' --steps 10000 --epochs 4
      ckptstore plan train.yaml --first-epoch 10 --spacing linear --write
      ckptstore plan train.yaml --json | jq '[.saves[].step]'

    Exit codes: 0 planned; 2 no such CONFIG or something wrong in it, too little is known of the run, or wrong use.
    """
    shape = {name: options[name] for name in ("first", "then", "base", "interval", "min_interval")}
    _check_use(config, save, shape, size, write, output, picture)
    from ckptstore.policy.plan import foresee

    settings = _config(config)
    asked = _asked(settings, save, keep, size, shape, {name: options[name] for name in _RUN})
    _check_known(asked)
    made = foresee(
        asked.save, asked.keep, asked.length, checkpoint_bytes=asked.checkpoint_bytes or 1,
        trash_s=asked.trash_s, final=asked.final,
    )  # fmt: skip
    if picture:
        _draw(asked, made, picture)
    written = _write(settings, config, output, asked, made) if write and settings and config else None
    from ckptstore.cli import plantext

    if as_json:
        emit(plantext.document(asked, made) | {"config": config, "picture": picture, "written": written})
        return
    plantext.show(asked, made)
    for what, file in (("the picture", picture), ("the steps", written)):
        if file:
            note(f"{what} went into {file}")


def _check_use(
    config: str | None,
    save: str | None,
    shape: Mapping[str, Any],
    size: int | None,
    write: bool,
    output: str | None,
    picture: str | None,
) -> None:
    shaped = any(value is not None for value in shape.values())
    if config is None and save is None and not shaped:
        raise click.UsageError("nothing says when to save: give CONFIG, or --save 'every(steps=250)'")
    if save is not None and shaped:
        raise click.UsageError("--save says when to save, and so do --first-epoch and what belongs to it: give one")
    if write and config is None:
        raise click.UsageError("--write needs CONFIG: the file whose keys are kept")
    if output is not None and not write:
        raise click.UsageError("--output says where --write writes: give both")
    if size == 0:
        raise click.BadParameter("a checkpoint takes more than nothing", param_hint="--size")
    check_picture(picture)


def _config(path: str | None) -> Config | None:
    if path is None:
        return None
    from ckptstore.config import load

    log, silence = logging.getLogger("ckptstore"), logging.NullHandler()
    # What it would log stands among the notes.
    log.addHandler(silence)
    try:
        return load(path)
    except NotFoundError as error:
        raise CommandError(str(error), code="no_config") from error
    finally:
        log.removeHandler(silence)


def _asked(
    config: Config | None,
    save: str | None,
    keep: str | None,
    size: int | None,
    shape: Mapping[str, Any],
    run: Mapping[str, Any],
) -> Asked:
    from ckptstore.policy.text import parse_keep, parse_schedule

    schedule = None if config is None else config.save
    if save is not None:
        schedule = parse_schedule(save)
    elif any(value is not None for value in shape.values()):
        schedule = _epoch_plan(schedule, shape)
    if schedule is None:
        raise CommandError("nothing says when to save: give --save, or write save: into CONFIG", code="no_schedule")
    configured = None if config is None else config.keep
    rules = configured if keep is None else parse_keep(keep)
    length = _length({} if config is None else vars(config.run), run)
    if size is None and config is not None:
        size = config.checkpoint_bytes
    if config is None:
        return Asked(schedule, rules, length, size, 0.0, True, ())
    return Asked(schedule, rules, length, size, config.trash_s, config.final, tuple(config.notes))


def _epoch_plan(configured: Schedule | None, shape: Mapping[str, Any]) -> Schedule:
    """The plan of the options, and for the rest of what the config has."""
    from ckptstore.policy.epochs import EpochPlan, epoch_plan
    from ckptstore.policy.schedule import parts_of

    parts = [] if configured is None else parts_of(configured)
    base = next((part for part in parts if isinstance(part, EpochPlan)), epoch_plan())
    given = {name: value for name, value in shape.items() if value is not None}
    if "base" in given and given["base"].is_integer():
        # Whole numbers stay exact, however large the gaps grow.
        given["base"] = int(given["base"])
    if given.get("then", base.then) != "linear" and "interval" not in given:
        base = replace(base, interval=None)
    return epoch_plan(**(vars(base) | given))


def _length(configured: Mapping[str, Any], given: Mapping[str, Any]) -> Length:
    """What the options say, and for the rest what the config does, as far as that doesn't contradict them."""
    from ckptstore.policy.progress import Length

    options = {name: value for name, value in given.items() if value is not None}
    known = dict(configured)
    if "dataset_size" in options or "batch_size" in options:
        known["steps_per_epoch"] = None
    each_is_known = known.get("steps_per_epoch") or (known | options).get("dataset_size")
    # Three numbers of which two tell the third: what isn't given follows from what is.
    if each_is_known and "total_steps" in options:
        known["epochs"] = None
    elif each_is_known and (known | options).get("epochs") and not options.keys().isdisjoint(_EPOCHS):
        known["total_steps"] = None
    return Length.of(**(known | options))


def _check_known(asked: Asked) -> None:
    """Nothing, where enough is known for a plan.

    Raises:
        CommandError: which options are missing.
    """
    from ckptstore.policy.epochs import EpochPlan
    from ckptstore.policy.retention import AtMost, rules_of
    from ckptstore.policy.schedule import parts_of
    from ckptstore.policy.steps import Every

    length = asked.length
    if length.total_steps is None:
        missing = "--steps N, or --epochs N with --dataset-size N and --batch-size N"
        if length.epochs is not None:
            missing = f"--steps N, or --dataset-size N and --batch-size N beside the {length.epochs} epochs"
        elif length.steps_per_epoch is not None:
            missing = f"--epochs N beside the {length.steps_per_epoch} steps of each, or --steps N"
        raise CommandError(f"how long the run is isn't known: give {missing}", code="no_length")
    if not length.epochs and not length.steps_per_epoch:
        for part in parts_of(asked.save):
            if isinstance(part, EpochPlan) or (isinstance(part, Every) and part.unit == "epochs"):
                raise CommandError(f"{part} needs to know where epochs end: give --epochs N", code="no_length")
    if asked.checkpoint_bytes is None:
        for rule in rules_of(asked.keep):
            if isinstance(rule, AtMost):
                raise CommandError(f"{rule} needs to know what a checkpoint takes: give --size 1.5GB", code="no_size")


def _draw(asked: Asked, made: Plan, path: str) -> None:
    from ckptstore.tools.planpicture import picture

    title = f"save {asked.save}\nkeep {asked.keep or 'all'}"
    unit_bytes = None if asked.checkpoint_bytes else 1
    write_picture(path, lambda format: picture(made, asked.length, format, title=title, unit_bytes=unit_bytes))


def _write(config: Config, path: str, output: str | None, asked: Asked, made: Plan) -> str:
    """Write the steps; the file's name.

    Raises:
        CommandError: what is written couldn't be read again.
    """
    from ckptstore.config import write_steps
    from ckptstore.policy.schedule import parts_of

    steps = [moment.step for moment in made.moments]
    total = config.run.length().total_steps
    if total is not None and steps and steps[-1] > total:
        message = f"{path} is for a run of {total} steps, and step {steps[-1]} would never come: change its run: first"
        raise CommandError(message, code="other_length")
    write_steps(path, steps, output=output)
    there = [] if config.save is None else parts_of(config.save)
    for part in parts_of(asked.save):
        if part.open_ends(asked.length) and part not in there:
            note(f"{part} can't be told in steps, and isn't written: add it to save: in {output or path}")
    return output or path
