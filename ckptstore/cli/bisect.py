"""``ckptstore bisect``: the first checkpoint at which a command fails."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from ckptstore.cli import texts
from ckptstore.cli.access import looking
from ckptstore.cli.outcome import BAD_NEWS
from ckptstore.cli.terminal import answer, emit, json_option, note, plain

if TYPE_CHECKING:
    from ckptstore.engine.catalogue import Checkpoint
    from ckptstore.tools.bisect import Bisection, Trial
    from ckptstore.tools.bisectcommand import Format


@click.command()
@click.argument("url")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- COMMAND...")
@click.option("--good", required=True, metavar="SELECTOR", help="One at which the command succeeds.")
@click.option("--bad", required=True, metavar="SELECTOR", help="A later one at which it fails.")
@click.option("--trust-ends", is_flag=True, help="Don't try the command at these two first.")
@click.option(
    "--to",
    type=click.Choice(["torch", "safetensors", "hf", "dcp"]),
    default="torch",
    show_default=True,
    help="What {path} is: a file for torch.load, a safetensors file, or a folder.",
)
@click.option(
    "--only", multiple=True, metavar="PATTERN", help="Export only these names, as 'model/*'. Can be repeated."
)
@click.option("--dir", "folder", metavar="FOLDER", help="Where exports lie meanwhile; else with temporary files.")
@json_option
@click.pass_context
def bisect(
    ctx: click.Context,
    url: str,
    command: tuple[str, ...],
    good: str,
    bad: str,
    trust_ends: bool,
    to: Format,
    only: tuple[str, ...],
    folder: str | None,
    as_json: bool,
) -> None:
    """Find the first checkpoint at which COMMAND fails.

    Binary search between --good and --bad: of a thousand checkpoints about ten are tried. In COMMAND, {path} is an
    export of the checkpoint, verified, and removed afterwards; {id}, {step} and {url} are what they say. COMMAND is run
    as it stands, by no shell, and what it says goes to stderr.

    It ends with 0 where a checkpoint is good, 125 where it can't tell, so that another one is tried, and any other code
    up to 127 where it is bad; whatever else ends it stops the search. Damaged checkpoints are skipped. What a roll-back
    has left behind isn't looked at.

    \b
      ckptstore bisect runs/gpt2 --good step:1000 --bad latest -- python evaluate.py {path}
      ckptstore bisect runs/gpt2 --good step:1000 --bad latest --only 'model/*' -- ./check.sh {path} {step}
      ckptstore bisect runs/gpt2 --good 0001-000004 --bad latest -- python evaluate.py {url} {id}

    Exit codes: 0 found; 1 only narrowed down, because some could not be tested, no such checkpoint, or an end is
    damaged; 2 an end isn't what you say it is, COMMAND can't be run or broke off, no store at URL or wrong use.
    """
    from ckptstore.tools.bisect import bisect as search
    from ckptstore.tools.bisectcommand import CommandTest

    with looking(url) as (store, _), _ended_in_order():
        test = CommandTest(store, command, to=to, only=only, folder=folder)
        found = search(store, good, bad, test, trust_ends=trust_ends, told=_tell)
        holds = store.holds()
    if as_json:
        emit(_document(found, holds))
    else:
        answer(*_lines(found))
    if found.undecided:
        ctx.exit(BAD_NEWS)


@contextmanager
def _ended_in_order() -> Iterator[None]:
    """SIGTERM and SIGHUP end the block as Ctrl-C does, so that no export stays behind."""

    def end(signum: int, frame: object) -> None:
        sys.exit(128 + signum)

    before = {signum: signal.signal(signum, end) for signum in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _tell(trial: Trial, left: int) -> None:
    why = f" ({trial.why})" if trial.why else ""
    more = f"; at most {texts.count_text(left, 'more test')}" if left else ""
    note(plain(f"{trial.verdict:<7}  step {trial.checkpoint.step}  {trial.checkpoint.id}{why}{more}"))


def _lines(found: Bisection) -> Iterator[str]:
    if found.undecided:
        yield "the first bad one is one of these; those without a word can't be tested:"
        yield from (f"  {texts.one_line(checkpoint)}" for checkpoint in found.undecided)
        yield f"  {texts.one_line(found.first_bad)} - certainly bad"
    else:
        yield f"first bad: {texts.one_line(found.first_bad)}"
    yield f"last good: {texts.one_line(found.last_good)}"
    yield f"between: {_changes(found.last_good, found.first_bad)}"


def _changes(good: Checkpoint, bad: Checkpoint) -> str:
    parts = [texts.count_text(bad.step - good.step, "step")]
    if good.epoch is not None and bad.epoch is not None and bad.epoch > good.epoch:
        parts.append(texts.count_text(bad.epoch - good.epoch, "epoch"))
    for name in [name for name in bad.metrics if name in good.metrics]:
        parts.append(f"{name} {good.metrics[name]:.5g} to {bad.metrics[name]:.5g}")
    return ", ".join(parts)


def _document(found: Bisection, holds: dict[str, str]) -> dict[str, Any]:
    return {
        "first_bad": texts.checkpoint_fields(found.first_bad, holds),
        "last_good": texts.checkpoint_fields(found.last_good, holds),
        "undecided": [checkpoint.id for checkpoint in found.undecided],
        "steps": found.first_bad.step - found.last_good.step,
        "trials": [
            {"id": t.checkpoint.id, "step": t.checkpoint.step, "verdict": t.verdict, "why": t.why} for t in found.trials
        ],
    }
