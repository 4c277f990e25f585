"""``ckptstore average``: the weights of several checkpoints as one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from ckptstore.cli import texts
from ckptstore.cli.access import changing, looking
from ckptstore.cli.terminal import answer, byte_progress, emit, json_option

if TYPE_CHECKING:
    from ckptstore.engine.catalogue import Checkpoint
    from ckptstore.store import Store


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise click.BadParameter(f"{text!r} are no numbers; write them as 1,2,0.5") from error


@click.command()
@click.argument("url")
@click.argument("selectors", nargs=-1, metavar="[SELECTOR]...")
@click.option("--last", type=click.IntRange(min=2), metavar="N", help="The N newest, instead of SELECTORs.")
@click.option("--best", metavar="METRIC:N", help="The N best by a metric, as val_loss:3 or acc:max:3.")
@click.option("--weights", type=_numbers, metavar="W,W,…", help="What each counts, in the order of SELECTORs.")
@click.option("--ema", type=float, metavar="DECAY", help="An exponential average, oldest first, as 0.9.")
@click.option("--only", multiple=True, metavar="PATTERN", help="Only these names, as 'model/*'. Can be repeated.")
@click.option("--dtype", metavar="TYPE", help="Round the result to this type: fp32, bf16, fp16.")
@click.option("--to", "target", metavar="URL2", help="The store that gets the result; made where there is none.")
@click.option("--here", is_flag=True, help="Save at URL itself. A run that saves there ends at its next save.")
@json_option
def average(
    url: str,
    selectors: tuple[str, ...],
    last: int | None,
    best: str | None,
    weights: list[float] | None,
    ema: float | None,
    only: tuple[str, ...],
    dtype: str | None,
    target: str | None,
    here: bool,
    as_json: bool,
) -> None:
    """Average the weights of checkpoints into a new one.

    The result holds the modules of the state (without any, "model"; or what --only says), no optimizer and no random
    state; its step is that of the newest, its reason names all. Floating-point tensors are averaged in fp32 or wider
    and rounded once; integers are the newest's. --ema 0.9 starts with the oldest and goes 10 % of the way to each
    next one.

    The result goes to another store (--to), since it is no checkpoint to resume from. With --here it becomes the latest
    at URL, and takes the store over from a run that saves there.

    \b
      ckptstore average runs/gpt2 --last 5 --to runs/gpt2-averaged
      ckptstore average runs/gpt2 --best val_loss:3 --to runs/gpt2-averaged --dtype bf16
      ckptstore average runs/gpt2 step:900 step:1000 --weights 1,3 --to s3://bucket/averaged
      ckptstore average runs/gpt2 --last 10 --ema 0.8 --to runs/gpt2-ema

    Exit codes: 0 saved; 1 no such checkpoint, fewer than two, or one is damaged; 2 no store at URL, they don't fit each
    other, a storage failed or wrong use.
    """
    if (target is None) == (not here):
        raise click.UsageError("say where the result goes: --to URL2, or --here (which stops a run that saves there)")
    if (bool(selectors), last is not None, best is not None).count(True) != 1:
        raise click.UsageError("say what to average: SELECTORs, --last N or --best METRIC:N")
    from ckptstore.tools.average import average as averaged

    with _opened(url, here) as store, byte_progress("averaging") as progress:
        made = averaged(
            store,
            selectors,
            last=last,
            best=best,
            weights=weights,
            ema=ema,
            only=list(only) or None,
            target=target,
            dtype=dtype,
            progress=progress,
        )
    where = store.url if target is None else target
    if as_json:
        emit({"url": where, **texts.checkpoint_fields(made, {})})
    else:
        answer(*_lines(made, where))


@contextmanager
def _opened(url: str, here: bool) -> Iterator[Store]:
    if here:
        with changing(url) as store:
            yield store
    else:
        with looking(url) as (store, _):
            yield store


def _lines(made: Checkpoint, where: str) -> Iterator[str]:
    yield f"saved {texts.one_line(made)} at {where}"
    yield from (f"  {reason}" for reason in made.reasons)
