"""One flipped bit anywhere is found: by loading, by verifying, and ``latest`` steps around it."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from uuid import uuid4

import numpy as np
import pytest

from ckptstore.engine.buffers import BufferPool
from ckptstore.engine.catalogue import Damage
from ckptstore.engine.contents import Contents
from ckptstore.engine.damage import DamageWarning
from ckptstore.engine.reader import BlockTask, check_blocks, open_file
from ckptstore.errors import CheckpointError, IntegrityError
from ckptstore.format.tensorfile import BLOCK_BYTES
from ckptstore.storage.memory import StoredObject
from ckptstore.store import Store
from tests.integrity.checks import detected, falls_back, intact, refuses, reports, verified
from tests.integrity.stores import GOOD, NEW, FolderRaw, MemoryRaw, Pair, flat, opened, pair, read, save, silence, state

ALL_DAMAGED = r"every checkpoint is damaged \(2 in all\)"

EVERY = 4
"""Each so-many-th bit gets the whole examination in the sampled run, the others the one that is quick."""


@pytest.fixture
def memory_pair() -> Pair:
    return pair(MemoryRaw(uuid4().hex))


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def chosen(bits: int, full: bool, share: int) -> Iterator[int]:
    """All bits, or every ``share``-th from a random one on."""
    return iter(range(0 if full else random.randrange(share), bits, 1 if full else share))


@pytest.mark.parametrize("name", ["commit", "manifest"])
def test_every_bit_of_commit_record_and_manifest(memory_pair: Pair, name: str, full: bool) -> None:
    """Each flip is refused by id; and is reported, and stepped around, wherever that was tried."""
    p = memory_pair
    key = p.commit if name == "commit" else p.key("manifest.json")
    data = p.raw.get(key)
    for bit in range(len(data) * 8):
        p.raw.put(key, flipped(data, bit))
        assert isinstance(refuses(p), IntegrityError)
        if full or bit % EVERY == 0:
            reports(p, key)
            falls_back(p)
    p.raw.put(key, data)
    intact(p)


def test_bits_of_the_part(memory_pair: Pair, full: bool) -> None:
    """Every bit in the full run."""
    p, key = memory_pair, memory_pair.key("part-00000.json")
    data = p.raw.get(key)
    for bit in chosen(len(data) * 8, full, 16):
        p.raw.put(key, flipped(data, bit))
        detected(p, key)
    p.raw.put(key, data)
    intact(p)


def test_bits_of_store_json(memory_pair: Pair, full: bool) -> None:
    """A damaged store.json is named by a warning and by verify, costs no checkpoint, and stops no save."""
    p, key = memory_pair, "store.json"
    data = p.raw.get(key)
    for bit in chosen(len(data) * 8, full, 16):
        p.raw.put(key, flipped(data, bit))
        reports(p, key)
        with opened(p.raw.url) as store, pytest.warns(DamageWarning, match=r"store\.json"):
            assert flat(store.load("latest")) == dict(NEW)
        with opened(p.raw.url) as store, silence():
            third = save(store, state(GOOD), 3)
            assert third.record.store_id == p.good.record.store_id
            assert flat(store.load("latest")) == dict(GOOD)
            store.delete(third.id)
            store.prune(grace_s=0)
    p.raw.put(key, data)
    intact(p)


def test_bits_of_the_other_records(memory_pair: Pair, full: bool) -> None:
    """A damaged writer record, hold or tombstone is reported; what a damaged hold may pin can't be deleted."""
    p = memory_pair
    with opened(p.raw.url) as store:
        store.hold(p.bad.id, "pinned")
    third = save(opened(p.raw.url), state(GOOD), 3)
    with opened(p.raw.url) as store:
        store.delete(third.id)
    for key in ("writers/0001.json", "holds/pinned.json", f"trash/{third.id}.json"):
        data = p.raw.get(key)
        for bit in chosen(len(data) * 8, full, 16):
            p.raw.put(key, flipped(data, bit))
            reports(p, key)
            with opened(p.raw.url) as store, silence():
                assert flat(store.load("latest")) == dict(NEW)
                assert [c.id for c in store.deleted()] == [third.id]
                if key.startswith("holds/"):
                    with pytest.raises(IntegrityError, match="pinned"):
                        store.delete(p.bad.id)
        p.raw.put(key, data)


def test_bits_of_small_data_files(memory_pair: Pair, full: bool) -> None:
    """Random bits of files of one short block: verify names file, block and tensors."""
    p = memory_pair
    names = {"model.safetensors": ["model/b", "model/w"], "optimizer.safetensors": ["optimizer/m"]}
    for name, tensors in names.items():
        key, data = p.key(name), p.raw.get(p.key(name))
        for bit in random.sample(range(len(data) * 8), 3400 if full else 400):
            p.raw.put(key, flipped(data, bit))
            error = refuses(p)
            assert isinstance(error, IntegrityError)
            assert (error.key, error.block) == (key, 0)
            [damage] = reports(p, key)
            assert (damage.id, damage.block, list(damage.tensors)) == (p.bad.id, 0, tensors)
            falls_back(p)
        p.raw.put(key, data)
    intact(p)


