"""Records changed at random, with hashes put right or not: only the library's errors come out."""

from __future__ import annotations

import json
import random
import resource
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from ckptstore.state.decode import _HANDLERS
from ckptstore.state.values import VALUE_DECODERS
from tests.integrity.checks import error_of
from tests.integrity.stores import GOOD, NEW, Forge, MemoryRaw, Pair, compact, opened, pair, read, sealed, silence

VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 2**31, 2**32, 2**47, 2**53, 2**63 - 1, 2**63, 2**64, 10**30, 0.0, 1.5, 1e308),
    *("", "x", "../..", "none", "zstd", "blake3", "sha256", "U8", "F64", "\0", "\ud800", "é", "x" * 5000, "-inf"),
    *([], {}, [[]], [0], [2**62, 2**62], {"$": "tensor"}, {"$": "dict", "items": [[1]]}, {"$": []}, [None] * 50),
]
KINDS = sorted({*_HANDLERS, *VALUE_DECODERS})
FIELDS = ["items", "fields", "state", "type", "name", "value", "entries", "groups", "tensor", "parameter", "factory"]

TOKENS = [b"{", b"}", b"[", b'"', b",", b"\\u0000", b"1e999", b"NaN", b"\xff", b"0"]

TREE = {
    "epoch": 2,
    "lr": 0.5,
    "names": ["a", None, True],
    "betas": {"$": "tuple", "items": [0.9, 0.999]},
    "seen": {"$": "set", "items": [1, 2]},
    "keyed": {"$": "dict", "items": [[1, "one"], [{"$": "tuple", "items": [1, 2]}, 3]]},
    "model": {
        "w": {"$": "tensor", "name": "model/w"},
        "b": {"$": "tensor", "name": "model/b", "parameter": True},
        "array": {"$": "ndarray", "name": "model/w", "dtype": "|u1"},
        "raw": {"$": "bytes", "tensor": "model/b"},
    },
    "optimizer": {"m": {"$": "tensor", "name": "optimizer/m"}},
}
"""One of several kinds of nodes, so that changes reach into their decoders."""


