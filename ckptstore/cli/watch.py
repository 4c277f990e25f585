"""``ckptstore watch``: what happens in a store, as it happens."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING

import click

from ckptstore.cli import texts
from ckptstore.cli.access import backup_option, looking
from ckptstore.cli.outcome import BAD_NEWS
from ckptstore.cli.terminal import json_option, plain
from ckptstore.cli.units import duration_s
from ckptstore.errors import CheckpointError, NotFoundError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ckptstore.engine.catalogue import Catalogue, Checkpoint
    from ckptstore.maintenance.receipts import Lag
    from ckptstore.store import Store

_RARELY_S = 30.0
"""Holds and receipts are looked at so often while no checkpoint comes or goes."""
_SHORTEST_S = 0.1
_DUMB = ("dumb", "unknown")
"""Terminals where nothing can be drawn over: they get lines, as a pipe does."""


@dataclass(frozen=True)
class Look:
    """What was seen at last.

    Attributes:
        catalogue, holds, lags: of the store.
        away: what is wrong, while the storage can't be reached.
        away_s: for how long it has been so.
    """

    catalogue: Catalogue
    holds: Mapping[str, str]
    lags: Sequence[Lag]
    away: str | None = None
    away_s: float = 0.0

    @property
    def checkpoints(self) -> Sequence[Checkpoint]:
        return self.catalogue.checkpoints

    # What follows takes a while for many, and a look is drawn often.

    @cached_property
    def best(self) -> Mapping[str, tuple[Checkpoint, str]]:
        """For each metric the best checkpoint, and whether "min" or "max" is best."""
        from ckptstore.tools.reportdata import bests

        return bests(self.checkpoints)

    @cached_property
    def marks(self) -> Mapping[str, Sequence[str]]:
        """What each checkpoint is, by id: the latest, a best one, held."""
        marks = {c.id: ["latest"] for c in self.checkpoints[-1:]}
        for name, (checkpoint, _) in self.best.items():
            marks.setdefault(checkpoint.id, []).append(f"best {name}")
        for name, id in sorted(self.holds.items()):
            marks.setdefault(id, []).append(f"held: {name}")
        return marks

    @cached_property
    def short(self) -> Mapping[str, str]:
        """The beginning of each id that tells it from all others."""
        return texts.short_ids(c.id for c in self.checkpoints)

    @cached_property
    def stored_bytes(self) -> int:
        return sum(c.stored_bytes - c.borrowed_bytes for c in self.checkpoints)


class Watcher:
    """Looks at a store again and again: lists what is there, and reads just the records that are new."""

    def __init__(self, store: Store, reopen: Callable[[], Store]) -> None:
        self._store, self._reopen = store, reopen
        self._seen = Look(store.catalogue(), {}, ())
        self._asked_s: float | None = None
        self._lost_s: float | None = None

    def look(self) -> Look:
        """What is there now; what was seen before, where the storage can't be reached."""
        try:
            self._refresh(self._store)
        except CheckpointError as error:
            if not self._found_anew():
                now = time.monotonic()
                self._lost_s = now if self._lost_s is None else self._lost_s
                return replace(self._seen, away=str(error), away_s=now - self._lost_s)
        self._lost_s = None
        return self._seen

    def _found_anew(self) -> bool:
        """Whether all is well with the store opened once more: a disk that was mounted again is another one."""
        with suppress(CheckpointError):
            store = self._reopen()
            try:
                self._refresh(store)
            except BaseException:
                store.close()
                raise
            self._store.close()
            self._store = store
            return True
        return False

    def close(self) -> None:
        self._store.close()

    def _refresh(self, store: Store) -> None:
        found, before = store.catalogue(), self._seen.catalogue
        if found.highest is None and before.highest is not None:
            # An unmounted disk leaves an empty folder.
            raise NotFoundError(f"{store.url} is empty now, and wasn't before")
        now = time.monotonic()
        if self._asked_s is None or _differs(found, before) or now - self._asked_s >= _RARELY_S:
            self._seen = Look(found, store.holds(), store.lags())
            self._asked_s = now


