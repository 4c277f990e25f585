"""Small stores to damage: what they hold, how to reach their bytes past the library, and how to forge records."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import ckptstore
from ckptstore.engine.buffers import BufferPool
from ckptstore.engine.catalogue import Checkpoint
from ckptstore.engine.facts import Facts
from ckptstore.engine.reader import read_tensors
from ckptstore.engine.saver import Job
from ckptstore.storage import memory
from ckptstore.storage.memory import StoredObject
from ckptstore.store import Store

POOL = BufferPool(64 << 20)
Tensors = Mapping[str, bytes]


@dataclass(frozen=True)
class Spec:
    name: str
    dtype: str
    shape: tuple[int, ...]
    logical: str | None = None


@dataclass
class Source:
    """Bytes that stand for a live tensor; ``on_read`` is called before they are taken."""

    spec: Spec
    data: bytes
    on_read: Callable[[], None] | None = None
    frozen: bool = False
    fickle: bool = False

    def read_into(self, offset: int, out: memoryview) -> None:
        if self.on_read is not None:
            self.on_read()
        out[:] = self.data[offset : offset + len(out)]

    def view(self, offset: int, length: int) -> memoryview:
        if self.on_read is not None:
            self.on_read()
        return memoryview(self.data)[offset : offset + length]

    near = True
    region = None

    def moved(self) -> bool:
        return False

    def rebase(self) -> None:
        pass

    def release(self) -> None:
        pass


@dataclass
class State:
    """What ``capture`` would give for {component: {name: uint8 tensor}} and a few plain values."""

    sources: Sequence[Source]
    tree: Any
    parameters: int = 0


def state(tensors: Tensors, *, on_read: Callable[[], None] | None = None, **values: Any) -> State:
    """``tensors`` by names like ``model/w``, and plain values beside them."""
    tree: dict[str, Any] = dict(values)
    for name in tensors:
        component, _, rest = name.partition("/")
        tree.setdefault(component, {})[rest] = {"$": "tensor", "name": name}
    return State([Source(Spec(name, "U8", (len(data),)), data, on_read) for name, data in tensors.items()], tree)


def save(store: Store, what: State, step: int, **metrics: float) -> Checkpoint:
    """Save past ``capture``, so that no torch is needed."""
    modes = dict.fromkeys(metrics, "min")
    return store._dispatcher.save(Job(what, Facts(step, None, metrics, modes, [f"step {step}"])))


class Sink:
    def __init__(self, length: int) -> None:
        self.data = bytearray(length)
        self.region = None

    def host(self) -> memoryview:
        return memoryview(self.data)


def read(store: Store, checkpoint: Checkpoint) -> dict[str, bytes]:
    """The tensors of ``checkpoint`` by name, without torch."""
    contents = store.contents(checkpoint)
    files = {file.entry.prefix + row.name: row.nbytes for file in contents.files for row in file.stream.rows}
    sinks = {name: Sink(length) for name, length in files.items()}
    read_tensors(store._storage, contents, sinks, pool=POOL, threads=1)
    return {name: bytes(sink.data) for name, sink in sinks.items()}


def flat(loaded: Any) -> dict[str, bytes]:
    """The tensors in what ``store.load`` gave, as ``read`` gives them."""
    found = {}
    for component, inner in loaded.items():
        if isinstance(inner, dict):
            found.update({f"{component}/{name}": bytes(t.numpy()) for name, t in inner.items()})
    return found


def opened(url: str, **options: Any) -> Store:
    """A store opened anew, as another process would, with one thread and shared buffers."""
    store = ckptstore.open(url, **{"threads": 1, "pool_bytes": 1, **options})
    store._tools.pool = POOL
    return store


class Raw(Protocol):
    """The objects of a store as they lie there."""

    url: str

    def get(self, key: str) -> bytes: ...
    def put(self, key: str, data: bytes) -> None: ...
    def remove(self, key: str) -> None: ...
    def listing(self) -> list[str]: ...


class MemoryRaw:
    """Objects of ``memory://name``."""

    def __init__(self, name: str) -> None:
        self.url = f"memory://{name}"
        self.objects = memory._spaces.setdefault(name, {})

    def get(self, key: str) -> bytes:
        return bytes(self.objects[key].data)

    def put(self, key: str, data: bytes) -> None:
        modified = self.objects[key].modified if key in self.objects else 0.0
        self.objects[key] = StoredObject(data, modified)

    def remove(self, key: str) -> None:
        del self.objects[key]

    def listing(self) -> list[str]:
        return sorted(self.objects)