class Blocks:
    """One checkpoint's data file, of which single blocks are verified."""

    def __init__(self, store: Store, contents: Contents) -> None:
        self.store, self.contents, self.pool = store, contents, BufferPool(1)
        [self.file] = contents.files

    def damages(self, number: int) -> list[Damage]:
        found: list[Damage] = []

        def damaged(task: BlockTask, error: CheckpointError) -> None:
            assert isinstance(error, IntegrityError)
            found.append(Damage(error.key or "", str(error), error.id, error.block, task.file.names_in(task.number)))

        with closing(open_file(self.store._storage, self.file, "")) as reader:
            task = BlockTask(self.file, reader, number, [])
            check_blocks(self.contents, iter([task]), lambda *_: None, pool=self.pool, threads=1, damaged=damaged)
        return found

    def check(self, bit: int) -> None:
        """The flipped ``bit`` is found in its block, and only there."""
        offset = bit // 8
        number = next(n for n, b in enumerate(self.file.entry.blocks) if b.offset <= offset < b.offset + b.length)
        [damage] = self.damages(number)
        assert (damage.key, damage.block) == (self.file.key, number)
        rows, begins = self.file.stream.rows, self.file.stream.begins
        low, high = number * BLOCK_BYTES, (number + 1) * BLOCK_BYTES
        inside = [r.name for r, a, b in zip(rows, begins, begins[1:], strict=False) if a < high and b > low]
        assert [name.removeprefix("model/") for name in damage.tensors] == inside


def numbers(count: int) -> bytes:
    """Compressible, and no block like another."""
    return np.arange(count // 4, dtype="<u4").tobytes()


SIZES = {"300 KB": 300_000, "40 MB": 40_000_000}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("compression", ["none", "zstd", "float-zstd"])
def test_bits_of_large_data_files(size: str, compression: str, full: bool) -> None:
    """Random bits of files of one and of several blocks, stored as they are or compressed."""
    raw = MemoryRaw(uuid4().hex)
    data = numbers(SIZES[size])
    tensors = {f"model/{n}": data[n * len(data) // 7 : (n + 1) * len(data) // 7] for n in range(7)}
    with opened(raw.url, compression=compression) as store:
        checkpoint = save(store, state(tensors), 1)
        blocks = Blocks(store, store.contents(checkpoint))
    assert {block.codec for block in blocks.file.entry.blocks} == {compression}
    stored = bytearray(raw.get(blocks.file.key))
    # Changed in place: a copy of the whole file for each bit would take longer than the check.
    raw.objects[blocks.file.key] = StoredObject(stored, 0.0)  # type: ignore[arg-type]
    blocks.store = opened(raw.url)
    # Ends of blocks and of the header are where a check could miss one.
    edges = [offset + by for b in blocks.file.entry.blocks for offset, by in ((b.offset, 0), (b.offset + b.length, -1))]
    bits = [edge * 8 for edge in edges]
    bits += random.sample(range(len(stored) * 8), (1500 if size == "40 MB" else 3000) if full else 150)
    for bit in bits:
        stored[bit // 8] ^= 1 << bit % 8
        blocks.check(bit)
        stored[bit // 8] ^= 1 << bit % 8
    assert verified(Pair(raw, checkpoint, checkpoint)).ok
    raw.objects.clear()


@pytest.mark.parametrize("threads", [1, 4])
def test_bits_of_local_files(store_path: Path, full: bool, threads: int) -> None:
    """The same through the local storage with direct I/O and several threads, by writing into the file."""
    tensors = {"model/a": numbers(9_000_000), "model/b": numbers(9_000_001)}
    raw = FolderRaw(store_path)
    with opened(str(store_path), threads=threads) as store:
        good = save(store, state(GOOD, epoch=1), 1)
        p = Pair(raw, good, save(store, state(tensors, epoch=2), 2))
        [file] = store.contents(p.bad).files
    size = (store_path / file.key).stat().st_size
    fd = os.open(store_path / file.key, os.O_RDWR)
    for bit in random.sample(range(size * 8), 400 if full else 12):
        [byte] = os.pread(fd, 1, bit // 8)
        os.pwrite(fd, bytes([byte ^ 1 << bit % 8]), bit // 8)
        with opened(str(store_path), threads=threads) as store, pytest.raises(IntegrityError) as caught:
            read(store, store.resolve(p.bad.id))
        assert (caught.value.key, caught.value.block) == (file.key, bit // 8 // BLOCK_BYTES)
        [damage] = reports(p, file.key)
        assert damage.block == bit // 8 // BLOCK_BYTES
        falls_back(p)
        os.pwrite(fd, bytes([byte]), bit // 8)
    os.close(fd)
    intact(p)


def test_all_checkpoints_damaged_is_no_empty_store(memory_pair: Pair) -> None:
    """Where every checkpoint is damaged, the error lists them and is not the one that means a fresh start."""
    p = memory_pair
    for id in (p.good.id, p.bad.id):
        key = f"checkpoints/{id}/model.safetensors"
        p.raw.put(key, flipped(p.raw.get(key), 8000))
    with opened(p.raw.url) as store, silence(), pytest.raises(IntegrityError, match=ALL_DAMAGED) as caught:
        store.load("latest")
    assert p.good.id in str(caught.value)
    for id in (p.good.id, p.bad.id):
        p.raw.put(f"commits/{id}.json", b"torn")
    with opened(p.raw.url) as store, silence(), pytest.raises(IntegrityError, match=ALL_DAMAGED):
        store.load("latest")
