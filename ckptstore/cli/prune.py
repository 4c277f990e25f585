"""``ckptstore prune``: free the space of what was deleted and of what killed saves left."""

from __future__ import annotations

import click

from ckptstore.cli import texts
from ckptstore.cli.access import changing
from ckptstore.cli.terminal import answer, emit, json_option
from ckptstore.cli.units import duration_s


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
@json_option
def prune(url: str, grace: float, as_json: bool) -> None:
    """Free the space of what was deleted and of killed saves.

    Removes the data of checkpoints that were deleted more than --grace ago; they can't be brought back then. What
    killed saves left goes at once where a newer run has opened the store since, else after --grace, because the
    save may still be running. A checkpoint that exists is never touched.

    \b
      ckptstore prune runs/gpt2
      ckptstore prune runs/gpt2 --grace 1h

    Exit codes: 0 done, also if there was nothing to do; 2 no store at URL, the storage failed or wrong use.
    """
    with changing(url) as store:
        report = store.prune(grace_s=grace)
    if as_json:
        emit({
            "reclaimed": list(report.reclaimed),
            "leftovers": list(report.leftovers),
            "spared": list(report.spared),
            "freed_bytes": report.freed_bytes,
            "uploads": list(report.uploads),
        })  # fmt: skip
        return
    lines = [f"reclaimed {id}, which was deleted" for id in report.reclaimed]
    lines += [f"removed what a killed save left of {id}" for id in report.leftovers]
    lines += [f"left alone {id}: its save may still be running (see --grace)" for id in report.spared]
    lines += [f"dropped the unfinished upload of {key}" for key in report.uploads]
    answer(*lines, f"freed {texts.size_text(report.freed_bytes)}")
