"""Checkpoints of PyTorch's own ``FileSystemWriter`` come into a store whole, and nothing in them runs."""

from __future__ import annotations

import io
import os
import pickle
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

import ckptstore as cs
from ckptstore.integrations.dcp import CkptStoreSavePlanner, import_dcp

pytestmark = pytest.mark.usefixtures("sandbox")


class Foreign:
    """What only its own code can bring back."""


class Bomb:
    """Runs when it is unpickled."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.how = (function, arguments)

    def __reduce__(self) -> Any:
        return self.how


def write(folder: Path, state: dict[str, Any], **options: Any) -> Path:
    planner = options.pop("planner", None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, storage_writer=FileSystemWriter(folder, **options), planner=planner, no_dist=True)
    return folder


def state() -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        "model": OrderedDict((f"layers.{n}.weight", torch.randn(3, 4)) for n in range(3)),
        "types": {str(dtype): torch.ones(5).to(dtype) for dtype in (torch.bfloat16, torch.int8, torch.complex64)},
        "optim": {"groups": [{"lr": 0.1, "betas": (0.9, 0.99), "params": [0, 1]}], "step": torch.tensor(3.0)},
        "mixed": [{}, torch.zeros(0, 3), [1, 2.5, None], {"deep": [{"x": torch.arange(6)}]}],
        "seen": {1, 2},
        "text": "naïve",
    }


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@pytest.fixture
def store(tmp_path: Path) -> cs.Store:
    return cs.open(f"memory://{tmp_path.name}")


@pytest.mark.parametrize(
    "options", [{}, {"single_file_per_rank": False}, {"thread_count": 3}], ids=["plain", "file each", "threads"]
)
def test_a_nested_state(options: dict[str, Any], tmp_path: Path, store: cs.Store) -> None:
    """It is nested again as it was, bit for bit, and is a checkpoint like any other."""
    folder = write(tmp_path / "dcp", state(), **options)
    saved = import_dcp(folder, store, step=7, epoch=2, metrics={"loss": 0.5}, reasons=["moved"])
    assert (saved.step, saved.epoch, saved.metrics) == (7, 2, {"loss": 0.5})
    assert list(saved.reasons) == [f"imported from {folder}", "moved"]
    assert same(store.load("latest"), state())
    assert store.verify().ok


def test_objects_of_our_planner(tmp_path: Path, store: cs.Store) -> None:
    """What DCP's writer has saved with our planner has JSON for its objects."""
    import_dcp(write(tmp_path / "dcp", state(), planner=CkptStoreSavePlanner()), store, step=1)
    assert same(store.load(), state())


def test_flat_keys_stay_flat(tmp_path: Path, store: cs.Store) -> None:
    """What was saved without being flattened has the keys that it had, with dots in them and all."""
    flat = {"a.b": torch.ones(2), "c": {"deep": [1, 2]}}
    import_dcp(write(tmp_path / "dcp", flat, planner=dcp.DefaultSavePlanner(flatten_state_dict=False)), store, step=1)
    assert same(store.load(), flat)


def test_what_needs_code_is_refused_by_name(tmp_path: Path, store: cs.Store) -> None:
    """An object of a class is named, with the ways out: to leave it out, or to trust it."""
    folder = write(tmp_path / "dcp", {"model": {"w": torch.ones(2)}, "run": {"args": Foreign(), "n": 1}})
    with pytest.raises(cs.StateError, match=r"'run\.args'.*test_dcp_import\.Foreign.*skip=") as caught:
        import_dcp(folder, store, step=1)
    assert caught.value.path == "run.args"
    assert store.checkpoints() == []
    import_dcp(folder, store, step=1, skip=["run.args"])
    assert store.load()["run"] == {"n": 1}
    import_dcp(folder, store, step=2, skip=["run"])
    assert list(store.load()) == ["model"]
    with pytest.raises(cs.NotFoundError, match="'ru'"):
        import_dcp(folder, store, step=3, skip=["ru"])


