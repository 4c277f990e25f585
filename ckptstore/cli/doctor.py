"""``ckptstore doctor``: can checkpoints be trusted to this storage?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from ckptstore.cli import texts
from ckptstore.cli.outcome import BAD_NEWS, CommandError
from ckptstore.cli.terminal import answer, emit, json_option, plain, round_progress, table
from ckptstore.cli.units import size_bytes
from ckptstore.errors import NotFoundError

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from ckptstore.maintenance.receipts import Lag
    from ckptstore.tools.blocks import Speed
    from ckptstore.tools.doctor import Report

_TITLES = {
    "exclusive_create": "of many racers for a name one wins",
    "atomic_create": "a record is whole or not there",
    "read_after_write": "what was written is read",
    "list_after_write": "what was written is listed",
    "delete": "what was deleted is gone, nothing else",
    "read_ranges": "parts of an object can be read",
    "refuse_existing": "what exists is refused",
    "process_end": "survives the end of the process",
    "power_cut": "survives a power cut",
}

_DURABILITY = {
    "power-cut": "what was acknowledged survives a power cut",
    "process-crash": "what was acknowledged survives the end of the process, but not that of the machine",
    "none": "what was acknowledged is gone when the process ends",
}

_DIRECT_IO = {
    "used": "direct: blocks bypass the page cache",
    "refused": "buffered: {kind} refuses direct I/O, so blocks go through the page cache",
    "not asked": "buffered: {kind} isn't asked for direct I/O",
    "no file system": "requests over the network: {kind} is no file system",
}

_DAMAGED = {
    True: "refused there, by a checksum that is sent along",
    False: "noticed when it is read back, as every block and record has a hash",
}


@click.command()
@click.argument("url")
@click.option(
    "--size", type=size_bytes, default="256MB", show_default=True, metavar="SIZE", help="Of the blocks: 1GiB."
)
@json_option
@click.pass_context
def doctor(ctx: click.Context, url: str, size: int, as_json: bool) -> None:
    """Tell whether checkpoints are safe at URL.

    Tries what ckptstore relies on: races of 16 threads for one name, small objects created, read, listed and
    deleted, what exists refused. Then measures: the latency of a small durable creation, and blocks of 16 MiB (random
    bytes, --size in all) written durably and read cold, with 1, 2 and 4 in flight, over the network with 1, 4, 8 and
    16. What survives a power cut can't be tried; there the storage is asked.

    There need be no store at URL; where there is no folder either, the nearest one above it is tried, but a bucket
    must be there. All goes into doctor-... there and is removed afterwards, also after Ctrl-C. Needs free space of 2
    times --size, and no PyTorch. Over the network 4 times --size go each way. Where a store lies at URL, it also tells
    how far its backups are behind.

    \b
      ckptstore doctor /mnt/checkpoints
      ckptstore doctor runs --size 1GB --json
      ckptstore doctor s3://bucket/runs

    Exit codes: 0 all promises hold; 1 some don't; 2 URL can't be reached or written to, or can't do what nothing
    works without, too little space or wrong use.
    """
    from ckptstore.tools.doctor import examine

    try:
        with round_progress() as progress:
            report = examine(url, size, progress)
    except NotFoundError as error:
        raise CommandError(str(error), code=error.code) from error
    lags = _lags(url)
    if as_json:
        emit(_document(url, report) | {"backups": [texts.lag_fields(lag) for lag in lags]})
    else:
        answer(*_parts(report), *map(texts.lag_text, lags))
    if not report.ok:
        ctx.exit(BAD_NEWS)


def _lags(url: str) -> list[Lag]:
    """How far the backups of the store at ``url`` are behind, if there is one."""
    from ckptstore.opening import open

    try:
        with open(url, read_only=True) as store:
            return store.lags()
    except NotFoundError:
        return []


def _document(url: str, report: Report) -> dict[str, Any]:
    return {
        "url": url,
        "place": report.place,
        "kind": report.kind,
        "ok": report.ok,
        "promises": [{"name": it.name, "holds": it.holds, "detail": it.detail} for it in report.promises],
        "consequences": list(report.consequences),
        "durability": report.durability,
        "checks_writes": report.checks_writes,
        "direct_io": report.direct_io,
        "free_bytes": report.free_bytes,
        "create": {
            "seconds": list(report.create_s),
            "median_s": report.create_median_s,
            "min_s": min(report.create_s),
            "max_s": max(report.create_s),
        },
        "size_bytes": report.size_bytes,
        "blocks": [_speed_fields(speed, report.size_bytes) for speed in report.speeds],
    }


def _speed_fields(speed: Speed, size: int) -> dict[str, Any]:
    return {
        "in_flight": speed.in_flight,
        "write_s": speed.write_s,
        "write_gb_s": size / speed.write_s / 1e9,
        "read_s": speed.read_s,
        "read_gb_s": None if speed.read_s is None else size / speed.read_s / 1e9,
    }


def _parts(report: Report) -> Iterator[RenderableType]:
    yield f"tried in {report.place}"
    yield ""
    yield _promises(report)
    yield ""
    yield _figures(report)
    yield ""
    yield _speeds(report)
    yield f"{texts.size_text(report.size_bytes)} in blocks of 16 MiB; written until durable, read cold"
    yield ""
    yield _summary(report)
    yield from (f"  {consequence}" for consequence in report.consequences)


def _promises(report: Report) -> Table:
    made = table("promise", "answer", "what was seen", fold=("promise", "what was seen"))
    for it in report.promises:
        style = "" if it.holds else "red"
        made.add_row(_TITLES[it.name], "holds" if it.holds else "doesn't hold", plain(it.detail), style=style)
    return made


def _figures(report: Report) -> Table:
    low, high = min(report.create_s) * 1e3, max(report.create_s) * 1e3
    latency = f"{report.create_median_s * 1e3:.3g} ms ({low:.3g} to {high:.3g})"
    made = table("storage", "", fold=("",))
    made.add_row("kind", plain(report.kind))
    made.add_row("durability", f"{report.durability}: {_DURABILITY[report.durability]}")
    made.add_row("I/O", plain(_DIRECT_IO[report.direct_io].format(kind=report.kind)))
    made.add_row("damage on the way", _DAMAGED[report.checks_writes])
    made.add_row("free space", "not known" if report.free_bytes is None else texts.size_text(report.free_bytes))
    made.add_row("small durable creation", f"{latency}, median of {len(report.create_s)}")
    return made


def _speeds(report: Report) -> Table:
    columns = ("in flight", "write", "read")
    made = table(*columns, right=columns)
    for speed in report.speeds:
        read = "-" if speed.read_s is None else texts.rate_text(report.size_bytes, speed.read_s)
        made.add_row(str(speed.in_flight), texts.rate_text(report.size_bytes, speed.write_s), read)
    return made


def _summary(report: Report) -> str:
    broken = [_TITLES[it.name] for it in report.promises if not it.holds]
    if not broken:
        return f"good: all {len(report.promises)} promises hold"
    holds = "doesn't hold" if len(broken) == 1 else "don't hold"
    return f"BAD NEWS: {len(broken)} of {len(report.promises)} promises {holds}: {'; '.join(broken)}"