def _differs(found: Catalogue, before: Catalogue) -> bool:
    ids = [c.id for c in found.checkpoints] != [c.id for c in before.checkpoints]
    return ids or found.graves != before.graves or found.damaged != before.damaged


@click.command()
@click.argument("url")
@click.option(
    "--interval", type=duration_s, default="2s", show_default=True, metavar="TIME", help="Between two looks: 10s, 1m."
)
@click.option(
    "--last", type=click.IntRange(min=0), default=10, show_default=True, metavar="N", help="Begin with the newest N."
)
@click.option("--once", is_flag=True, help="Look once and end.")
@backup_option
@json_option
@click.pass_context
def watch(
    ctx: click.Context, url: str, interval: float, last: int, once: bool, backups: tuple[str, ...], as_json: bool
) -> None:
    """Watch the checkpoints at URL as they come.

    Shows the newest checkpoints with their roles, metrics over time, sizes, steps per second, how long ago the last one
    was saved, how far backups are behind, and what is damaged. Where the storage can't be reached it says so, and goes
    on. Each look lists the store and reads just what is new, so that it can be left running. Ctrl-C ends it.

    Where stdout is no terminal, as in a pipe, a line is written for each of the newest checkpoints, and then for each
    new one; with --json each is one line of JSON.

    \b
      ckptstore watch runs/gpt2
      ckptstore watch s3://bucket/runs/gpt2 --interval 1m
      ckptstore watch runs/gpt2 --json | jq --unbuffered '.metrics.val_loss'

    Exit codes: 0 ended by Ctrl-C; 1 with --once, where a commit record is damaged; 2 no store at URL or wrong use.
    """
    interval = max(interval, _SHORTEST_S)
    from ckptstore.opening import open

    reopen = partial(open, url, backup=backups, read_only=True)
    # To end it by Ctrl-C is what it is made for.
    with (
        suppress(KeyboardInterrupt),
        looking(url, backups) as (store, catalogue),
        closing(Watcher(store, reopen)) as watcher,
    ):
        if sys.stdout.isatty() and not as_json and os.environ.get("TERM") not in _DUMB:
            from ckptstore.cli.watchview import show

            show(store.url, watcher, interval, once=once)
        else:
            _lines(watcher, interval, last, once=once, as_json=as_json)
        if once and catalogue.damaged:
            ctx.exit(BAD_NEWS)


def _lines(watcher: Watcher, interval: float, last: int, *, once: bool, as_json: bool) -> None:
    """A line for each of the ``last`` newest checkpoints, and for each that comes."""
    told: set[str] | None = None
    for look in looks(watcher, interval, once=once):
        fresh = look.checkpoints[max(len(look.checkpoints) - last, 0) :] if told is None else look.checkpoints
        for checkpoint in fresh:
            if told is None or checkpoint.id not in told:
                click.echo(_json_line(checkpoint, look) if as_json else plain(texts.one_line(checkpoint)))
        sys.stdout.flush()
        told = {c.id for c in look.checkpoints}


def _json_line(checkpoint: Checkpoint, look: Look) -> str:
    fields = texts.checkpoint_fields(checkpoint, look.holds)
    return json.dumps(fields, allow_nan=False, separators=(",", ":"))


def looks(watcher: Watcher, interval: float, *, once: bool) -> Iterator[Look]:
    """One look each ``interval``; what comes in between is said on stderr."""
    away = False
    while True:
        began = time.monotonic()
        look = watcher.look()
        if (look.away is not None) != away:
            away = look.away is not None
            warning = f"warning: {look.away}; waiting for it" if away else "it is there again"
            click.secho(plain(warning), err=True, fg="yellow")
        yield look
        if once:
            return
        time.sleep(max(interval - (time.monotonic() - began), 0.0))
