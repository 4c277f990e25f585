"""``ckptstore hold`` and ``ckptstore release``: pins that no deletion passes."""

from __future__ import annotations

import click

from ckptstore.cli import texts
from ckptstore.cli.access import changing
from ckptstore.cli.terminal import answer, emit, json_option


@click.command()
@click.argument("url")
@click.argument("selector")
@click.argument("name")
@json_option
def hold(url: str, selector: str, name: str, as_json: bool) -> None:
    """Pin a checkpoint under NAME, so that nothing deletes it.

    Neither a retention policy nor "ckptstore delete" removes a held checkpoint, until its last hold is released.
    NAME selects the checkpoint from now on.

    \b
      ckptstore hold runs/gpt2 best:val_loss paper
      ckptstore show runs/gpt2 paper

    Exit codes: 0 held; 1 no such checkpoint, or NAME is taken; 2 NAME can't name a hold, no store at URL or
    wrong use.
    """
    with changing(url) as store:
        checkpoint = store.hold(selector, name)
    if as_json:
        emit({"held": checkpoint.id, "name": name})
    else:
        answer(f"held as {name}: {texts.one_line(checkpoint)}")


@click.command()
@click.argument("url")
@click.argument("name")
@json_option
def release(url: str, name: str, as_json: bool) -> None:
    """Remove the hold NAME; the checkpoint stays.

    It can be deleted then, by hand or by a retention policy.

    \b
      ckptstore release runs/gpt2 paper

    Exit codes: 0 released; 1 no such hold; 2 no store at URL or wrong use.
    """
    with changing(url) as store:
        id = store.holds().get(name)
        store.release(name)
    if as_json:
        emit({"released": name, "id": id})
    else:
        answer(f"released {name}" + (f", which held {id}" if id else ""))
