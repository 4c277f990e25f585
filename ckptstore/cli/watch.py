"""``ckptstore watch``: what happens in a store, as it happens."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
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
    def newest(self) -> Sequence[Checkpoint]:
        return self.catalogue.checkpoints


class Watcher:
    """Looks at a store again and again: lists what is there, and reads just the records that are new."""

    def __init__(self, store: Store, reopen: Callable[[], Store]) -> None:
        self._store, self._reopen = store, reopen
        self._seen = store.catalogue()
        self._holds: Mapping[str, str] = {}
        self._lags: Sequence[Lag] = ()
        self._asked_s: float | None = None
        self._lost_s: float | None = None

    def look(self) -> Look:
        """What is there now; what was seen before, where the storage can't be reached."""
        try:
            self._refresh(self._store)
        except CheckpointError as error:
            if self._found_anew():
                return Look(self._seen, self._holds, self._lags)
            now = time.monotonic()
            self._lost_s = now if self._lost_s is None else self._lost_s
            return Look(self._seen, self._holds, self._lags, str(error), now - self._lost_s)
        self._lost_s = None
        return Look(self._seen, self._holds, self._lags)

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
            self._store, self._lost_s = store, None
            return True
        return False

    def close(self) -> None:
        self._store.close()

    def _refresh(self, store: Store) -> None:
        found = store.catalogue()
        if found.highest is None and self._seen.highest is not None:
            # An unmounted disk leaves an empty folder.
            raise NotFoundError(f"{store.url} is empty now, and wasn't before")
        now = time.monotonic()
        if self._asked_s is None or _differs(found, self._seen) or now - self._asked_s >= _RARELY_S:
            self._holds, self._lags = store.holds(), store.lags()
            self._asked_s = now
        self._seen = found


def _differs(found: Catalogue, before: Catalogue) -> bool:
    return found.graves != before.graves or [c.id for c in found.checkpoints] != [c.id for c in before.checkpoints]


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
        looking(url, backups) as (store, catalogue),
        suppress(KeyboardInterrupt),
        closing(Watcher(store, reopen)) as watcher,
    ):
        if sys.stdout.isatty() and not as_json:
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
        fresh = look.newest[max(len(look.newest) - last, 0) :] if told is None else look.newest
        for checkpoint in fresh:
            if told is None or checkpoint.id not in told:
                click.echo(_json_line(checkpoint, look) if as_json else plain(texts.one_line(checkpoint)))
        sys.stdout.flush()
        told = {c.id for c in look.newest}


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
