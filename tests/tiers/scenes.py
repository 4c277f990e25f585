"""Stores with copies elsewhere: put back as they were, broken at will, and looked at one by one."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

from ckptstore.engine.backups import Backup
from ckptstore.engine.buffers import BufferPool
from ckptstore.engine.commit import read_store
from ckptstore.engine.finder import Finder
from ckptstore.maintenance.replicate import Replicator
from ckptstore.maintenance.transfer import Carrier
from ckptstore.storage import open_storage
from ckptstore.storage.base import Entry, ObjectReader, ObjectWriter, Slot, Storage, Upload
from ckptstore.store import Store
from tests.integrity.stores import FolderRaw, MemoryRaw, Raw, Tensors, flat, opened, silence

CARRIER = Carrier(BufferPool(64 << 20), 1)

Objects = Mapping[str, bytes]
Wanted = Mapping[str, Tensors]
"""What each checkpoint holds, by its id."""


def memory() -> MemoryRaw:
    """A place that nobody else knows."""
    return MemoryRaw(uuid4().hex)


def objects(raw: Raw) -> dict[str, bytes]:
    """Everything that lies there."""
    return {key: raw.get(key) for key in raw.listing()}


def put_back(raw: Raw, before: Objects) -> None:
    """Have just ``before`` lie there."""
    if isinstance(raw, FolderRaw):
        shutil.rmtree(raw.path, ignore_errors=True)
    else:
        for key in raw.listing():
            raw.remove(key)
    for key, data in before.items():
        raw.put(key, data)


def storage_of(raw: Raw) -> Storage:
    return open_storage(raw.url)


def replicator(
    primary: Storage, backup: Storage, *, number: int | None = None, finder: Finder | None = None
) -> Replicator:
    """What copies from ``primary`` to ``backup`` as writer ``number``, and back; in the caller's thread, by _round."""
    finder = finder or Finder(primary, read_only=False)
    right = (read_store(primary), number) if number is not None else None
    return Replicator(primary, finder, Backup(backup), CARRIER, lambda: right)


def opened_with(primary: Raw, *backups: Raw, **options: Any) -> Store:
    """A store opened anew, with its backups."""
    return opened(primary.url, backup=[raw.url for raw in backups], **options)


def loads(wanted: Wanted, primary: Raw, *backups: Raw, ids: Iterable[str] | None = None) -> None:
    """Every one of ``wanted`` is there and loads exactly, only looked at: nothing is repaired by that."""
    with opened(primary.url, read_only=True, backup=[raw.url for raw in backups]) as store, silence():
        listed = {checkpoint.id for checkpoint in store.checkpoints()}
        for id in wanted if ids is None else ids:
            assert id in listed, f"{id} isn't seen"
            assert flat(store.load(id)) == dict(wanted[id]), id


def whole_alone(wanted: Wanted, raw: Raw) -> set[str]:
    """What lies in ``raw``, seen without its backups, is all good and none of it strange; which ids."""
    with opened(raw.url, read_only=True) as store, silence():
        report = store.verify()
        assert report.ok, report.damages
        assert not report.foreign
        listed = [checkpoint.id for checkpoint in store.checkpoints()]
        assert set(listed) <= set(wanted), "a checkpoint that never was"
        for id in listed:
            assert flat(store.load(id)) == dict(wanted[id]), id
    return set(listed)


def tidy(raw: Raw) -> None:
    """After a prune no trace is left of what was broken off."""
    with opened(raw.url) as store, silence():
        store.prune(grace_s=0)
        report = store.verify()
    assert report.ok, report.damages
    assert not report.leftovers
    left = [key for key in raw.listing() if "tmp-" in key or key.startswith("copying/")]
    assert not left


def folder(path: Path) -> FolderRaw:
    return FolderRaw(path)


class Hooked:
    """``inner``, with ``hook`` called before each call with its name and the key or prefix."""

    def __init__(self, inner: Storage, hook: Callable[[str, str], object]) -> None:
        self.inner, self.hook = inner, hook
        self.url, self.capabilities = inner.url, inner.capabilities

    def list(self, prefix: str) -> list[Entry]:
        self.hook("list", prefix)
        return self.inner.list(prefix)

    def size(self, key: str) -> int:
        self.hook("size", key)
        return self.inner.size(key)

    def read(self, key: str, *, limit: int) -> bytes:
        self.hook("read", key)
        return self.inner.read(key, limit=limit)

    def create(self, key: str, data: bytes) -> None:
        self.hook("create", key)
        self.inner.create(key, data)

    def open_writer(self, key: str, *, size: int | None = None) -> ObjectWriter:
        self.hook("open_writer", key)
        return HookedWriter(self.inner.open_writer(key, size=size), key, self.hook)

    def open_reader(self, key: str, *, size: int | None = None) -> ObjectReader:
        self.hook("open_reader", key)
        return self.inner.open_reader(key, size=size)

    def delete(self, keys: Iterable[str]) -> None:
        keys = list(keys)
        for key in keys:
            self.hook("delete", key)
        self.inner.delete(keys)

    def replace(self, key: str, by: str) -> None:
        self.hook("replace", key)
        self.inner.replace(key, by)

    def probe(self, key: str, data: bytes) -> None:
        self.hook("probe", key)
        self.inner.probe(key, data)

    def uploads(self) -> Sequence[Upload]:
        return self.inner.uploads()

    def abort_uploads(self, uploads: Iterable[Upload]) -> None:
        self.inner.abort_uploads(uploads)

    def close(self) -> None:
        self.inner.close()


class HookedWriter:
    def __init__(self, inner: ObjectWriter, key: str, hook: Callable[[str, str], object]) -> None:
        self.inner, self.key, self.hook = inner, key, hook

    def reserve(self, length: int) -> Slot:
        return self.inner.reserve(length)

    def write(self, slot: Slot, data: memoryview) -> None:
        self.hook("write", self.key)
        self.inner.write(slot, data)

    def finish(self) -> int:
        self.hook("finish", self.key)
        return self.inner.finish()

    def abort(self) -> None:
        self.inner.abort()


def hook_backups(store: Store, hook: Callable[[str, str], object]) -> None:
    """Have ``hook`` called before each call of the backups of ``store``."""
    for backup in store._finder.backups.all:
        backup.storage = Hooked(backup.storage, hook)
