"""Operations on a store in a bucket, each request of which is broken, and what must hold of the store afterwards."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from tenacity import wait_fixed

import ckptstore
from ckptstore import opening, view
from ckptstore.engine.buffers import BufferPool
from ckptstore.engine.catalogue import Checkpoint
from ckptstore.engine.contents import read_or_rescue
from ckptstore.errors import CheckpointError
from ckptstore.format import layout
from ckptstore.maintenance.heal import Healer
from ckptstore.maintenance.transfer import Carrier
from ckptstore.storage.base import Storage
from ckptstore.storage.memory import MemoryStorage, StoredObject
from ckptstore.storage.s3 import S3Storage, upload
from ckptstore.store import Store
from tests.s3.bucket import MemoryBucket, Open, Stored
from tests.s3.wire import FaultyServer, Request

BUCKET, PREFIX, COPY = "bucket", "runs/a", "runs/b"
BURIED, OLD, LATEST, NEW, NEXT = 1, 2, 3, 4, 5
"""Steps: of what was deleted, of two good checkpoints, of what is saved under faults, of what is saved after them."""

_POOL = BufferPool(48 << 20)
_LARGE = 17 << 20


@functools.cache
def state(step: int, *, large: bool = False) -> dict[str, Any]:
    """Two components, each a data file; with ``large`` one more, of two blocks that compress well."""
    own = torch.Generator().manual_seed(step)
    content: dict[str, Any] = {
        "model": {"weight": torch.randn(500, generator=own), "bias": torch.randn(7, generator=own)},
        "optimizer": {"moment": torch.randn(100, generator=own), "rate": 0.1 * step},
    }
    if large:
        big = torch.zeros(_LARGE, dtype=torch.uint8)
        big[:: 1 << 16] = step
        content["table"] = big
    return content


def same(left: Any, right: Any) -> bool:
    """Whether two states are the same, bit for bit."""
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    return bool(left == right)


@dataclass(frozen=True)
class Image:
    """All that lies in a bucket."""

    objects: dict[str, Stored]
    uploads: dict[str, Open]


class World:
    """A bucket, a server before it, and storages that are opened once: making a client takes longer than most cases."""

    def __init__(self, server: FaultyServer, bucket: MemoryBucket) -> None:
        self.server, self.bucket = server, bucket
        self._storages: dict[tuple[float, float], S3Storage] = {}

    def storage(self, *, read_timeout_s: float = 20.0, deadline_s: float = 15.0) -> S3Storage:
        """As new, with hardly a pause between tries."""
        known = read_timeout_s, deadline_s
        if known not in self._storages:
            options = {
                "key": "ci-access",
                "secret": "ci-secret",
                "endpoint_url": f"http://127.0.0.1:{self.server.port}",
                "client_kwargs": {"region_name": "us-east-1"},
                "config_kwargs": {"read_timeout": read_timeout_s},
                "deadline_s": deadline_s,
            }
            storage = S3Storage(BUCKET, PREFIX, options)
            storage._client._tries.wait = wait_fixed(0.01)
            self._storages[known] = storage
        return copy.copy(self._storages[known])

    def store(self, **how: Any) -> Store:
        """Opened anew, with one thread, so that the same operation makes the same requests in the same order."""
        return opened(self.storage(**how))

    def put(self, image: Image) -> None:
        """Have the bucket hold just that."""
        self.bucket.restore(image.objects)
        self.bucket.uploads = copy.deepcopy(image.uploads)

    def image(self) -> Image:
        return Image(self.bucket.snapshot(), copy.deepcopy(self.bucket.uploads))

    @functools.cached_property
    def empty(self) -> Image:
        return Image({}, {})

    @functools.cached_property
    def filled(self) -> Image:
        """Two good checkpoints, a deleted one before them, and what a save left that died before its commit."""
        self.put(self.empty)
        with self.store() as store:
            dead = store.save(state(9), step=9)
        with self.store() as store:
            for step in (BURIED, OLD, LATEST):
                store.save(state(step), step=step)
            store.delete(f"step:{BURIED}")
        del self.bucket.objects[f"{PREFIX}/commits/{dead.id}.json"]
        self.bucket.uploads["dead"] = Open(f"{PREFIX}/checkpoints/{dead.id}/x.blocks", {})
        return self.image()


def opened(storage: Storage, *, compression: str = "none") -> Store:
    """What ``ckptstore.open`` gives for a storage that is open already, with buffers that all tests share."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opening, "open_storage", lambda url, **how: storage)
        found = ckptstore.open(storage.url, compression=compression, pool_bytes=1, threads=1)
    found._tools.pool = _POOL
    return found


@dataclass(frozen=True)
class Operation:
    """What is done under faults.

    Attributes:
        act: does it, and says what came of it.
        expected: what that must be, where nothing disturbs it.
        steps: the checkpoints there are after it has succeeded.
        looks: whether it changes nothing in the store.
    """

    name: str
    act: Callable[[Store], Any]
    expected: Any
    steps: list[int] = field(default_factory=lambda: [OLD, LATEST])
    empty: bool = False
    looks: bool = False
    compression: str = "none"

    @property
    def saves(self) -> bool:
        """Whether it makes the checkpoint ``NEW``."""
        return NEW in self.steps

    def __str__(self) -> str:
        return self.name

    def run(self, storage: S3Storage) -> Any:
        """Do it in a store opened anew."""
        with pytest.MonkeyPatch.context() as patch:
            # Every block that is compressed goes up as a part of its own.
            patch.setattr(upload, "LEAST_PART_BYTES", 1)
            patch.setattr(view, "open_storage", lambda url, options: beside(storage))
            return self.act(opened(storage, compression=self.compression))


def _save(store: Store) -> int:
    return store.save(state(NEW), step=NEW).step