class FolderRaw:
    """Files of a local store."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.url = str(path)

    def get(self, key: str) -> bytes:
        return (self.path / key).read_bytes()

    def put(self, key: str, data: bytes) -> None:
        (self.path / key).parent.mkdir(parents=True, exist_ok=True)
        (self.path / key).write_bytes(data)

    def remove(self, key: str) -> None:
        (self.path / key).unlink()

    def listing(self) -> list[str]:
        return sorted(str(p.relative_to(self.path)) for p in self.path.rglob("*") if not p.is_dir())


GOOD: Tensors = {"model/w": bytes(range(200)), "model/b": b"bias", "optimizer/m": bytes(range(100, 180))}
NEW: Tensors = {"model/w": bytes(range(50, 250)), "model/b": b"BIAS", "optimizer/m": bytes(range(20, 100))}


@dataclass(frozen=True)
class Pair:
    """A store of two checkpoints: ``good``, and the newer ``bad`` that a test damages."""

    raw: Raw
    good: Checkpoint
    bad: Checkpoint

    @property
    def commit(self) -> str:
        return f"commits/{self.bad.id}.json"

    def key(self, name: str) -> str:
        return f"checkpoints/{self.bad.id}/{name}"

    def listing(self) -> list[str]:
        """Every object of ``bad``."""
        return [key for key in self.raw.listing() if self.bad.id in key]


def pair(raw: Raw, good: Tensors = GOOD, bad: Tensors = NEW, **options: Any) -> Pair:
    """Save ``good`` at step 1 and ``bad`` at step 2."""
    with opened(raw.url, **options) as store:
        return Pair(raw, save(store, state(good, epoch=1), 1, loss=2.0), save(store, state(bad, epoch=2), 2, loss=1.0))


@contextmanager
def silence() -> Iterator[list[warnings.WarningMessage]]:
    """Collect warnings, which are errors otherwise."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught


def compact(fields: Any) -> bytes:
    return json.dumps(fields, separators=(",", ":")).encode()


def sealed(fields: Mapping[str, Any]) -> bytes:
    """``fields`` with a seal that holds, as the specification defines it, whatever they are."""
    content = {name: value for name, value in fields.items() if name != "self"}
    content["self"] = hashlib.sha256(compact(content)).hexdigest()
    return json.dumps(content, indent=1).encode() + b"\n"


@dataclass
class Forge:
    """A checkpoint taken apart; ``write`` puts it back with hashes that hold all the way up."""

    raw: Raw
    id: str
    commit: dict[str, Any] = field(init=False)
    manifest: dict[str, Any] = field(init=False)
    part: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.folder = f"checkpoints/{self.id}"
        self.commit = json.loads(self.raw.get(f"commits/{self.id}.json"))
        self.manifest = json.loads(self.raw.get(f"{self.folder}/manifest.json"))
        self.part = json.loads(self.raw.get(f"{self.folder}/part-00000.json"))

    def write(self, *, part: bytes | None = None, manifest: bytes | None = None, commit: bytes | None = None) -> None:
        """Write the records, or these bytes in their place."""
        part = compact(self.part) if part is None else part
        if manifest is None and self.manifest["parts"]:
            self.manifest["parts"][0].update(size=len(part), sha256=hashlib.sha256(part).hexdigest())
        manifest = compact(self.manifest) if manifest is None else manifest
        self.commit["manifest"] = {"size": len(manifest), "sha256": hashlib.sha256(manifest).hexdigest()}
        self.raw.put(f"{self.folder}/part-00000.json", part)
        self.raw.put(f"{self.folder}/manifest.json", manifest)
        self.raw.put(f"commits/{self.id}.json", sealed(self.commit) if commit is None else commit)
