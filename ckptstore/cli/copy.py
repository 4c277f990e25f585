"""``ckptstore copy``: checkpoints to another place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from ckptstore.cli import texts
from ckptstore.cli.access import looking
from ckptstore.cli.outcome import BAD_NEWS
from ckptstore.cli.terminal import answer, byte_progress, emit, json_option

if TYPE_CHECKING:
    from ckptstore.maintenance.copy import CopyReport


@click.command()
@click.argument("source")
@click.argument("target")
@click.option("--select", multiple=True, metavar="SELECTOR", help="Only this one; may be given several times.")
@json_option
@click.pass_context
def copy(ctx: click.Context, source: str, target: str, select: tuple[str, ...], as_json: bool) -> None:
    """Copy checkpoints from SOURCE to TARGET, both as URL.

    Each keeps its id. Every block is proven before it is sent, and again when it has arrived, by the server's own
    checksum or by reading it back. What is there already isn't copied again, so a copy that was broken off is taken
    up by the same command. TARGET must be empty, or a copy of the same store; nothing there is ever removed.

    \b
      ckptstore copy runs/gpt2 s3://bucket/gpt2
      ckptstore copy s3://bucket/gpt2 /ssd/gpt2 --select latest --select best:val_loss

    Exit codes: 0 all copied; 1 some are damaged at SOURCE and were left out, or no such checkpoint; 2 no store at
    SOURCE, another one at TARGET, a storage failed or wrong use.
    """
    with looking(source) as (store, _), byte_progress("copying") as progress:
        report = store.copy(target, select, progress=progress)
    if as_json:
        emit(_document(report))
    else:
        answer(*_lines(report))
    if not report.ok:
        ctx.exit(BAD_NEWS)


def _document(report: CopyReport) -> dict[str, object]:
    return {
        "ok": report.ok,
        "checkpoints": [{"id": c.id, "step": c.step, "copied": c.id not in report.found} for c in report.checkpoints],
        "damages": [texts.damage_fields(damage) for damage in report.damages],
        "written_bytes": report.written_bytes,
        "seconds": report.seconds,
    }


def _lines(report: CopyReport) -> Iterator[str]:
    for checkpoint in report.checkpoints:
        what = "was there" if checkpoint.id in report.found else "copied"
        yield f"{what} {checkpoint.id} ({texts.size_text(checkpoint.stored_bytes)})"
    yield from (f"NOT COPIED {damage.id}: {damage.problem}" for damage in report.damages)
    copied = len(report.checkpoints) - len(report.found)
    parts = [
        f"{texts.count_text(copied, 'checkpoint')} copied",
        f"{len(report.found)} there already" if report.found else "",
        f"{len(report.damages)} damaged" if report.damages else "",
        f"{texts.size_text(report.written_bytes)} written",
        f"{report.seconds:.2f} s",
        texts.rate_text(report.written_bytes, report.seconds),
    ]
    yield ("good: " if report.ok else "DAMAGED: ") + ", ".join(filter(None, parts))
