"""Files cut, extended, zeroed, exchanged and deleted: each is found, and ``latest`` steps around it."""

from __future__ import annotations

import os
import random
from pathlib import Path
from uuid import uuid4

import numpy as np
import pytest

from ckptstore.engine.damage import DamageWarning
from ckptstore.errors import IntegrityError, NoCheckpointError, NotFoundError
from ckptstore.format.tensorfile import BLOCK_BYTES
from tests.integrity.checks import detected, error_of, falls_back, gone, intact, refuses, reports, verified
from tests.integrity.stores import GOOD, NEW, FolderRaw, MemoryRaw, Pair, flat, opened, pair, read, save, silence, state

SMALL = ["commit", "manifest.json", "part-00000.json"]
DATA = ["model.safetensors", "optimizer.safetensors"]


@pytest.fixture(params=["memory", "folder"])
def p(request: pytest.FixtureRequest, store_path: Path) -> Pair:
    """Two checkpoints, in memory and in a folder."""
    return pair(MemoryRaw(uuid4().hex) if request.param == "memory" else FolderRaw(store_path))


@pytest.fixture
def memory_pair() -> Pair:
    return pair(MemoryRaw(uuid4().hex))


def key_of(p: Pair, name: str) -> str:
    return p.commit if name == "commit" else p.key(name)


@pytest.mark.parametrize("name", SMALL)
def test_records_cut_at_every_length(memory_pair: Pair, name: str) -> None:
    """No prefix of a record, and not the empty one, passes for it."""
    p, key = memory_pair, key_of(memory_pair, name)
    data = p.raw.get(key)
    for length in range(len(data)):
        p.raw.put(key, data[:length])
        assert isinstance(refuses(p), IntegrityError)
        if length % 8 == 0:
            reports(p, key)
            falls_back(p)
    p.raw.put(key, data)
    intact(p)


@pytest.mark.parametrize("name", DATA)
def test_data_files_cut(memory_pair: Pair, name: str, full: bool) -> None:
    """About a hundred lengths: the ends, the pages' borders and others at random."""
    p, key = memory_pair, key_of(memory_pair, name)
    data = p.raw.get(key)
    lengths = {0, 1, 7, 8, 9, 4095, 4096, 4097, len(data) - 1, *random.sample(range(len(data)), 300 if full else 90)}
    for length in lengths:
        p.raw.put(key, data[:length])
        detected(p, key)
    p.raw.put(key, data)
    intact(p)


@pytest.mark.parametrize("name", SMALL + DATA)
@pytest.mark.parametrize("more", [b"\0", b" ", b"\n", b"{}", bytes(4096), "itself"], ids=repr)
def test_extended(p: Pair, name: str, more: bytes | str) -> None:
    """Anything behind the last byte is damage, also white space behind a record."""
    key = key_of(p, name)
    data = p.raw.get(key)
    p.raw.put(key, data + (data if isinstance(more, str) else more))
    detected(p, key)


@pytest.mark.parametrize("name", SMALL + DATA)
@pytest.mark.parametrize("fill", [0, 0xFF])
def test_a_page_overwritten(p: Pair, name: str, fill: int) -> None:
    """A page, or the whole of what is shorter, that came back as zeros or ones."""
    key = key_of(p, name)
    data = p.raw.get(key)
    for begin in range(0, len(data), 4096):
        p.raw.put(key, data[:begin] + bytes([fill]) * len(data[begin : begin + 4096]) + data[begin + 4096 :])
        detected(p, key)


@pytest.mark.parametrize("name", SMALL + DATA)
def test_exchanged_with_the_other_checkpoint(p: Pair, name: str) -> None:
    """The same file of another checkpoint, of equal size, proves nothing about this one."""
    key = key_of(p, name)
    other = key.replace(p.bad.id, p.good.id)
    assert len(p.raw.get(key)) == len(p.raw.get(other))
    p.raw.put(key, p.raw.get(other))
    detected(p, key)


def test_exchanged_with_another_store(p: Pair) -> None:
    """A whole checkpoint of another store, put under its own id, is damage of its commit record."""
    other = pair(MemoryRaw(uuid4().hex))
    for key in other.listing():
        p.raw.put(key, other.raw.get(key))
    report = verified(p)
    assert [d.key for d in report.damages] == [other.commit]
    with opened(p.raw.url) as store, pytest.warns(DamageWarning, match="another store"):
        assert flat(store.load("latest")) == dict(NEW)
    with opened(p.raw.url) as store, silence():
        assert isinstance(error_of(lambda: store.load(other.bad.id)), IntegrityError)


def test_two_files_of_a_checkpoint_swapped(p: Pair) -> None:
    """Both are reported; sizes differ or not."""
    one, two = p.key("model.safetensors"), p.key("optimizer.safetensors")
    a, b = p.raw.get(one), p.raw.get(two)
    p.raw.put(one, b)
    p.raw.put(two, a)
    refuses(p)
    assert {damage.key for damage in verified(p).damages} == {one, two}
    falls_back(p)


