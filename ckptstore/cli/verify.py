"""``ckptstore verify``: is every byte as it was saved?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from typing import TYPE_CHECKING

import click

from ckptstore.cli import texts
from ckptstore.cli.access import backup_option, changing, looking
from ckptstore.cli.outcome import BAD_NEWS
from ckptstore.cli.terminal import answer, byte_progress, emit, json_option
from ckptstore.cli.units import share
from ckptstore.errors import CheckpointError

if TYPE_CHECKING:
    from ckptstore.engine.catalogue import Damage
    from ckptstore.maintenance.verifications import Tally
    from ckptstore.maintenance.verify import VerifyReport
    from ckptstore.store import Store

_TENSORS_SHOWN = 3


@click.command()
@click.argument("url")
@click.argument("selector", required=False)
@click.option("--sample", type=share, default="100%", metavar="SHARE", help="Read a share of the blocks: 10%, 0.1.")
@click.option("--repair", is_flag=True, help="Replace what is damaged by what a --backup has.")
@click.option("--record/--no-record", default=True, help="Put down in the store what came of it.", show_default=True)
@backup_option
@json_option
@click.pass_context
def verify(
    ctx: click.Context,
    url: str,
    selector: str | None,
    sample: float,
    repair: bool,
    record: bool,
    backups: tuple[str, ...],
    as_json: bool,
) -> None:
    """Prove that every byte at URL is as it was saved.

    Reads every block of every checkpoint (or of the one selected), compares its hash, and names each damaged
    block, its file and the tensors in it. Without SELECTOR it also names saves that run now or were killed, which
    is no damage, and objects that aren't ckptstore's. It changes no checkpoint but with --repair, and needs no PyTorch.
    --sample picks the blocks at random; all records are read anyway. Where the store can be written to, what came of
    it is put down there for "ckptstore ls", as one small record, of which the last 20 stay.

    \b
      ckptstore verify runs/gpt2
      ckptstore verify runs/gpt2 latest
      ckptstore verify runs/gpt2 --sample 10%
      ckptstore verify runs/gpt2 --repair --backup s3://bucket/gpt2

    Exit codes: 0 all good, also where all damage was repaired; 1 damage found, or no such checkpoint; 2 no store at
    URL, the storage can't be read or wrong use.
    """
    if repair and not backups:
        raise click.UsageError("--repair needs a --backup URL to repair from")
    with _opened(url, backups, repair) as store, byte_progress("verifying") as progress:
        report = store.verify(selector, sample=sample, repair=repair, record=record, progress=progress)
        if record and not repair:
            _put_down(url, store, report.tally(whole=selector is None))
    if as_json:
        emit(_document(store.url, report))
    else:
        answer(*_lines(report, url))
    if not report.ok:
        ctx.exit(BAD_NEWS)


@contextmanager
def _opened(url: str, backups: Sequence[str], repair: bool) -> Iterator[Store]:
    if repair:
        with changing(url, backups) as store:
            yield store
    else:
        with looking(url, backups) as (store, _):
            yield store


def _put_down(url: str, store: Store, found: Tally) -> None:
    """Have the store remember it, if it can be written to; for the rest it is open for reading only."""
    from ckptstore.maintenance.verifications import remember
    from ckptstore.storage import open_storage

    with suppress(CheckpointError), closing(open_storage(url)) as storage:
        # Where it is lost and a backup stands in for it, nothing shall appear in its place.
        if storage.url == store.url:
            remember(storage, found)


def _document(url: str, report: VerifyReport) -> dict[str, object]:
    return {
        "url": url,
        "ok": report.ok,
        "checkpoints": [
            {
                "id": one.checkpoint.id,
                "step": one.checkpoint.step,
                "ok": one.ok,
                "read_bytes": one.read_bytes,
                "damages": [texts.damage_fields(damage) for damage in one.damages],
            }
            for one in report.checkpoints
        ],
        "repaired": [texts.damage_fields(damage) for damage in report.repaired],
        "records": [texts.damage_fields(damage) for damage in report.records],
        "leftovers": [
            {"id": left.id, "keys": list(left.keys), "stored_bytes": left.stored_bytes} for left in report.leftovers
        ],
        "foreign": list(report.foreign),
        "sample": report.sample,
        "read_bytes": report.read_bytes,
        "seconds": report.seconds,
    }


def _lines(report: VerifyReport, url: str) -> Iterator[str]:
    for damage in report.repaired:
        yield f"REPAIRED {damage.problem.partition('; it holds ')[0]}"
    for damage in report.damages:
        yield from _damage_lines(damage)
    bad = [one.checkpoint.id for one in report.checkpoints if not one.ok]
    if bad:
        id = bad[0] if len(bad) == 1 else "ID"
        yield f"  copy the damaged files back from elsewhere, or: ckptstore delete {url} {id}"
    for left in report.leftovers:
        what = f"{texts.count_text(len(left.keys), 'object')}, {texts.size_text(left.stored_bytes)}"
        yield f"unfinished: {left.id or left.keys[0]} ({what})"
    if report.leftovers:
        yield f"  no damage: a save that runs now, or was killed; of killed ones collected by: ckptstore prune {url}"
    yield from (f"not ckptstore's, left alone: {key}" for key in report.foreign)
    yield _summary(report)


def _damage_lines(damage: Damage) -> Iterator[str]:
    # An error's text has to name the tensors by itself; here they have a line of their own.
    problem = damage.problem.partition("; it holds ")[0] if damage.tensors else damage.problem
    yield f"DAMAGED {problem}" if damage.key in problem else f"DAMAGED {damage.key}: {problem}"
    if damage.id is not None and damage.id not in problem:
        yield f"  checkpoint {damage.id}"
    if damage.tensors:
        shown = ", ".join(damage.tensors[:_TENSORS_SHOWN])
        more = len(damage.tensors) - _TENSORS_SHOWN
        yield f"  with {shown}" + (f" and {more} more (--json names all)" if more > 0 else "")


def _summary(report: VerifyReport) -> str:
    bad = sum(not one.ok for one in report.checkpoints)
    parts = [
        texts.count_text(len(report.checkpoints), "checkpoint"),
        f"{bad} damaged" if bad else "",
        f"{texts.count_text(len(report.repaired), 'damage')} repaired" if report.repaired else "",
        texts.count_text(len(report.records), "damaged record") if report.records else "",
        f"{texts.size_text(report.read_bytes)} read",
        f"a sample of {report.sample:.4g}" if report.sample < 1 else "",
        f"{report.seconds:.2f} s",
        texts.rate_text(report.read_bytes, report.seconds),
    ]
    return ("good: " if report.ok else "DAMAGED: ") + ", ".join(filter(None, parts))