def test_a_bomb_in_the_metadata_never_runs(tmp_path: Path, store: cs.Store) -> None:
    """Whatever the pickle would call is refused by its name, wherever it stands."""
    fired = tmp_path / "fired"
    folder = write(tmp_path / "dcp", state())
    whole = pickle.loads((folder / ".metadata").read_bytes())
    bombs = [
        Bomb(os.system, f"touch {fired}"),
        Bomb(eval, f"open({str(fired)!r}, 'w')"),
        Bomb(io.open, str(fired), "w"),
    ]
    for bomb in bombs:
        for found in (bomb, replace(whole, planner_data=bomb), replace(whole, storage_meta=[{"x": bomb}])):
            for protocol in (0, 2, 3, 4, 5):
                (folder / ".metadata").write_bytes(pickle.dumps(found, protocol=protocol))
                with pytest.raises((cs.StateError, cs.FormatError), match=r"system|eval|open|copy_reg"):
                    import_dcp(folder, store, step=1)
                assert not fired.exists()
    # It is one that would run.
    pickle.loads((folder / ".metadata").read_bytes()).storage_meta[0]["x"].close()
    assert fired.exists()


def test_a_bomb_in_an_object_never_runs(tmp_path: Path, store: cs.Store) -> None:
    """An object is read as far as no code of others runs."""
    fired = tmp_path / "fired"
    folder = write(tmp_path / "dcp", {"x": Bomb(os.system, f"touch {fired}")})
    with pytest.raises(cs.StateError, match=r"'x'.*system"):
        import_dcp(folder, store, step=1)
    assert not fired.exists()


def change(folder: Path, edit: Callable[[Metadata], object]) -> None:
    """Write the metadata anew, changed."""
    file = folder / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    edit(metadata)
    file.write_bytes(pickle.dumps(metadata))


def info(metadata: Metadata, key: str = "w") -> Any:
    return next(info for index, info in metadata.storage_data.items() if index.fqn == key)


def tensor(metadata: Metadata) -> TensorStorageMetadata:
    found = metadata.state_dict_metadata["w"]
    assert isinstance(found, TensorStorageMetadata)
    return found


def _overlap(metadata: Metadata) -> None:
    one, other = info(metadata), info(metadata, "v")
    other.offset, other.relative_path = one.offset + 1, one.relative_path


def _chunk(offset: int, size: int) -> Callable[[Metadata], object]:
    return lambda metadata: tensor(metadata).chunks.__setitem__(
        slice(None), [ChunkStorageMetadata(torch.Size([offset]), torch.Size([size]))]
    )


def _two_chunks(metadata: Metadata) -> None:
    tensor(metadata).chunks.append(ChunkStorageMetadata(torch.Size([0]), torch.Size([4])))


def _move(metadata: Metadata) -> None:
    """The chunk is said to begin where it doesn't."""
    _chunk(1, 3)(metadata)
    metadata.storage_data = {MetadataIndex(i.fqn, [1] if i.fqn == "w" else i.offset): v
                             for i, v in metadata.storage_data.items()}  # fmt: skip