def test_two_files_of_equal_size_swapped() -> None:
    raw = MemoryRaw(uuid4().hex)
    p = pair(raw, bad={"a/w": b"1" * 64, "b/w": b"2" * 64})
    one, two = p.key("a.safetensors"), p.key("b.safetensors")
    a, b = raw.get(one), raw.get(two)
    assert len(a) == len(b)
    raw.put(one, b)
    raw.put(two, a)
    refuses(p)
    assert {damage.key for damage in verified(p).damages} == {one, two}
    falls_back(p)


@pytest.mark.parametrize("compression", ["none", "zstd", "float-zstd"])
def test_blocks_of_a_file_swapped(store_path: Path, compression: str) -> None:
    """Two full blocks that changed places are both reported, each by its number."""
    raw = FolderRaw(store_path)
    # Half of it random, so that the compressed blocks stay large and of equal length.
    rng = np.random.default_rng(1)
    tensor = rng.integers(0, 16, 3 * BLOCK_BYTES, dtype="u1").tobytes()
    with opened(raw.url) as store:
        good = save(store, state(GOOD, epoch=1), 1)
    with opened(raw.url, compression=compression) as store:
        p = Pair(raw, good, save(store, state({"model/w": tensor}, epoch=2), 2))
        [file] = store.contents(p.bad).files
    first, second = file.entry.blocks[1], file.entry.blocks[2]
    length = min(first.length, second.length)
    fd = os.open(store_path / file.key, os.O_RDWR)
    a, b = os.pread(fd, length, first.offset), os.pread(fd, length, second.offset)
    os.pwrite(fd, b, first.offset)
    os.pwrite(fd, a, second.offset)
    os.close(fd)
    error = refuses(p)
    assert isinstance(error, IntegrityError)
    assert error.block == 1
    assert [damage.block for damage in reports(p, file.key)] == [1, 2]
    falls_back(p)


@pytest.mark.parametrize("name", ["manifest.json", "part-00000.json", *DATA])
def test_deleted(p: Pair, name: str) -> None:
    """A file that is missing is damage of the checkpoint, not its absence."""
    p.raw.remove(p.key(name))
    assert isinstance(refuses(p), IntegrityError)
    [damage] = reports(p, p.key(name))
    assert "missing" in damage.problem
    falls_back(p)


def test_commit_record_deleted(p: Pair) -> None:
    """Without its commit record a checkpoint doesn't exist; verify shows its files as leftovers."""
    p.raw.remove(p.commit)
    with opened(p.raw.url) as store:
        gone(store, p.bad.id)
        assert store.load("latest")["epoch"] == 1
        report = store.verify()
    assert report.ok
    assert [leftover.id for leftover in report.leftovers] == [p.bad.id]


def test_store_json_deleted(p: Pair) -> None:
    """It is reported, costs no checkpoint, and the next save writes it anew with the id that the commits carry."""
    before = p.good.record.store_id
    p.raw.remove("store.json")
    reports(p, "store.json")
    with opened(p.raw.url) as store:
        assert flat(store.load("latest")) == dict(NEW)
        third = save(store, state(GOOD), 3)
    assert third.record.store_id == before
    assert verified(p).ok


def test_writers_deleted(p: Pair) -> None:
    """The next writer's number is above those in the commits."""
    p.raw.remove("writers/0001.json")
    with opened(p.raw.url) as store:
        assert save(store, state(GOOD), 3).id.startswith("0002-")
    assert verified(p).ok


def test_everything_deleted(p: Pair) -> None:
    """An empty store, and one that isn't there for whoever only reads, are different errors."""
    for key in p.raw.listing():
        if key != "store.json":
            p.raw.remove(key)
    with opened(p.raw.url, read_only=True) as store, pytest.raises(NoCheckpointError):
        store.load("latest")
    p.raw.remove("store.json")
    with opened(p.raw.url, read_only=True) as store, pytest.raises(NotFoundError, match="no ckptstore"):
        store.load("latest")


def test_damage_of_one_component_leaves_the_other_readable(memory_pair: Pair) -> None:
    """Only the blocks asked for are read."""
    p = memory_pair
    p.raw.remove(p.key("optimizer.safetensors"))
    with opened(p.raw.url) as store:
        loaded = store.load(p.bad.id, only=["model/*"])
    assert flat(loaded) == {name: data for name, data in NEW.items() if name.startswith("model/")}


def test_a_damaged_block_heals_by_reading_again(memory_pair: Pair) -> None:
    """A flip on the way up, not on the disk, costs one more read."""
    p, key = memory_pair, memory_pair.key("model.safetensors")
    data = p.raw.get(key)
    with opened(p.raw.url) as store:
        open_reader, reads = store._storage.open_reader, []

        def flipping(key: str, **how: object):  # type: ignore[no-untyped-def]
            reader = open_reader(key, **how)
            read_into = reader.read_into

            def once(offset: int, buffer: memoryview) -> int:
                count = read_into(offset, buffer)
                if not reads:
                    buffer[5000 % count] ^= 1
                reads.append(key)
                return count

            reader.read_into = once  # type: ignore[method-assign]
            return reader

        store._storage.open_reader = flipping  # type: ignore[method-assign, assignment]
        assert read(store, store.resolve("latest")) == dict(NEW)
        assert reads.count(key) == 2
    assert p.raw.get(key) == data
