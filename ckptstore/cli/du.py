"""``ckptstore du``: what takes up the space, and what each rule that keeps checkpoints costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from ckptstore.cli import texts
from ckptstore.cli.access import looking
from ckptstore.cli.outcome import BAD_NEWS
from ckptstore.cli.prune import rules_of
from ckptstore.cli.terminal import answer, count_progress, emit, json_option, plain, table

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from ckptstore.tools.usage import CheckpointUsage, KeepUsage, PartUsage, RoleUsage, Usage

_ROLES_SHOWN = 20


@click.command()
@click.argument("url")
@click.option("--all", "each", is_flag=True, help="Also each checkpoint by itself.")
@click.option("--keep", metavar="RULES", help='Also what each of these rules costs, as "last(3) | best(val_loss)".')
@click.option("--config", metavar="FILE", help="The same with the rules of a config.")
@json_option
@click.pass_context
def du(ctx: click.Context, url: str, each: bool, keep: str | None, config: str | None, as_json: bool) -> None:
    """Tell what takes up the space at URL.

    By role (latest, best, held, saved for which reason), by component of the state, by codec, and what is no
    checkpoint: the trash, what killed saves left, records. All of it adds up to what lies there. A checkpoint may have
    several roles, and files may be shared: "in all" is what those of a role need, each file once; "only" is what would
    be free without them. Only records are read, never a data file.

    With --keep, for each rule what it keeps, what would be free without it, and what would go under all of them. That
    is free as soon as 'ckptstore prune' has reclaimed it.

    \b
      ckptstore du runs/gpt2
      ckptstore du runs/gpt2 --all
      ckptstore du runs/gpt2 --keep "last(3) | epochs() | best(val_loss)"

    Exit codes: 0 good; 1 records are damaged, so that nobody knows what some checkpoints need; 2 no store at URL, the
    storage failed or wrong use.
    """
    rules = rules_of(keep, config)
    from ckptstore.tools.usage import usage

    with looking(url) as (store, _), count_progress("reading records") as progress:
        found = usage(store, rules, progress=progress)
    if as_json:
        emit(asdict(found))
    else:
        answer(*_parts(found, each))
    if found.unreadable or found.damaged_bytes:
        ctx.exit(BAD_NEWS)


def _parts(found: Usage, each: bool) -> Iterator[RenderableType]:
    yield f"{texts.size_text(found.total_bytes)} in {texts.count_text(found.objects, 'object')} at {found.url}"
    yield from _kinds(found)
    if not found.checkpoints:
        return
    shown = sorted(found.roles, key=lambda role: -role.bytes)[:_ROLES_SHOWN]
    yield from ("", _roles([role for role in found.roles if role in shown]))
    if len(shown) < len(found.roles):
        yield f"{len(found.roles) - len(shown)} smaller roles: --json has all"
    yield from ("", _stored("component", "files", found.components))
    yield from ("", _stored("codec", "files", found.codecs))
    if each:
        yield from ("", _checkpoints(found.checkpoints))
    if found.keep is not None:
        yield from ("", *_rules(found.keep))


def _kinds(found: Usage) -> Iterator[str]:
    borrowed = f", {texts.size_text(found.spared_bytes)} spared by borrowing" if found.spared_bytes else ""
    checkpoints = texts.count_text(len(found.checkpoints), "checkpoint")
    raw = texts.size_text(found.raw_bytes)
    deleted = texts.count_text(found.deleted, "deleted checkpoint")
    kinds = [
        (found.checkpoint_bytes, f"{checkpoints}: {raw} in memory{borrowed}"),
        (found.trash_bytes, f"trash: {deleted}; 'ckptstore prune' frees it"),
        (found.unfinished_bytes, "unfinished: by a save that runs now, or was killed; 'ckptstore prune' collects it"),
        (found.damaged_bytes, "DAMAGED: of records that can't be read; 'ckptstore verify' says what is wrong"),
        (found.record_bytes, "records"),
        (found.foreign_bytes, "not ckptstore's"),
    ]
    yield from (f"  {texts.size_text(count):>8}  {what}" for count, what in kinds if count)
    for id in found.unreadable:
        yield f"DAMAGED {id}: its records can't be read, and what it may need counts as its own"


def _roles(roles: Sequence[RoleUsage]) -> Table:
    made = table("role", "count", "in all", "only", right=("count", "in all", "only"), drop=("count",), fold=("role",))
    for role in roles:
        made.add_row(plain(role.name), str(role.checkpoints), texts.size_text(role.bytes), _size(role.only_bytes))
    return made


def _stored(title: str, noun: str, parts: Sequence[PartUsage]) -> Table:
    made = table(title, noun, "stored", "raw", right=(noun, "stored", "raw"), drop=(noun,), fold=(title,))
    for part in parts:
        sizes = texts.size_text(part.bytes), texts.size_text(part.raw_bytes)
        made.add_row(plain(part.name), f"{part.objects:,}", *sizes)
    return made


def _checkpoints(checkpoints: Sequence[CheckpointUsage]) -> Table:
    short = texts.short_ids(one.id for one in checkpoints)
    numbers = ("step", "in all", "own", "borrowed", "only")
    made = table("id", *numbers, "roles", right=numbers, drop=("own", "borrowed", "step"), fold=("roles",))
    for one in checkpoints:
        sizes = (_size(count) for count in (one.bytes, one.own_bytes, one.borrowed_bytes, one.only_bytes))
        made.add_row(short[one.id], str(one.step), *sizes, plain(", ".join(one.roles)))
    return made


def _rules(keep: KeepUsage) -> Iterator[RenderableType]:
    made = table("rule", "keeps", "in all", "only", right=("keeps", "in all", "only"), drop=("keeps",), fold=("rule",))
    for rule in keep.rules:
        made.add_row(plain(rule.rule), str(rule.checkpoints), texts.size_text(rule.bytes), _size(rule.only_bytes))
    if keep.always_bytes:
        made.add_row("(newest, held, lent, damaged)", "", "", _size(keep.always_bytes))
    yield made
    stay = f"{texts.count_text(keep.stay, 'checkpoint')}, {texts.size_text(keep.stay_bytes)}, would stay"
    yield f"{stay}; {texts.count_text(keep.go, 'checkpoint')} would go, and free {texts.size_text(keep.freed_bytes)}"


def _size(count: int) -> str:
    """Bytes; a dash for none, and a minus for what makes room."""
    return "-" if not count else texts.size_text(count) if count > 0 else f"-{texts.size_text(-count)}"
