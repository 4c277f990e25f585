"""Checkpoints that borrow files, made by hand, and a storage that lets others in between any two calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ckptstore.engine.catalogue import Checkpoint
from ckptstore.engine.commit import read_fate
from ckptstore.errors import NotFoundError
from ckptstore.format.layout import parse_id
from ckptstore.format.records import CommitRecord
from ckptstore.maintenance import keep
from ckptstore.storage.base import Entry, ObjectReader, Storage, Upload
from ckptstore.store import Store
from tests.integrity.stores import Forge, Raw, Tensors, opened, read, save, state

MODEL, OPTIMIZER = "model.safetensors", "optimizer.safetensors"


def component(name: str) -> str:
    """The file that holds the tensor ``name``."""
    return name.partition("/")[0] + ".safetensors"


def content(generation: int, *names: str) -> dict[str, bytes]:
    """Tensors that tell which generation they are of."""
    return {name: f"{name} {generation} ".encode() * 20 for name in names}


def borrow(
    store: Store, raw: Raw, via: Checkpoint, own: Tensors, step: int, files: Iterable[str] = (MODEL,)
) -> Checkpoint:
    """Save ``own``, and ``files`` as ``via`` has them: borrowed from ``via``, or from whom it borrows them itself."""
    files = set(files)
    borrowed = {name: data for name, data in read(store, via).items() if component(name) in files}
    saved = save(store, state({**borrowed, **own}), step)
    forge, entries = Forge(raw, saved.id), {file["name"]: file for file in Forge(raw, via.id).part["files"]}
    for number, file in enumerate(forge.part["files"]):
        if file["name"] in files:
            forge.part["files"][number] = entries[file["name"]]
            raw.remove(f"checkpoints/{saved.id}/{file['name']}")
    strangers = [file for file in forge.part["files"] if file["owner"] != saved.id]
    forge.commit["lenders"] = sorted({file["owner"] for file in strangers}, key=parse_id)
    if "borrowed_bytes" in forge.commit:
        forge.commit["borrowed_bytes"] = sum(file["stored_bytes"] for file in strangers)
    forge.write()
    # Opened anew: a store that has read the record before remembers it as it was.
    with opened(raw.url) as fresh:
        return fresh.resolve(saved.id)


@dataclass
class Borrower:
    """A checkpoint on its way: all is written but its commit record."""

    raw: Raw
    checkpoint: Checkpoint
    via: Checkpoint
    state: str = "written"
    record: bytes = field(init=False)

    def __post_init__(self) -> None:
        self.key = f"commits/{self.checkpoint.id}.json"
        self.record = self.raw.get(self.key)
        self.raw.remove(self.key)

    def commit(self) -> None:
        self.raw.put(self.key, self.record)
        self.state = "committed"

    def look_again(self) -> None:
        """Acknowledge, unless the commit record of ``via`` is gone: then bury the own commit."""
        with opened(self.raw.url) as store:
            try:
                safe = isinstance(read_fate(store._storage, self.via.order), CommitRecord)
            except NotFoundError:
                safe = False
            if not safe:
                keep.bury(store._storage, self.checkpoint, "its lender was deleted meanwhile")
        self.state = "acknowledged" if safe else "buried"


class Interrupted:
    """``inner``, with something done before the call of that number, counted from 1; deletions count one by one."""

    def __init__(self, inner: Storage, actions: Mapping[int, Callable[[], object]]) -> None:
        self.inner, self.actions, self.calls = inner, actions, 0
        self.url, self.capabilities = inner.url, inner.capabilities

    def step(self) -> None:
        self.calls += 1
        if self.calls in self.actions:
            self.actions[self.calls]()

    def list(self, prefix: str) -> list[Entry]:
        self.step()
        return self.inner.list(prefix)

    def size(self, key: str) -> int:
        self.step()
        return self.inner.size(key)

    def read(self, key: str, *, limit: int) -> bytes:
        self.step()
        return self.inner.read(key, limit=limit)

    def create(self, key: str, data: bytes) -> None:
        self.step()
        self.inner.create(key, data)

    def open_writer(self, key: str, *, size: int | None = None) -> Any:
        self.step()
        return self.inner.open_writer(key, size=size)

    def open_reader(self, key: str, *, size: int | None = None) -> ObjectReader:
        self.step()
        return self.inner.open_reader(key, size=size)

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            self.step()
            self.inner.delete([key])

    def replace(self, key: str, by: str) -> None:
        self.step()
        self.inner.replace(key, by)

    def probe(self, key: str, data: bytes) -> None:
        self.inner.probe(key, data)

    def uploads(self) -> Sequence[Upload]:
        return self.inner.uploads()

    def abort_uploads(self, uploads: Iterable[Upload]) -> None:
        self.inner.abort_uploads(uploads)

    def close(self) -> None:
        self.inner.close()


def interrupted(url: str, actions: Mapping[int, Callable[[], object]]) -> tuple[Store, Interrupted]:
    """A store opened anew whose storage calls are counted and interrupted."""
    store = opened(url)
    storage = Interrupted(store._storage, actions)
    store._storage = store._finder._storage = store._tools.storage = store._dispatcher.claim._storage = storage
    return store, storage
