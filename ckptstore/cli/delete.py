"""``ckptstore delete`` and ``ckptstore undelete``: into the trash and out of it."""

from __future__ import annotations

import sys

import click

from ckptstore.cli import texts
from ckptstore.cli.access import changing
from ckptstore.cli.outcome import BAD_NEWS, CommandError
from ckptstore.cli.terminal import answer, emit, json_option


@click.command()
@click.argument("url")
@click.argument("selector")
@click.option("--yes", "-y", is_flag=True, help="Don't ask. Needed where nobody can be asked.")
@json_option
def delete(url: str, selector: str, yes: bool, as_json: bool) -> None:
    """Put a checkpoint into the trash.

    It no longer exists for any reader, and "ckptstore undelete" brings it back. Its space is not free before
    "ckptstore prune" reclaims it, by default after 24 hours. A held checkpoint is not deleted.

    \b
      ckptstore delete runs/gpt2 step:1000
      ckptstore delete runs/gpt2 0001-000042 --yes

    Exit codes: 0 deleted; 1 no such checkpoint, held, or you said no; 2 nobody to ask and no --yes, no store at
    URL or wrong use.
    """
    with changing(url) as store:
        checkpoint = store.resolve(selector)
        if not yes:
            _ask(texts.one_line(checkpoint))
        # By its id: while somebody thinks, "latest" may become another one.
        store.delete(checkpoint.id)
    if as_json:
        emit({"deleted": checkpoint.id, "step": checkpoint.step, "stored_bytes": checkpoint.stored_bytes})
    else:
        answer(f"deleted {texts.one_line(checkpoint)}", f"back with: ckptstore undelete {url} {checkpoint.id}")


def _at_terminal() -> bool:
    return sys.stdin.isatty()


def _ask(what: str) -> None:
    if not _at_terminal():
        raise click.UsageError(f"this would delete {what}. There is no terminal to ask at: add --yes to delete it.")
    if not click.confirm(f"Delete {what}?", err=True):
        raise CommandError("nothing was deleted", code="declined", exit_code=BAD_NEWS)


@click.command()
@click.argument("url")
@click.argument("id")
@json_option
def undelete(url: str, id: str, as_json: bool) -> None:
    """Bring the deleted checkpoint ID back from the trash.

    ID is an id or the beginning of one; "ckptstore ls --deleted" shows them.

    \b
      ckptstore ls runs/gpt2 --deleted
      ckptstore undelete runs/gpt2 0001-000042

    Exit codes: 0 it is back; 1 it isn't in the trash, or was reclaimed already; 2 ID names several, no store at
    URL or wrong use.
    """
    with changing(url) as store:
        checkpoint = store.undelete(id)
    if as_json:
        emit({"undeleted": checkpoint.id, "step": checkpoint.step})
    else:
        answer(f"back again: {texts.one_line(checkpoint)}")