EDITS: dict[str, tuple[Callable[[Metadata], object], str]] = {
    "out of the folder": (lambda m: setattr(info(m), "relative_path", "../secret"), "no name of a file"),
    "absolute": (lambda m: setattr(info(m), "relative_path", "/etc/passwd"), "no name of a file"),
    "no file": (lambda m: setattr(info(m), "relative_path", ".."), "no name of a file"),
    "another file": (lambda m: setattr(info(m), "relative_path", "gone.distcp"), "missing"),
    "beyond the end": (lambda m: setattr(info(m), "length", 1 << 40), r"has \d+ bytes"),
    "negative": (lambda m: setattr(info(m), "offset", -1), "no count"),
    "not a number": (lambda m: setattr(info(m), "offset", True), "no count"),
    "shared bytes": (_overlap, "share the bytes"),
    "shifted": (lambda m: setattr(info(m), "length", info(m).length - 9), "damaged|share"),
    "half of it": (_chunk(0, 2), "don't make it up"),
    "outside": (_chunk(2, 4), "don't make it up"),
    "twice": (_two_chunks, "don't make it up"),
    "elsewhere": (_move, "don't make it up"),
    "larger": (lambda m: setattr(tensor(m), "size", torch.Size([1 << 40])), "don't make it up"),
    "huge": (lambda m: setattr(tensor(m), "size", torch.Size([1 << 40, 1 << 40])), "can't be"),
    "another type": (lambda m: setattr(tensor(m).properties, "dtype", torch.int64), "another than"),
    "nowhere": (lambda m: m.storage_data.clear(), "where .* lies"),
    "no chunks": (lambda m: setattr(tensor(m), "chunks", None), "no list"),
    "a list of places": (lambda m: setattr(m, "storage_data", []), "no dict"),
    "transformed": (lambda m: setattr(info(m), "transform_descriptors", ["stream.zstd"]), r"stream\.zstd"),
    "a path of nothing": (lambda m: m.planner_data.__setitem__("w", ()), "nothing can stand"),
    "an index first": (lambda m: m.planner_data.__setitem__("w", (0,)), "nothing can stand"),
    "a huge list": (lambda m: m.planner_data.__setitem__("w", ("l", 1 << 40)), "lacks most"),
    "two at one place": (lambda m: m.planner_data.__setitem__("w", ("v",)), "something else"),
    "in a value": (lambda m: m.planner_data.__setitem__("w", ("v", "w")), "value itself|something else"),
    "too deep": (lambda m: m.planner_data.__setitem__("w", ("x",) * 5000), "nothing can stand"),
    "no path": (lambda m: m.planner_data.__setitem__("w", "w"), "where in the state"),
}


@pytest.mark.parametrize("name", EDITS)
def test_metadata_that_lie(name: str, tmp_path: Path, store: cs.Store) -> None:
    """They are refused before anything is saved, and nothing outside of the folder is looked at."""
    (tmp_path / "secret").write_bytes(b"of others")
    folder = write(tmp_path / "dcp", {"v": torch.ones(4), "w": torch.zeros(4)})
    edit, message = EDITS[name]
    change(folder, edit)
    with pytest.raises((cs.FormatError, cs.IntegrityError, cs.StateError), match=message):
        import_dcp(folder, store, step=1)
    assert store.checkpoints() == []


def test_metadata_that_are_none(tmp_path: Path, store: cs.Store) -> None:
    """Torn, flipped, endless or empty: always an error that says so, and never another one."""
    folder = write(tmp_path / "dcp", state())
    file = folder / ".metadata"
    good = file.read_bytes()
    bad = [
        b"",
        b"x",
        good[:-1],
        good[: len(good) // 2],
        pickle.dumps([1]),
        pickle.dumps(None),
        b"\x80\x04.",
        b"]r\0\0\0.",
    ]
    bad += [good[:at] + bytes([good[at] ^ 1 << at % 8]) + good[at + 1 :] for at in range(0, len(good), 41)]
    loop: list[Any] = []
    loop.append(loop)
    bad.append(pickle.dumps(loop))
    refused = 0
    for data in bad:
        file.write_bytes(data)
        try:
            import_dcp(folder, store, step=1)
        except (cs.FormatError, cs.IntegrityError, cs.StateError):
            refused += 1
    assert refused > len(bad) // 2


def test_metadata_that_grow_when_read(tmp_path: Path, store: cs.Store) -> None:
    """What one long list makes that is named many times takes neither hours nor all memory."""
    folder = write(tmp_path / "dcp", {"w": torch.zeros(0, 4)})
    empty = [ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([0, 4]))] * (1 << 16)

    def edit(metadata: Metadata) -> None:
        tensor(metadata).chunks = empty
        metadata.state_dict_metadata |= {
            f"w{n}": TensorStorageMetadata(tensor(metadata).properties, torch.Size([0, 4]), empty)
            for n in range(1 << 10)
        }

    change(folder, edit)
    assert (folder / ".metadata").stat().st_size < 1 << 20
    with pytest.raises(cs.FormatError, match="more chunks"):
        import_dcp(folder, store, step=1)
    folder = write(tmp_path / "other", {"w": torch.zeros(4)})
    change(folder, lambda metadata: setattr(tensor(metadata), "size", torch.Size([1] * (1 << 16))))
    with pytest.raises(cs.FormatError, match="can't be"):
        import_dcp(folder, store, step=1)


