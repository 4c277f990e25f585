"""``ckptstore report``: everything about a store on one page."""

from __future__ import annotations

from pathlib import Path

import click

from ckptstore.cli import texts
from ckptstore.cli.access import backup_option, looking
from ckptstore.cli.outcome import BAD_NEWS, CommandError
from ckptstore.cli.prune import rules_of
from ckptstore.cli.terminal import emit, json_option, note, working

_STDOUT = "-"


@click.command()
@click.argument("url")
@click.option("-o", "--output", metavar="FILE", help="Where the page goes, as report.html; - for stdout.")
@click.option("--keep", metavar="RULES", help='Tell what goes under these rules: "last(10) | best(val_loss)".')
@click.option("--config", metavar="FILE", help="The same with the rules of a config.")
@click.option("--force", is_flag=True, help="Replace FILE also where it is something else than a report.")
@backup_option
@json_option
@click.pass_context
def report(
    ctx: click.Context,
    url: str,
    output: str | None,
    keep: str | None,
    config: str | None,
    force: bool,
    backups: tuple[str, ...],
    as_json: bool,
) -> None:
    """Write one page about all checkpoints at URL.

    It shows when and why each was saved and by whom, where a run went back, metrics, sizes and speed, how far backups
    are behind, what is damaged or unfinished, and with --keep or --config what those rules would give up. The page is
    one HTML file that needs no network; a browser shows it, also on a phone. Only the small records of the store are
    read, no data. An older report in FILE is replaced.

    With --json what the page shows goes to stdout, and a page is written only with --output. Needs plotly and jinja2:
    pip install 'ckptstore[report]'.

    \b
      ckptstore report runs/gpt2 -o report.html
      ckptstore report s3://bucket/runs/gpt2 -o report.html --keep "last(10) | best(val_loss)"
      ckptstore report runs/gpt2 --json | jq '.summary'

    Exit codes: 0 written; 1 a record is damaged (the page says which), or FILE is something else; 2 no store at URL,
    FILE can't be written, or wrong use.
    """
    if output is None and not as_json:
        raise click.UsageError("say where the page goes: -o report.html, or -o - for stdout")
    if output == _STDOUT and as_json:
        raise click.UsageError("--json and -o - both go to stdout: give another FILE")
    rules = rules_of(keep, config)
    from ckptstore.tools.report import check_libraries, check_target, page, write_page
    from ckptstore.tools.reportdata import document
    from ckptstore.tools.survey import survey

    path = None if output in (None, _STDOUT) else Path(str(output))
    if output is not None:
        # Before anything is read, which may take a while.
        try:
            check_libraries()
        except ImportError as error:
            raise CommandError(str(error), code="no_plotly") from error
    if path is not None:
        check_target(path, force=force)
    with working("reading records"), looking(url, backups) as (store, _):
        shown = document(survey(store, keep=rules))
    if path is not None:
        write_page(path, page(shown), force=force)
    elif output is not None:
        click.echo(page(shown), nl=False)
    if as_json:
        emit(shown | {"written": output})
    elif path is not None:
        summary = shown["summary"]
        what = f"{texts.count_text(summary['checkpoints'], 'checkpoint')}, {texts.size_text(path.stat().st_size)}"
        note(f"the report went into {path} ({what})")
    if shown["damaged"]:
        note(f"{texts.count_text(len(shown['damaged']), 'record')} damaged; the report says which")
        ctx.exit(BAD_NEWS)
