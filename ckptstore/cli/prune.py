"""``ckptstore prune``: free the space of what was deleted and of what killed saves left."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from ckptstore.cli import texts
from ckptstore.cli.access import changing, looking
from ckptstore.cli.terminal import answer, emit, json_option
from ckptstore.cli.units import duration_s
from ckptstore.policy.text import parse_keep

if TYPE_CHECKING:
    from ckptstore.maintenance.prune import PruneReport
    from ckptstore.policy.judge import Judgement
    from ckptstore.policy.retention import Keep


@click.command()
@click.argument("url")
@click.option(
    "--grace",
    type=duration_s,
    default="24h",
    show_default=True,
    metavar="TIME",
    help="Leave alone what is younger: 90s, 10m, 24h, 7d.",
)
@click.option(
    "--keep",
    metavar="RULES",
    help='First delete what these rules don\'t keep, as "last(10) | epochs() | best(val_loss)".',
)
@click.option("--config", metavar="FILE", help="The same with the rules of a config.")
@click.option("--dry-run", is_flag=True, help="Only tell what would be done, and which rule keeps each checkpoint.")
@click.option("--force", is_flag=True, help="Also where very many would go.")
@json_option
def prune(
    url: str, grace: float, keep: str | None, config: str | None, dry_run: bool, force: bool, as_json: bool
) -> None:
    """Free the space of what was deleted and of killed saves.

    Removes the data of checkpoints that were deleted more than --grace ago; they can't be brought back then. What
    killed saves left goes at once where a newer run has opened the store since, else after --grace, because the
    save may still be running. A checkpoint that exists is never touched, but for --keep.

    With --keep, what the rules don't keep is deleted first: 'ckptstore undelete' brings it back for --grace. Whatever
    they say, the newest good one stays, and what is held, what others borrow from, and what is damaged. More than 20 at
    once, or more than 3 that are over half of all, need --force.

    \b
      ckptstore prune runs/gpt2
      ckptstore prune runs/gpt2 --keep "last(10) | epochs() | best(val_loss)" --dry-run
      ckptstore prune runs/gpt2 --config configs/three-tiers.yaml

    Exit codes: 0 done, also if there was nothing to do; 2 no store at URL, the storage failed or wrong use.
    """
    rules = rules_of(keep, config)
    if dry_run:
        with looking(url) as (store, _):
            judgement = store.judge(rules) if rules is not None else None
            report = store.prune(grace_s=grace, dry_run=True)
        if judgement is not None:
            report = report.after([verdict.id for verdict in judgement.going])
    else:
        judgement = None
        with changing(url) as store:
            report = store.prune(grace_s=grace, keep=rules, force=force)
    if as_json:
        emit(_fields(report, judgement, dry_run=dry_run))
        return
    lines = _verdicts(judgement) if judgement is not None else []
    answer(*lines, *_lines(report, dry_run=dry_run))


def rules_of(keep: str | None, config: str | None) -> Keep | None:
    """The rules that --keep or --config give.

    Raises:
        click.UsageError: both are given, or the config has no rules.
        FormatError: what is written is no rule.
    """
    if keep is not None and config is not None:
        raise click.UsageError("--keep and --config both say what stays: give one of them")
    if keep is not None:
        return parse_keep(keep)
    if config is None:
        return None
    from ckptstore.config import load

    rules = load(config).keep
    if rules is None:
        raise click.UsageError(f"{config} doesn't say what stays: give it a line as keep: last(10), or use --keep")
    return rules


def _verdicts(judgement: Judgement) -> list[str]:
    lines = [f"{'stays' if v.stays else 'goes '}  step {v.step:<8} {v.why}  ({v.id})" for v in judgement.verdicts]
    going, count = len(judgement.going), len(judgement.verdicts)
    lines.append(f"{going} of {count} would be deleted, {texts.size_text(judgement.going_bytes)}")
    return lines + ([f"{judgement.needs_force}: that needs --force"] if judgement.needs_force else [])


def _fields(report: PruneReport, judgement: Judgement | None, *, dry_run: bool) -> dict[str, object]:
    fields: dict[str, object] = {
        "dry_run": dry_run,
        "retired": list(report.retired),
        "reclaimed": list(report.reclaimed),
        "leftovers": list(report.leftovers),
        "spared": list(report.spared),
        "freed_bytes": report.freed_bytes,
        "uploads": list(report.uploads),
    }
    if judgement is not None:
        fields["needs_force"] = judgement.needs_force
        fields["checkpoints"] = [asdict(verdict) for verdict in judgement.verdicts]
    return fields


def _lines(report: PruneReport, *, dry_run: bool) -> list[str]:
    would = "would have " if dry_run else ""
    lines = [] if dry_run else [f"deleted {id}: 'ckptstore undelete' brings it back" for id in report.retired]
    lines += [f"{would}reclaimed {id}, which was deleted" for id in report.reclaimed]
    lines += [f"{would}removed what a killed save left of {id}" for id in report.leftovers]
    lines += [f"{would}left alone {id}: its save may still be running (see --grace)" for id in report.spared]
    lines += [f"dropped the unfinished upload of {key}" for key in report.uploads]
    return [*lines, f"{would}freed {texts.size_text(report.freed_bytes)}"]
