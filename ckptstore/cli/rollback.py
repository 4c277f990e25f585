"""``ckptstore rollback``: an older checkpoint becomes the latest again."""

from __future__ import annotations

import click

from ckptstore.cli import texts
from ckptstore.cli.access import backup_option, changing
from ckptstore.cli.terminal import answer, byte_progress, emit, json_option


@click.command()
@click.argument("url")
@click.argument("selector")
@backup_option
@json_option
def rollback(url: str, selector: str, backups: tuple[str, ...], as_json: bool) -> None:
    """Make an older checkpoint the latest again, as a new one.

    Every byte of it is read first; a damaged one is refused. The new checkpoint borrows the files, so it takes no
    space, and nothing is deleted: the ones saved since stay, and are no longer "latest". What lies only in a --backup
    is copied from there.

    Stop the run first, if one still saves at URL: it loses the store to this command, and its next save ends with an
    error that says so.

    \b
      ckptstore rollback runs/gpt2 step:1000
      ckptstore rollback runs/gpt2 best:val_loss

    Exit codes: 0 it is the latest; 1 no such checkpoint, damaged, or the latest already; 2 no store at URL, the
    storage failed or wrong use.
    """
    with changing(url, backups) as store:
        old = store.resolve(selector)
        with byte_progress("verifying") as progress:
            new = store.rollback(old.id, progress=progress)
    if as_json:
        emit({"id": new.id, "step": new.step, "rolled_back_to": old.id, "borrowed_bytes": new.borrowed_bytes})
    else:
        answer(f"the latest is now {texts.one_line(new)}", f"with all that {old.id} holds")
