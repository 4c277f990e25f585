"""``ckptstore ls``: what is there, newest last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import click

from ckptstore.cli import texts
from ckptstore.cli.access import backup_option, looking
from ckptstore.cli.outcome import BAD_NEWS
from ckptstore.cli.terminal import answer, emit, json_option, note, plain, table

if TYPE_CHECKING:
    from rich.table import Table

    from ckptstore.engine.catalogue import Catalogue, Checkpoint, Damage
    from ckptstore.format.layout import CheckpointId
    from ckptstore.maintenance.receipts import Lag
    from ckptstore.maintenance.verifications import Verification


_ALWAYS = ("id", "step", "created", "size")
_COLUMNS = ("id", "step", "epoch", "created", "size", "marks", "metrics", "reasons")


class _Row(NamedTuple):
    """A line of the list: a checkpoint, or the damage where its record should be."""

    order: CheckpointId
    status: str
    checkpoint: Checkpoint | None
    damage: Damage | None = None


@click.command()
@click.argument("url")
@click.option("--deleted", is_flag=True, help="Also those in the trash, which undelete can bring back.")
@click.option("--last", type=click.IntRange(min=1), metavar="N", help="Only the newest N.")
@backup_option
@json_option
@click.pass_context
def ls(ctx: click.Context, url: str, deleted: bool, last: int | None, backups: tuple[str, ...], as_json: bool) -> None:
    """List the checkpoints at URL, the newest last.

    Answers which checkpoints exist: what was committed and not deleted. Reads the commit records only, so it
    is quick; whether the data is good, "ckptstore verify" tells. The id is shown as short as it can be; --json
    has all of it. Where the store is copied to backups, a line for each tells how far it is behind; with --backup,
    what lies only there is listed too. The last line tells when it was verified last, and what came of it.

    \b
      ckptstore ls runs/gpt2
      ckptstore ls runs/gpt2 --last 5
      ckptstore ls runs/gpt2 --json | jq -r '.checkpoints[-1].id'

    Exit codes: 0 good; 1 a commit record is damaged (its row says so); 2 no store at URL or wrong use.
    """
    with looking(url, backups) as (store, catalogue):
        holds, lags, verified = store.holds(), store.lags(), _last(store.verifications())
    short = texts.short_ids(str(row.order) for row in _rows(catalogue, deleted=True))
    rows = _rows(catalogue, deleted)[-last if last else None :]
    if as_json:
        verification = texts.verification_fields(verified) if verified is not None else None
        emit({**_document(store.url, rows, short, holds, lags, catalogue), "last_verification": verification})
    else:
        foot = [] if verified is None else [texts.verification_text(verified, _since(verified, catalogue))]
        answer(_table(rows, short, holds, catalogue), *map(texts.lag_text, lags), *foot)
    if catalogue.damaged:
        damaged = texts.count_text(len(catalogue.damaged), "commit record")
        note(f"{damaged} damaged; 'ckptstore verify {url}' says what is wrong")
        ctx.exit(BAD_NEWS)


def _last(found: Sequence[Verification]) -> Verification | None:
    """The last verification of all that lies there, or else of one checkpoint."""
    return next((one for one in found if one.id is None), found[0] if found else None)


def _since(verified: Verification, catalogue: Catalogue) -> int:
    """How many checkpoints were saved since."""
    from ckptstore.format.layout import try_id

    newest = try_id(verified.newest or "")
    return sum(newest is None or c.order > newest for c in catalogue.checkpoints)


def _rows(catalogue: Catalogue, deleted: bool) -> list[_Row]:
    from ckptstore.format.layout import parse_id

    rows = [_Row(c.order, "good", c) for c in catalogue.checkpoints]
    rows += [_Row(parse_id(d.id), "damaged", None, d) for d in catalogue.damaged if d.id]
    rows += [_Row(c.order, "deleted", c) for c in catalogue.buried if deleted]
    return sorted(rows, key=lambda row: row.order)


def _document(
    url: str,
    rows: list[_Row],
    short: Mapping[str, str],
    holds: Mapping[str, str],
    lags: Sequence[Lag],
    catalogue: Catalogue,
) -> dict[str, object]:
    def of(status: str) -> list[dict[str, object]]:
        found = ((row.checkpoint, row.order) for row in rows if row.status == status)
        return [
            {"short": short[str(id)], **texts.checkpoint_fields(c, holds), "only_in": _only_in(c, catalogue)}
            for c, id in found
            if c is not None
        ]

    damaged = [texts.damage_fields(row.damage) for row in rows if row.damage is not None]
    backups = [texts.lag_fields(lag) for lag in lags]
    return {
        "url": url,
        "checkpoints": of("good"),
        "deleted": of("deleted"),
        "damaged": damaged,
        "backups": backups,
    }


def _only_in(checkpoint: Checkpoint, catalogue: Catalogue) -> str | None:
    """The backup that it lies in, where it lies nowhere else."""
    home = catalogue.elsewhere.get(checkpoint.id)
    return home.url if home is not None else None


def _table(rows: list[_Row], short: Mapping[str, str], holds: Mapping[str, str], catalogue: Catalogue) -> Table:
    from rich.text import Text

    lines = [_cells(row, short[str(row.order)], holds, catalogue) for row in rows]
    # What no checkpoint here has takes no room.
    used = [name for name in _COLUMNS if name in _ALWAYS or any(line.get(name) for line in lines)]
    made = table(*used, right=("step", "epoch", "size"), fold=("marks", "metrics", "reasons"))
    for row, line in zip(rows, lines, strict=True):
        style = {"good": "", "deleted": "dim", "damaged": "red"}[row.status]
        made.add_row(*(Text(plain(line.get(name, ""))) for name in used), style=style)
    return made


def _cells(row: _Row, short: str, holds: Mapping[str, str], catalogue: Catalogue) -> dict[str, str]:
    marks = [] if row.status == "good" else [row.status]
    if row.checkpoint is not None and (place := _only_in(row.checkpoint, catalogue)):
        marks.append(f"only in {place}")
    marks += [f"held: {name}" for name in texts.holds_of(str(row.order), holds)]
    known = {"id": short, "step": str(row.order.step), "marks": ", ".join(marks)}
    if row.checkpoint is None:
        return known
    return known | {
        "epoch": "" if row.checkpoint.epoch is None else str(row.checkpoint.epoch),
        "created": texts.time_text(row.checkpoint.created),
        "size": texts.size_text(row.checkpoint.stored_bytes),
        "metrics": texts.metrics_text(row.checkpoint.metrics),
        "reasons": ", ".join(row.checkpoint.reasons),
    }