def places(node: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Every (container, key) in ``node``."""
    entries = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in list(entries):
        found.append((node, key))
        places(child, found)
    return found


def copied(value: Any) -> Any:
    """A value that shares nothing with ``value``."""
    return json.loads(json.dumps(value))


def change_value(record: Any, rng: random.Random) -> None:
    """Replace, remove, double, swap or nest something in the record."""
    spots = places(record, [])
    if not spots:
        return
    container, key = rng.choice(spots)
    action = rng.randrange(7)
    if action <= 1:
        container[key] = copied(rng.choice(VALUES))
    elif action == 2:
        del container[key]
    elif action == 3:
        other, its = rng.choice(spots)
        container[key] = copied(other[its])
    elif action == 4:
        container[key] = {"$": rng.choice(KINDS), rng.choice(FIELDS): container[key], rng.choice(FIELDS): 1}
    elif action == 5 and isinstance(container[key], int):
        container[key] += rng.choice([-1, 1, 4096, 2**32, -(2**31)])
    elif isinstance(container, list):
        container.insert(key, copied(container[key]))
    else:
        container[rng.choice(FIELDS)] = copied(container[key])


def change_bytes(data: bytes, rng: random.Random) -> bytes:
    """Flip, cut, insert, splice or repeat bytes."""
    a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    action = rng.randrange(5)
    if action == 0 and data:
        at = a % len(data)
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    if action == 1:
        return data[:a] + data[b:]
    if action == 2:
        return (
            data[:a]
            + rng.choice([b"{", b"}", b"[", b'"', b",", b"\\u0000", b"1e999", b"NaN", b"\xff", b"0"])
            + data[a:]
        )
    if action == 3:
        return data[:a] + data[a:b] * 2 + data[b:]
    return data[:a] + data[b:] + data[a:b]


class Fuzzer:
    """One store, changed and put back many thousand times."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.raw = MemoryRaw(uuid4().hex)
        self.pair: Pair = pair(self.raw)
        with opened(self.raw.url) as store:
            store.hold(self.pair.good.id, "paper")
            store.hold(self.pair.bad.id, "demo")
        forge = Forge(self.raw, self.pair.bad.id)
        forge.part["tree"] = TREE
        forge.write()
        self.before = dict(self.raw.objects)
        self.outcomes: Counter[str] = Counter()
        self.targets: list[Callable[[], None]] = [self.sealed_record, self.sealed_record, self.chain, self.chain]
        self.targets += [self.part_tree, self.any_bytes, self.proven_bytes, self.swapped]

    def reset(self) -> None:
        self.raw.objects.clear()
        self.raw.objects.update(self.before)

    def changed(self, record: Any) -> Any:
        for _ in range(self.rng.choice([1, 1, 1, 2, 5])):
            change_value(record, self.rng)
        return record

    def sealed_record(self) -> None:
        """A small record of any kind, changed and sealed again."""
        keys = ["store.json", "writers/0001.json", "holds/paper.json", "holds/demo.json", self.pair.commit]
        key = self.rng.choice(keys)
        self.raw.put(key, sealed(self.changed(json.loads(self.raw.get(key)))))

    def chain(self) -> None:
        """Commit record, manifest or part, changed, with every hash above put right."""
        forge = Forge(self.raw, self.pair.bad.id)
        kind = self.rng.choice(["commit", "manifest", "part", "part"])
        record = self.changed(getattr(forge, kind))
        if kind == "manifest":
            forge.write(manifest=compact(record))
        else:
            forge.write()

    def part_tree(self) -> None:
        forge = Forge(self.raw, self.pair.bad.id)
        forge.part["tree"] = self.changed({"tree": forge.part["tree"]}).get("tree")
        forge.write()

    def any_bytes(self) -> None:
        """Bytes of any object, with nothing put right."""
        key = self.rng.choice(self.raw.listing())
        self.raw.put(key, change_bytes(self.raw.get(key), self.rng))

    def proven_bytes(self) -> None:
        """Bytes of manifest or part, with the hashes above put right."""
        forge = Forge(self.raw, self.pair.bad.id)
        if self.rng.random() < 0.5:
            forge.write(manifest=change_bytes(compact(forge.manifest), self.rng))
        else:
            forge.write(part=change_bytes(compact(forge.part), self.rng))

    def swapped(self) -> None:
        """Two objects exchanged."""
        one, two = self.rng.sample(self.raw.listing(), 2)
        a, b = self.raw.get(one), self.raw.get(two)
        self.raw.put(one, b)
        self.raw.put(two, a)

    def attempt(self, action: Callable[[], object]) -> None:
        error = error_of(action)
        self.outcomes[error.code if error else "ok"] += 1
        assert len(str(error).encode()) < 20_000

    def step(self) -> None:
        self.rng.choice(self.targets)()
        id = self.pair.bad.id
        with opened(self.raw.url) as store, silence() as caught:
            for action in (
                store.checkpoints,
                lambda: read(store, store.resolve(id)),
                lambda: store.load(id),
                lambda: store.load("latest"),
                lambda: store.resolve("best:loss"),
                lambda: store.resolve("paper"),
                store.holds,
                store.verify,
            ):
                self.attempt(action)
        for warning in caught:
            str(warning.message).encode()
        self.reset()


@pytest.fixture
def little_memory() -> Iterator[None]:
    """1 GiB more than is used now; a record that asks for more ends in a MemoryError."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


CHANGES = 1250


@pytest.mark.timeout(1800)
@pytest.mark.skipif(sys.platform != "linux", reason="limits memory by /proc")
@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("part", [0, 1, *(pytest.param(part, marks=pytest.mark.full) for part in (2, 3))])
def test_fuzz(part: int, full: bool) -> None:
    """2,500 changes in all, 100,000 in the full run; the seed is in the message of what fails."""
    for run in range(20 if full else 1):
        seed = random.randrange(1 << 40) if full else part * 1000 + run
        fuzzer = Fuzzer(seed)
        for number in range(CHANGES):
            try:
                fuzzer.step()
            except Exception as error:
                raise AssertionError(f"seed {seed}, change {number}: {type(error).__name__}: {error}") from error
        # Both ways were taken: changes that are refused, and changes that say nothing else.
        for outcome in ("ok", "format", "integrity"):
            assert fuzzer.outcomes[outcome] > CHANGES / 5
        with opened(fuzzer.raw.url) as store:
            assert store.load("latest")["epoch"] == 2
            assert read(store, store.resolve("latest")) == dict(NEW)
            assert read(store, store.resolve(fuzzer.pair.good.id)) == dict(GOOD)
