"""Complete listings, or an error: what fsspec can't list it leaves out, unless it is told not to."""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any

from ckptstore.errors import StorageError
from ckptstore.storage.base import Entry
from ckptstore.storage.generic.failures import is_denied, is_missing
from ckptstore.storage.generic.remote import Remote
from ckptstore.storage.generic.traits import overrides

_TIMES = "mtime modified LastModified last_modified Last-Modified updated timeModified created creation_time".split()
_AT_ONCE = 8


def listed(remote: Remote, prefix: str) -> list[Entry]:
    """All objects under ``prefix``, sorted by key.

    Raises:
        StorageError: there is no such bucket, or no listing.
        OSError: some of it can't be listed.
    """
    base = f"{remote.root}/"
    folder = f"{base}{prefix}".rstrip("/")
    remote.fs.invalidate_cache()
    try:
        found = remote.call("find", folder, detail=True, **_strict(remote))
    except FileNotFoundError as error:
        if not is_missing(error):
            raise
        found = {}
    # An object of the folder's own name is all that some find then, by its name alone.
    infos = list(found.values()) if isinstance(found, Mapping) else []
    infos = [info for info in infos if str(info.get("name", "")).startswith(f"{folder}/")]
    if not infos:
        _check_place(remote)
    if remote.traits.by_links:
        infos = _looked_at(remote, infos)
    now = time.time()
    return sorted(_entry(info, base, now) for info in infos if info.get("type") != "directory")


def _strict(remote: Remote) -> dict[str, Any]:
    """Arguments by which fsspec's own walk through folders doesn't pass over those that it can't read."""
    if overrides(remote.fs, "find") or overrides(remote.fs, "walk"):
        return {}
    return {"on_error": _unless_gone}


def _unless_gone(error: BaseException) -> None:
    """A folder that isn't there, or no more, is empty."""
    if not is_missing(error):
        raise error


def _check_place(remote: Remote) -> None:
    """Nothing was found: make sure that it was looked for in the right place."""
    if remote.traits.by_links and not remote.call("ls", f"{remote.root}/", detail=False):
        raise StorageError(f"{remote.url}: the server sends no page that lists what is there")
    if remote.traits.bucket:
        bucket = remote.root.partition("/")[0]
        try:
            remote.call("info", bucket)
        except Exception as error:
            if is_missing(error):
                message = f"{remote.url}: there is no bucket {bucket!r}; make it first, or mend the URL"
                raise StorageError(message) from error
            # Who may use what lies in a bucket needn't be allowed to look at the bucket.
            if not is_denied(error):
                raise


def _looked_at(remote: Remote, infos: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What each link leads to: a page of links tells no sizes."""
    files = [info for info in infos if info.get("type") != "directory"]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(lambda info: remote.call("info", info["name"]), files))


def _entry(info: Mapping[str, Any], base: str, now: float) -> Entry:
    size = info.get("size")
    if not isinstance(size, int):
        raise StorageError(f"{info['name']}: the storage doesn't tell its size")
    return Entry(str(info["name"])[len(base) :], size, _modified(info, now))


def _modified(info: Mapping[str, Any], now: float) -> float:
    """When it was written; ``now`` where nobody says, so that it is never taken for an old leftover."""
    for name in _TIMES:
        value = info.get(name)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, str):
            try:
                return datetime.fromisoformat(value).timestamp()
            except ValueError:
                continue
    return now