@pytest.mark.parametrize("cut", [1, 100, 2000])
def test_a_file_that_was_cut_off(cut: int, tmp_path: Path, store: cs.Store) -> None:
    """It is named, before anything is read."""
    folder = write(tmp_path / "dcp", state())
    file = next(folder.glob("*.distcp"))
    os.truncate(file, file.stat().st_size - cut)
    with pytest.raises(cs.IntegrityError, match=file.name):
        import_dcp(folder, store, step=1)


def test_bytes_that_are_damaged(tmp_path: Path, store: cs.Store) -> None:
    """What is no archive of ``torch.save`` is damage."""
    folder = write(tmp_path / "dcp", {"w": torch.ones(4)})
    file = next(folder.glob("*.distcp"))
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(cs.IntegrityError, match="'w'"):
        import_dcp(folder, store, step=1)


@pytest.mark.parametrize("value", [torch.zeros(1 << 20), list(range(1 << 16))], ids=["tensor", "object"])
def test_an_archive_that_unpacks_to_more(value: Any, tmp_path: Path, store: cs.Store) -> None:
    """A compressed one, which could be of any size, is refused before it is unpacked."""
    folder = write(tmp_path / "dcp", {"w": value}, planner=dcp.DefaultSavePlanner(flatten_state_dict=False))
    file = next(folder.glob("*.distcp"))
    packed = io.BytesIO()
    with zipfile.ZipFile(file) as plain, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as small:
        for member in plain.infolist():
            small.writestr(member.filename, plain.read(member))
    assert len(packed.getvalue()) < file.stat().st_size
    file.write_bytes(packed.getvalue())
    change(folder, lambda metadata: setattr(info(metadata), "length", len(packed.getvalue())))
    with pytest.raises(cs.FormatError, match="fewer bytes" if isinstance(value, torch.Tensor) else "compressed"):
        import_dcp(folder, store, step=1)


def test_a_tensor_of_fewer_bytes_than_elements(tmp_path: Path, store: cs.Store) -> None:
    """One that repeats an element in memory must not fill the store."""
    folder = write(tmp_path / "dcp", {"w": torch.zeros(4, 4)})
    file = next(folder.glob("*.distcp"))
    stream = io.BytesIO()
    torch.save(torch.zeros(1).expand(1 << 20, 1 << 20), stream)
    file.write_bytes(stream.getvalue())

    def edit(metadata: Metadata) -> None:
        info(metadata).length = len(stream.getvalue())
        tensor(metadata).size = torch.Size([1 << 20, 1 << 20])
        tensor(metadata).chunks[0].sizes = torch.Size([1 << 20, 1 << 20])

    change(folder, edit)
    with pytest.raises(cs.FormatError, match=r"another than|fewer"):
        import_dcp(folder, store, step=1)


def test_links_and_pipes(tmp_path: Path, store: cs.Store) -> None:
    """A link that leads out of the folder and a pipe, at which one would wait for ever, are refused."""
    folder = write(tmp_path / "dcp", {"w": torch.ones(4)})
    file = next(folder.glob("*.distcp"))
    file.rename(tmp_path / "outside")
    file.symlink_to(tmp_path / "outside")
    with pytest.raises(cs.FormatError, match="leads out"):
        import_dcp(folder, store, step=1)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(cs.FormatError, match="is no file"):
        import_dcp(folder, store, step=1)


def test_no_checkpoint(tmp_path: Path, store: cs.Store) -> None:
    """What isn't there, what each rank wrote for itself, and bad facts are told at once."""
    with pytest.raises(cs.NotFoundError, match="no checkpoint of"):
        import_dcp(tmp_path, store, step=1)
    with pytest.raises(cs.FormatError, match="copy the folder"):
        import_dcp("s3://bucket/run", store, step=1)
    (tmp_path / "__0.metadata").touch()
    with pytest.raises(cs.StateError, match="use_collectives"):
        import_dcp(tmp_path, store, step=1)
    with pytest.raises(cs.StateError, match="step"):
        import_dcp(tmp_path, store, step=-1)
