"""``ckptstore signal``: ask a running job, from outside, to save or to stop."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ckptstore.cli.access import changing
from ckptstore.cli.outcome import BAD_NEWS, CommandError
from ckptstore.cli.terminal import answer, emit, json_option
from ckptstore.cli.units import duration_s
from ckptstore.units import duration_text

if TYPE_CHECKING:
    from ckptstore.engine.control import Action


@click.command()
@click.argument("url")
@click.argument("action", type=click.Choice(["save", "stop"]), metavar="save|stop")
@click.option(
    "--wait", type=duration_s, metavar="TIME", help="Wait until the run takes it up: 90s, 10m. Else take it back."
)
@json_option
def signal(url: str, action: Action, wait: float | None, as_json: bool) -> None:
    """Ask the run that saves at URL to save, or to stop.

    "save" has it save after the step that runs now and go on, "stop" has it save and end. A run looks for such
    requests from time to time, heeds those made since it began, and goes on owning the store.

    Without --wait the command only asks: the request lies there until the run, or the next one that begins, has seen
    it. With --wait it returns as soon as the run has taken it up, which is before the checkpoint is there.

    \b
      ckptstore signal runs/gpt2 save
      ckptstore signal s3://bucket/runs/gpt2 stop --wait 10m

    Exit codes: 0 asked, with --wait taken up; 1 asked already and not answered, or nobody took it up; 2 no store at
    URL, the storage failed or wrong use.
    """
    with changing(url) as store:
        taken_up = store.signal(action, wait=wait)
    if wait is not None and not taken_up:
        raise CommandError(
            f"no run at {url} has taken up the request to {action} within {duration_text(wait)}; it is taken back",
            code="unanswered",
            exit_code=BAD_NEWS,
        )
    if as_json:
        emit({"asked": action, "taken_up": taken_up if wait is not None else None})
    else:
        answer(f"the run takes up the request to {action}" if taken_up else f"asked the run at {url} to {action}")
