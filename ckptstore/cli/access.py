"""Opening the store that a command names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from ckptstore.cli.outcome import CommandError
from ckptstore.errors import NotFoundError

backup_option = click.option(
    "--backup", "backups", multiple=True, metavar="URL", help="Where the store is copied to; several times for several."
)

if TYPE_CHECKING:
    from ckptstore.engine.catalogue import Catalogue
    from ckptstore.store import Store


@contextmanager
def looking(url: str, backups: Sequence[str] = ()) -> Iterator[tuple[Store, Catalogue]]:
    """The store at ``url``, open for reading only, and what its records say, and those of ``backups``.

    Raises:
        CommandError: there is none. A checkpoint that is missing in a store is another thing.
    """
    from ckptstore.opening import open

    try:
        store = open(url, backup=backups, read_only=True)
        catalogue = store.catalogue()
    except NotFoundError as error:
        raise CommandError(str(error), code="no_store") from error
    with store:
        yield store, catalogue


@contextmanager
def changing(url: str, backups: Sequence[str] = ()) -> Iterator[Store]:
    """The store at ``url``, open for changes; one that isn't there is not made.

    Raises:
        CommandError: there is none.
    """
    from ckptstore.opening import open

    with looking(url, backups):
        pass
    with open(url, backup=backups) as store:
        yield store
