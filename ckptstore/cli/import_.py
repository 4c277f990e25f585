"""``ckptstore import``: what other programs have saved becomes checkpoints of a store."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from ckptstore.cli import texts
from ckptstore.cli.outcome import BAD_NEWS, fields_of
from ckptstore.cli.terminal import answer, byte_progress, emit, json_option

if TYPE_CHECKING:
    from ckptstore.tools.importing.run import Imported, ImportReport

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", re.ASCII)
_NAMED = 8
"""Of what was left out; --json names all."""


def _metric(text: str) -> tuple[str, float]:
    """``val_loss=3.1``."""
    name, _, number = text.partition("=")
    if not name or _NUMBER.fullmatch(number) is None:
        raise click.BadParameter(f"{text!r} must be NAME=NUMBER, as val_loss=3.1")
    return name, float(number)


@click.command("import")
@click.argument("source")
@click.argument("url")
@click.option("--step", type=click.IntRange(0, 10**15 - 1), metavar="N", help="Completed steps, where nothing tells.")
@click.option("--epoch", type=click.IntRange(0, 10**15 - 1), metavar="N", help="Completed epochs, likewise.")
@click.option("--metric", "metrics", type=_metric, multiple=True, metavar="NAME=NUMBER", help="One more; repeatable.")
@click.option("--only", multiple=True, metavar="PATTERN", help="Only what matches, as 'model/*'; repeatable.")
@click.option("--only-latest", is_flag=True, help="Of many checkpoints, only the newest.")
@click.option("--without-refused", is_flag=True, help="Leave out what only running code could make.")
@click.option("--again", is_flag=True, help="Also what was imported before.")
@click.option("--dry-run", is_flag=True, help="Only tell what would be imported.")
@json_option
@click.pass_context
def import_(
    ctx: click.Context,
    source: str,
    url: str,
    step: int | None,
    epoch: int | None,
    metrics: tuple[tuple[str, float], ...],
    only: tuple[str, ...],
    only_latest: bool,
    without_refused: bool,
    again: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Import the checkpoints of other programs at SOURCE into URL.

    SOURCE is a file or folder: .pt, .pth, .bin or .ckpt of torch.save or Lightning, safetensors, a sharded model, a
    torch.distributed.checkpoint, or a run of the Hugging Face Trainer, of Accelerate or of a program that saves
    checkpoint-N folders. Steps, epochs and metrics that are recorded there are kept, and the newest becomes the latest.
    Nothing in SOURCE runs: pickles are read as data only, in a process of their own that may do nothing but read. What
    is imported already isn't imported twice. SOURCE is never changed. It takes over the store as any save does: stop a
    run that still saves at URL first.

    \b
      ckptstore import checkpoints/latest.pt runs/gpt2
      ckptstore import output/ s3://bucket/gpt2 --dry-run
      ckptstore import model.safetensors runs/gpt2 --step 1000 --metric val_loss=3.1
      ckptstore import last.ckpt runs/gpt2 --without-refused

    Exit codes: 0 all is in the store; 1 some couldn't be imported, or nothing is there; 2 SOURCE would need code to
    run, is malformed or tells no step, a storage failed, or wrong use.
    """
    from ckptstore.opening import open
    from ckptstore.tools.importing.run import import_from

    with open(url) as store, byte_progress("importing") as progress:
        report = import_from(
            source,
            store,
            step=step,
            epoch=epoch,
            metrics=dict(metrics),
            only=only or None,
            only_latest=only_latest,
            without_refused=without_refused,
            again=again,
            dry_run=dry_run,
            progress=progress,
        )
    if as_json:
        emit(_document(report))
    else:
        answer(*_lines(report, dry_run))
    if not report.ok:
        ctx.exit(BAD_NEWS)


def _document(report: ImportReport) -> dict[str, object]:
    from ckptstore.format.records import metric

    return {
        "ok": report.ok,
        "checkpoints": [
            {
                "path": str(item.path),
                "kind": item.kind,
                "step": item.step,
                "epoch": item.epoch,
                "metrics": {name: metric(value) for name, value in item.metrics.items()},
                "id": None if item.checkpoint is None else item.checkpoint.id,
                "was_there": item.was_there,
                "left_out": dict(item.left_out),
                "error": None if item.problem is None else fields_of(item.problem),
            }
            for item in report.items
        ],
        "seconds": report.seconds,
    }


def _lines(report: ImportReport, dry_run: bool) -> Iterator[str]:
    for item in report.items:
        yield from _item_lines(item, dry_run)
    new, there = len(report.checkpoints), sum(item.was_there for item in report.items)
    failed = sum(item.problem is not None for item in report.items)
    would = len(report.items) - there - failed
    parts = [
        f"{texts.count_text(would, 'checkpoint')} would be imported" if dry_run else "",
        "" if dry_run else f"{texts.count_text(new, 'checkpoint')} imported",
        f"{there} there already" if there else "",
        f"{failed} not imported" if failed else "",
        f"{texts.size_text(sum(c.raw_bytes for c in report.checkpoints))}" if new else "",
        f"{report.seconds:.2f} s",
    ]
    yield ("good: " if report.ok else "NOT ALL: ") + ", ".join(filter(None, parts))


def _item_lines(item: Imported, dry_run: bool) -> Iterator[str]:
    if item.problem is not None:
        yield f"NOT IMPORTED {item.path}: {item.problem}"
        return
    what = "was there" if item.was_there else "would import" if dry_run else "imported"
    facts = [f"step {item.step}", "" if item.epoch is None else f"epoch {item.epoch}"]
    facts.append(texts.metrics_text(item.metrics))
    id = "" if item.checkpoint is None else f" as {item.checkpoint.id}"
    yield f"{what} {item.path} ({item.kind}; {', '.join(filter(None, facts))}){id}"
    for name, why in list(item.left_out.items())[:_NAMED]:
        yield f"  without {name}: {why}"
    if len(item.left_out) > _NAMED:
        yield f"  and without {len(item.left_out) - _NAMED} more (--json names all)"
