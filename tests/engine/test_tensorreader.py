"""Any bytes of any tensor, and states that are made while they are written."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import ckptstore as cs
from ckptstore.engine.streamed import Computed, Streamed
from ckptstore.engine.tensorreader import BlockCache, TensorReader
from ckptstore.format.tensorfile import BLOCK_BYTES, TensorRow
from ckptstore.tools.elements import element_type
from tests.ranks import golden


def state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "model/large": torch.randn(2300, 2048, generator=generator),
        "model/half": torch.randn(1001, 999, generator=generator).bfloat16(),
        "model/scalar": torch.tensor(3.0),
        "optimizer/empty": torch.empty(0, 4),
        "optimizer/pairs": torch.randn(70, 3, generator=generator, dtype=torch.complex128),
    }


def nested(tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        component, _, rest = name.partition("/")
        found.setdefault(component, {})[rest] = tensor
    return found


def image(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def pieces(reader: TensorReader, name: str) -> Iterator[torch.Tensor]:
    """All elements of a tensor in order, a MiB at a time."""
    row = reader.tensors[name]
    for begin in range(0, row.nbytes, 1 << 20):
        piece = bytearray(min(1 << 20, row.nbytes - begin))
        reader.read_into(name, begin, memoryview(piece))
        yield torch.frombuffer(piece, dtype=element_type(row))


def check(reader: TensorReader, images: Mapping[str, bytes], seed: int) -> None:
    """Read random bytes of it."""
    chance = random.Random(seed)
    for _ in range(60):
        name = chance.choice(list(images))
        begin = chance.randint(0, len(images[name]))
        out = bytearray(chance.randint(0, min(len(images[name]) - begin, 3 << 20)))
        reader.read_into(name, begin, memoryview(out))
        assert out == images[name][begin : begin + len(out)]


@pytest.mark.parametrize("compression", ["none", "zstd"])
@pytest.mark.parametrize("blocks", [1, 3])
def test_any_bytes_are_as_saved(compression: str, blocks: int) -> None:
    """Also where threads wait for each other's blocks, of which the cache has too few for all."""
    tensors = state()
    images = {name: image(tensor) for name, tensor in tensors.items()}
    with cs.open(f"memory://reader-{compression}-{blocks}", compression=compression) as store:
        store.save(nested(tensors), step=1)
        with store.reader("latest", cache=BlockCache(blocks * BLOCK_BYTES)) as reader:
            assert {name: row.nbytes for name, row in reader.tensors.items()} == {n: len(i) for n, i in images.items()}
            with ThreadPoolExecutor(4) as pool:
                for done in [pool.submit(check, reader, images, seed) for seed in range(4)]:
                    done.result()
            for name, tensor in tensors.items():
                parts = list(pieces(reader, name))
                assert torch.equal(torch.cat(parts) if parts else torch.empty(0), tensor.reshape(-1))


def test_shards_of_several_ranks_are_whole_tensors() -> None:
    with cs.open(golden.PLACE, read_only=True, ranks="one") as store:
        whole = store.load("latest")
        with store.reader("latest") as reader:
            sharded = {n for file in reader.contents.files for n in map(file.name, range(len(file.stream.rows)))}
            assert len(reader.contents.parts) == golden.SIZE
            names = [name for name in whole["model"] if f"model/{name}" in sharded]
            assert names
            images = {f"model/{name}": image(whole["model"][name].detach()) for name in names}
            check(reader, images, 0)
            for name, bytes_ in images.items():
                out = bytearray(len(bytes_))
                reader.read_into(name, 0, memoryview(out))
                assert out == bytes_


def test_in_storage_order_each_block_is_read_once() -> None:
    with cs.open("memory://reader-order") as store:
        saved = store.save({"model": state()}, step=1)
        with store.reader("latest", cache=BlockCache(BLOCK_BYTES)) as reader:
            for file in reader.contents.files:
                for row in file.stream.rows:
                    for _ in pieces(reader, file.entry.prefix + row.name):
                        pass
            assert reader.read_bytes == saved.stored_bytes