def _save_in_parts(store: Store) -> int:
    return store.save(state(NEW, large=True), step=NEW).step


def _load(store: Store) -> bool:
    return same(store.load(), state(LATEST))


def _list(store: Store) -> list[int]:
    return [checkpoint.step for checkpoint in store.checkpoints()]


def _prune(store: Store) -> tuple[int, ...]:
    report = store.prune(grace_s=0)
    return len(report.leftovers), len(report.reclaimed), len(report.uploads)


def _hold(store: Store) -> list[str]:
    store.hold("latest", "precious")
    return list(store.holds())


def _copy(store: Store) -> tuple[list[int], bool]:
    report = store.copy(f"s3://{BUCKET}/{COPY}")
    return [checkpoint.step for checkpoint in report.checkpoints], report.ok


def beside(storage: S3Storage) -> S3Storage:
    """The place in the same bucket to which ``copy`` copies."""
    other = copy.copy(storage)
    other.url, other._prefix = f"s3://{BUCKET}/{COPY}", f"{COPY}/"
    return other


def _verify(store: Store) -> tuple[bool, int, int]:
    report = store.verify(record=False)
    return report.ok, len(report.checkpoints), len(report.leftovers)


def _heal(store: Store) -> int:
    """Put every data file of the newest, and its manifest, in place of what is there, as if it were damaged."""
    storage = store._storage
    healer = Healer(storage, Carrier(_POOL, 1))
    latest = store.resolve()
    contents = store.contents(latest)
    for file in contents.files:
        healer.file(contents, file, storage, None)
    key = layout.manifest_key(latest.order)
    healer.record(key, read_or_rescue(storage, key, latest.record.manifest, latest.id, 1 << 20, None))
    return len(contents.files)


OPERATIONS = [
    Operation("save", _save, NEW, [OLD, LATEST, NEW]),
    Operation("first save", _save, NEW, [NEW], empty=True),
    Operation("save in parts", _save_in_parts, NEW, [OLD, LATEST, NEW], compression="zstd"),
    Operation("load", _load, True, looks=True),
    Operation("list", _list, [OLD, LATEST], looks=True),
    Operation("prune", _prune, (1, 1, 1)),
    Operation("delete", lambda store: store.delete(f"step:{OLD}").step, OLD, [LATEST]),
    Operation("undelete", lambda store: store.undelete(f"step:{BURIED}").step, BURIED, [BURIED, OLD, LATEST]),
    Operation("rollback", lambda store: store.rollback(f"step:{OLD}").step, OLD),
    Operation("hold", _hold, ["precious"]),
    Operation("verify", _verify, (True, 2, 1), looks=True),
    Operation("heal", _heal, 2),
    Operation("copy", _copy, ([OLD, LATEST], True), looks=True),
]


def check(world: World, operation: Operation, failed: CheckpointError | None) -> list[int]:
    """What was acknowledged is there, all that is there is whole, and the store goes on working; its steps.

    Judged by the same objects in memory, without the server, whose own work is over now.
    """
    if operation.looks:
        now = world.image()
        assert {key: it for key, it in now.objects.items() if key.startswith(PREFIX)} == world.filled.objects
        assert now.uploads == world.filled.uploads
        _check_copies(_in_memory(world, COPY), failed)
        return [OLD, LATEST]
    store = _in_memory(world, PREFIX)
    listed = store.checkpoints()
    found = {checkpoint.step: checkpoint for checkpoint in listed}
    before = set() if operation.empty else {OLD, LATEST}
    if failed is None:
        assert sorted(found) == operation.steps
    else:
        # Done or not, and nothing else.
        assert set(found) in (before, set(operation.steps))
    assert found.keys() >= before & set(operation.steps), "an acknowledged checkpoint is gone"
    assert list(found) == sorted(found), "latest went back"
    for checkpoint in listed:
        step = checkpoint.step
        large = step == NEW and operation.compression != "none"
        assert same(store.load(checkpoint.id), state(step, large=large)), f"step {step} is not what was saved"
    _goes_on(store, listed)
    return sorted(found)


def _check_copies(store: Store, failed: CheckpointError | None) -> None:
    """Whatever was copied is whole; what ``copy`` said it had copied is there."""
    found = {checkpoint.step: checkpoint for checkpoint in store.checkpoints()}
    assert set(found) <= {OLD, LATEST}
    assert all(same(store.load(checkpoint.id), state(step)) for step, checkpoint in found.items())
    if found and failed is None:
        assert set(found) == {OLD, LATEST}
        assert store.verify().ok


def _in_memory(world: World, prefix: str) -> Store:
    """The store at ``prefix``, as it lies in the bucket now."""
    storage = MemoryStorage()
    objects = world.image().objects.items()
    storage._objects.update({k[len(prefix) + 1 :]: _stored(it) for k, it in objects if k.startswith(f"{prefix}/")})
    return opened(storage)


def _goes_on(store: Store, listed: list[Checkpoint]) -> None:
    saved = store.save(state(NEXT), step=NEXT)
    assert same(store.load(), state(NEXT))
    store.prune(grace_s=0)
    report = store.verify()
    assert report.ok, report.damages
    assert not report.leftovers
    assert not report.foreign
    assert [r.checkpoint.id for r in report.checkpoints] == [*(c.id for c in listed), saved.id]


def _stored(stored: Stored) -> StoredObject:
    return StoredObject(stored.data, stored.modified.timestamp())


def requests_of(world: World, operation: Operation) -> list[Request]:
    """What ``operation`` asks the server for, where nothing disturbs it."""
    world.put(world.empty if operation.empty else world.filled)
    storage = world.storage()
    world.server.arm(lambda number, request: None)
    assert operation.run(storage) == operation.expected
    return list(world.server.requests)
