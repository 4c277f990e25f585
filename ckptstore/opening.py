"""Opening a store: its options are checked, its place and its backups are opened."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

from ckptstore.engine.buffers import POOL_BYTES
from ckptstore.engine.saver import Durable
from ckptstore.engine.workers import default_threads
from ckptstore.errors import FormatError, NotFoundError
from ckptstore.format.tensorfile import BLOCK_BYTES
from ckptstore.policy.retention import Keep
from ckptstore.storage import open_storage
from ckptstore.storage.base import Storage
from ckptstore.store import Store, check_durable
from ckptstore.units import duration_s, size_bytes

_log = logging.getLogger("ckptstore")

Place: TypeAlias = str | os.PathLike[str]


def open(
    url: Place,
    *,
    storage_options: Mapping[str, Any] | None = None,
    backup: Place | Sequence[Place] = (),
    backup_options: Mapping[str, Any] | None = None,
    durable: Durable = "primary",
    keep: Keep | None = None,
    trash: float | str | None = None,
    scrub: float | str | None = None,
    read_only: bool = False,
    shared: bool = False,
    compression: str = "none",
    pool_bytes: int | None = None,
    max_staging: int | str | None = None,
    threads: int | None = None,
    ranks: Literal["all", "one"] = "all",
    rank_timeout: float | str = "10m",
) -> Store:
    """Open the store at ``url``; nothing is created before the first save.

    Args:
        url: a path, ``memory://name``, ``s3://bucket/prefix``, ``gs://…``, ``az://…``, ``sftp://host/path``,
            ``https://…`` (to read from), or any other URL that fsspec knows; without a password in it.
        storage_options: of ``s3fs.S3FileSystem``, or fsspec's class for the scheme. None: from the usual environment.
            For s3 also ``deadline_s``: how many seconds a request is tried again, 120 by default.
        backup: one or more places, as ``url``, to which every checkpoint is copied in the background, in order. What is
            damaged or lost at ``url`` is taken from there. A backup belongs to one store.
        backup_options: for the backups, as ``storage_options``.
        durable: when a save is done: as soon as it is durable at ``url`` ("primary"), or in every backup ("backup").
        keep: what stays at ``url`` after each save, as ``last(10) | epochs() | best("val_loss")``; see ``judge``. None:
            all. With backups only what every one of them has is let go, and found and loaded from there as before.
        trash: for how long what ``keep`` gave up can be brought back, and takes up space, as "1h" or in seconds. None:
            not at all.
        scrub: read every block here again once in this time, as "7d" or in seconds, while no save runs in the
            background; what is damaged is repaired from a backup, or logged as an error. None: not at all.
        read_only: for people who only look: every change is refused, and a missing store is an error.
        shared: let several processes save side by side; without it the newest to save owns the store.
        compression: "none", "zstd" or "float-zstd", both also with ":LEVEL", or "auto": encode where that makes saving
            faster.
        pool_bytes: memory for blocks in flight, in bytes. None: 64 MiB, or 128 MiB where storage is far away.
        max_staging: most memory for copies of the state, as bytes or text like "2GB"; where it doesn't suffice, saves
            in the background keep their caller waiting. None: as much as the state takes.
        threads: blocks worked on at a time; by default one more than there are cores, or 8 where storage is far away.
        ranks: who saves and loads under ``torch.distributed``: "all" ranks together, or this "one" by itself.
        rank_timeout: how long one rank waits for another, as "10m" or in seconds: then a save fails on all.

    Raises:
        StorageError: the place can't be used, or no such scheme.
        NotFoundError: ``read_only`` and nothing there.
        FormatError: an option that can't be.
    """
    if threads is not None and threads < 1:
        raise FormatError(f"threads={threads} must be at least 1")
    if pool_bytes is not None and pool_bytes < 1:
        raise FormatError(
            f"pool_bytes={pool_bytes} must be at least 1; two blocks of 16 MiB are the least that is used"
        )
    if ranks not in ("all", "one"):
        raise FormatError(f"ranks={ranks!r} must be 'all' or 'one'")
    scrub_s = duration_s(scrub, "scrub") if scrub is not None else None
    max_staging_bytes = size_bytes(max_staging, "max_staging") if max_staging is not None else None
    check_durable(durable, bool(backup))
    _check_keep(keep, trash, bool(backup))
    places = [backup] if isinstance(backup, str | os.PathLike) else list(backup)
    storage, backups = _opened(url, storage_options, places, backup_options, read_only)
    in_flight = storage.capabilities.in_flight
    return Store(
        storage,
        backups,
        durable=durable,
        keep=keep,
        trash_s=duration_s(trash, "trash") if trash is not None else 0.0,
        scrub_s=scrub_s,
        read_only=read_only,
        shared=shared,
        compression=compression,
        pool_bytes=pool_bytes or max(POOL_BYTES, (in_flight or 0) * BLOCK_BYTES),
        threads=threads or in_flight or default_threads(),
        max_staging_bytes=max_staging_bytes,
        ranks=ranks,
        rank_timeout_s=duration_s(rank_timeout, "rank_timeout"),
    )


def _opened(
    url: Place,
    options: Mapping[str, Any] | None,
    backups: Sequence[Place],
    backup_options: Mapping[str, Any] | None,
    read_only: bool,
) -> tuple[Storage, list[Storage]]:
    others = _opened_backups(backups, backup_options, read_only)
    try:
        # Whoever only looks wants to know soon; a run that saves has time. Backups are tried again by themselves.
        storage = open_storage(url, read_only=read_only, options=options, patient=not read_only)
    except NotFoundError:
        if not others:
            raise
        # Lost altogether, and only to be looked at: then there is nothing to be brought back to.
        storage = others.pop(0)
    places = [it.url for it in (storage, *others)]
    for place in places:
        if places.count(place) > 1:
            raise FormatError(f"{place} is given twice: a backup must lie in another place")
    return storage, others


def _opened_backups(places: Sequence[Place], options: Mapping[str, Any] | None, read_only: bool) -> list[Storage]:
    """All of them; for people who only look without those that nothing was copied to yet."""
    opened = []
    for place in places:
        try:
            opened.append(open_storage(place, read_only=read_only, options=options))
        except NotFoundError as error:
            _log.warning("a backup is left out: %s", error)
    return opened


def _check_keep(keep: object, trash: object, has_backup: bool) -> None:
    if keep is not None and not isinstance(keep, Keep):
        raise FormatError(f"keep={keep!r} is no rule; write last(10) | epochs() | best('val_loss')")
    if trash is not None and (keep is None or has_backup):
        why = "keep= says what goes there" if keep is None else "what keep= lets go lies in the backup"
        raise FormatError(f"trash={trash!r} has no use here: {why}")
