"""What goes to stdout and stderr: the answer on the one, progress and remarks on the other."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

import click

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

# Where nobody looks, lines are cut or wrapped by whoever reads them.
_UNBOUNDED = 10_000

json_option = click.option("--json", "as_json", is_flag=True, help="Answer with one JSON document on stdout.")
"""Every command has it."""


def emit(document: Any) -> None:
    """The machine's answer on stdout."""
    click.echo(json.dumps(document, indent=2, allow_nan=False))


def note(text: str) -> None:
    """A remark for people, which is no part of the answer."""
    click.echo(text, err=True)


def plain(text: str) -> str:
    """``text`` without what a terminal would obey: a checkpoint's names and reasons come from anybody."""
    return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in text)


def answer(*parts: RenderableType) -> None:
    """The person's answer on stdout, with tables as wide as the terminal where one shows them."""
    from rich.console import Console
    from rich.table import Table

    from ckptstore.cli.fitting import fitted

    console = Console(width=None if sys.stdout.isatty() else _UNBOUNDED, highlight=False)
    for part in parts:
        if isinstance(part, str):
            # Not wrapped: the terminal does it, and a command or an id copied from there stays whole.
            click.echo(_writable(plain(part)))
            continue
        shown = fitted(part, console, _droppable[part]) if isinstance(part, Table) and part in _droppable else part
        # By way of click: rich ends the process itself when the reader of a pipe has gone.
        with console.capture() as captured:
            console.print(shown, markup=False)
        click.echo(_writable("\n".join(line.rstrip() for line in captured.get().split("\n"))), nl=False)


def _writable(text: str) -> str:
    """``text`` with a question mark for what stdout has no code for, as where the locale isn't UTF-8."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)


def table(*columns: str, right: tuple[str, ...] = (), drop: tuple[str, ...] = (), fold: tuple[str, ...] = ()) -> Table:
    """An empty table without frames; the columns named in ``right`` hold numbers.

    Where it is wider than the terminal, the columns in ``drop`` are left out, the first one first, and then those in
    ``fold`` are folded. Where that isn't enough, each row takes a line for each cell, so that nothing in it is cut.
    """
    from rich.table import Table

    made = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        justify: Literal["left", "right"] = "right" if column in right else "left"
        made.add_column(column, justify=justify, no_wrap=column not in fold, overflow="fold")
    _droppable[made] = drop
    return made


_droppable: WeakKeyDictionary[Table, Sequence[str]] = WeakKeyDictionary()


def _animated() -> bool:
    """Whether stderr is a terminal that can draw over what it has shown."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


@contextmanager
def byte_progress(title: str) -> Iterator[Callable[[int, int], None] | None]:
    """A bar over bytes on stderr, or None where that is no terminal."""
    if not _animated():
        yield None
        return
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(title, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total or None)


@contextmanager
def count_progress(title: str) -> Iterator[Callable[[int, int], None] | None]:
    """A bar over things that are done one after the other on stderr, or None where that is no terminal."""
    with round_progress() as progress:
        yield None if progress is None else lambda done, total: progress(title, done, total)


@contextmanager
def working(title: str) -> Iterator[None]:
    """A sign of life on stderr while nobody knows how much is left, where that is a terminal."""
    if not _animated():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(title):
        yield


@contextmanager
def round_progress() -> Iterator[Callable[[str, int, int], None] | None]:
    """A bar over operations on stderr that says which one runs, or None where that is no terminal."""
    if not _animated():
        yield None
        return
    from rich import progress
    from rich.console import Console

    columns = (progress.BarColumn(), progress.MofNCompleteColumn(), progress.TextColumn("{task.description}"))
    with progress.Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task("", total=None)
        yield lambda what, done, total: bars.update(task, description=what, completed=done, total=total)