def test_what_is_not_there_is_refused() -> None:
    with cs.open("memory://reader-missing") as store:
        store.save({"x": torch.zeros(3)}, step=1)
        with store.reader("latest") as reader:
            with pytest.raises(cs.NotFoundError, match="has no tensor 'y'"):
                reader.read_into("y", 0, memoryview(bytearray(1)))
            with pytest.raises(ValueError, match="outside of 12"):
                reader.read_into("x", 8, memoryview(bytearray(5)))


def read(store: cs.Store, name: str, offset: int, out: bytearray) -> None:
    with store.reader("latest") as reader:
        reader.read_into(name, offset, memoryview(out))


def read_deleted(store: cs.Store) -> None:
    with store.reader("latest") as reader:
        store.delete("latest", reclaim=True)
        reader.read_into("x", 0, memoryview(bytearray(4)))


def damage(root: Path) -> None:
    (file,) = root.glob("checkpoints/*/model.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def test_damage_is_told_and_asked_of_a_backup(tmp_path: Path) -> None:
    weight = torch.arange(6_000_000, dtype=torch.float32)
    with cs.open(tmp_path / "a", backup=tmp_path / "b") as store:
        store.save({"model": {"w": weight}}, step=1, durable="backup")
    damage(tmp_path / "a")
    out = bytearray(4)
    with cs.open(tmp_path / "a", read_only=True) as store, store.reader("latest") as reader:
        reader.read_into("model/w", 0, memoryview(out))
        for _ in range(2):
            with pytest.raises(cs.IntegrityError, match="model/w") as caught:
                reader.read_into("model/w", 23_999_996, memoryview(out))
            assert caught.value.block == 1
    with cs.open(tmp_path / "a", backup=tmp_path / "b") as store:
        with pytest.warns(cs.DamageWarning, match="is repaired"):
            read(store, "model/w", 23_999_996, out)
        assert out == image(weight)[-4:]
    with cs.open(tmp_path / "a", read_only=True) as store:
        assert store.verify().ok


def test_a_checkpoint_that_is_deleted_meanwhile_is_no_damage(tmp_path: Path) -> None:
    with cs.open(tmp_path) as store:
        store.save({"x": torch.zeros(10)}, step=1)
        with pytest.raises(cs.NotFoundError, match="deleted"):
            read_deleted(store)


def computed(row: TensorRow, bytes_: bytes, calls: list[int]) -> Computed:
    def fill(offset: int, out: memoryview) -> None:
        calls.append(threading.get_ident())
        out[:] = bytes_[offset : offset + len(out)]

    return Computed(row, fill)


def test_a_streamed_state_is_saved_like_any_other() -> None:
    tensors = {"model": {"w": torch.randn(5_000_000), "b": torch.randn(7)}}
    with cs.open("memory://streamed") as store:
        store.save(tensors, step=1)
        with store.reader("latest") as reader:
            calls: list[int] = []
            rows = [row._replace(name=name) for name, row in reader.tensors.items()]
            sources = [computed(row, image(tensors["model"][row.name[6:]]), calls) for row in rows]
            saved = store.save_streamed(Streamed(reader.tree, sources, 7), step=2, epoch=1, reasons=["made"])
        assert (saved.step, saved.epoch, saved.reasons, saved.parameters) == (2, 1, ("made",), 7)
        assert saved.raw_bytes == store.resolve("step:1").raw_bytes
        loaded = store.load("latest")
        assert all(torch.equal(loaded["model"][name], tensor) for name, tensor in tensors["model"].items())
        assert len(calls) >= 3
        assert store.verify().ok


def test_a_streamed_state_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fill(offset: int, out: memoryview) -> None:
        if offset:
            raise cs.IntegrityError("one of its parents is damaged")

    with cs.open(tmp_path) as store:
        store.save({"x": 1}, step=1)
        source = Computed(TensorRow("model/w", "F32", (5_000_000,)), fill)
        with pytest.raises(cs.SaveFailedError, match="one of its parents is damaged"):
            store.save_streamed(Streamed({"model": {"w": {"$": "tensor", "name": "model/w"}}}, [source], 0), step=2)
        assert [c.step for c in store.checkpoints()] == [1]
        assert not store.verify().leftovers
