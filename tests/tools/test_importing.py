"""What other programs save comes into a store bit for bit."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

import ckptstore as cs
from tests.tools.foreign import Foreign, Items, Names, Reduced, same, tensors, values

pytestmark = pytest.mark.usefixtures("sandbox")


@pytest.fixture
def store(tmp_path: Path) -> cs.Store:
    return cs.open(f"memory://{tmp_path.name}")


def imported(path: Path, store: cs.Store, **options: Any) -> Any:
    """The state in the store after an import of one checkpoint."""
    report = cs.import_from(path, store, **options)
    assert report.ok
    assert store.verify("latest").ok
    return store.load(report.checkpoints[-1].id)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_file_of_torch_save(zipped: bool, tmp_path: Path, store: cs.Store) -> None:
    """Tensors of all kinds, plain values of all kinds, whatever shares memory."""
    known = tensors()
    if not zipped:
        # Types that came later than the archive; PyTorch writes them so, and doesn't read them again.
        known = {
            name: one for name, one in known.items() if not name.startswith(("float8", "uint16", "uint32", "uint64"))
        }
    state = {"tensors": known, "values": values(), "step": 12}
    torch.save(state, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    loaded = imported(tmp_path / "a.pt", store)
    assert same(loaded, state)
    assert loaded["values"]["same"][0] is loaded["values"]["same"][1]
    assert same(imported(tmp_path / "a.pt", store, without_refused=True, again=True), state)
    checkpoint, _ = store.checkpoints()
    assert (checkpoint.step, list(checkpoint.reasons)) == (12, [f"imported from {tmp_path / 'a.pt'}"])


def test_an_archive_without_checksums(tmp_path: Path, store: cs.Store) -> None:
    """PyTorch can leave them out; that is no damage."""
    state = {"w": torch.arange(100.0), "step": 1}
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state, tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert same(imported(tmp_path / "a.pt", store), state)


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.Adagrad], ids=["adamw", "adagrad"])
def test_an_optimizer_goes_on(make: Any, tmp_path: Path, store: cs.Store) -> None:
    """The next step after loading what was imported is the one that would have come without."""
    torch.manual_seed(1)
    model = torch.nn.Linear(4, 3)
    optimizer = make(model.parameters(), lr=0.1)
    batches = [torch.randn(2, 4) for _ in range(2)]

    def step(net: torch.nn.Module, by: torch.optim.Optimizer, batch: torch.Tensor) -> None:
        by.zero_grad()
        net(batch).square().sum().backward()
        by.step()

    step(model, optimizer, batches[0])
    saved = {"model_state_dict": model.state_dict(), "optimizer_state_dict": optimizer.state_dict(), "global_step": 1}
    torch.save(saved, tmp_path / "a.pth")
    loaded = imported(tmp_path / "a.pth", store)
    assert same(loaded, saved)
    other = torch.nn.Linear(4, 3)
    other.load_state_dict(loaded["model_state_dict"])
    another = make(other.parameters(), lr=0.5)
    another.load_state_dict(loaded["optimizer_state_dict"])
    step(model, optimizer, batches[1])
    step(other, another, batches[1])
    assert same(other.state_dict(), model.state_dict())
    assert same(another.state_dict(), optimizer.state_dict())


def test_safetensors(tmp_path: Path, store: cs.Store) -> None:
    """One file, and a model in several with their index."""
    known = {
        name: value.detach().clone() for name, value in tensors().items() if name not in ("complex128", "conjugated")
    }
    known = {name: value.contiguous() for name, value in known.items()}
    save_file(known, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(cs.StateError, match="--step") as caught:
        cs.import_from(tmp_path / "model.safetensors", store)
    assert caught.value.path == "step"
    loaded = imported(tmp_path / "model.safetensors", store, step=3, metrics={"loss": 0.25})
    assert same(dict(sorted(loaded["model"].items())), dict(sorted(known.items())))
    assert store.checkpoints()[0].metrics == {"loss": 0.25}

    names = sorted(known)
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    weights = {}
    for number, part in enumerate((names[:9], names[9:])):
        save_file({name: known[name] for name in part}, sharded / f"model-{number + 1:05d}-of-00002.safetensors")
        weights |= dict.fromkeys(part, f"model-{number + 1:05d}-of-00002.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": weights}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    again = imported(sharded, store, step=4)
    assert same(dict(sorted(again["model"].items())), dict(sorted(known.items())))


def test_a_sharded_file_of_torch_save(tmp_path: Path, store: cs.Store) -> None:
    """The parts of one model become one."""
    for number in (1, 2):
        torch.save({f"w{number}": torch.full((3,), number)}, tmp_path / f"pytorch_model-0000{number}-of-00002.bin")
    names = {f"w{number}": f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2)}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
    assert same(imported(tmp_path, store, step=1)["model"], {"w1": torch.full((3,), 1), "w2": torch.full((3,), 2)})


def boxes(folder: Path, tensor: torch.Tensor, *cuts: tuple[slice, slice]) -> Path:
    """A folder of DCP with one tensor in pieces, each of another rank."""
    folder.mkdir()
    chunks, places = [], {}
    for number, cut in enumerate(cuts):
        file = folder / f"__{number}_0.distcp"
        with file.open("wb") as stream:
            stream.write(b"of another tensor")
            # Not only what belongs to it: a view of the whole is saved with the whole's memory.
            torch.save(tensor[cut] if number == 1 else tensor[cut].clone(), stream)
            length = stream.tell() - 17
        offset = torch.Size([cut[0].start, cut[1].start])
        chunks.append(ChunkStorageMetadata(offset, tensor[cut].shape))
        places[MetadataIndex("w", offset)] = _StorageInfo(file.name, 17, length)
    entry = TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), tensor.shape, chunks)
    data = Metadata({"w": entry}, {"w": ("model", "w")}, places)
    (folder / ".metadata").write_bytes(pickle.dumps(data))
    return folder


def test_pieces_of_many_ranks(tmp_path: Path, store: cs.Store) -> None:
    """Boxes of a tensor, whichever ranks have saved them, are put together while they are read."""
    whole = torch.randn(30, 40).to(torch.complex128)
    cuts = [(slice(a, b), slice(c, d)) for a, b in ((0, 11), (11, 30)) for c, d in ((0, 7), (7, 20), (20, 40))]
    loaded = imported(boxes(tmp_path / "dcp", whole, *cuts), store, step=5)
    assert same(loaded, {"model": {"w": whole}})


def test_a_folder_of_dcp(tmp_path: Path, store: cs.Store) -> None:
    """Its step may be a tensor; what needs code is left out on request."""
    state = {"model": {"w": torch.ones(3)}, "step": torch.tensor(12), "config": Foreign()}
    with pytest.warns(UserWarning, match="single process"):
        dcp.save(state, storage_writer=FileSystemWriter(tmp_path / "dcp"), no_dist=True)
    with pytest.raises(cs.StateError, match=r"'config'.*Foreign.*--without-refused"):
        cs.import_from(tmp_path / "dcp", store)
    report = cs.import_from(tmp_path / "dcp", store, without_refused=True)
    assert list(report.items[0].left_out) == ["config"]
    assert store.checkpoints()[0].step == 12
    assert same(store.load(), {"model": {"w": torch.ones(3)}, "step": torch.tensor(12)})


def test_many_in_a_folder(tmp_path: Path, store: cs.Store) -> None:
    """All come in by their own step, whatever they are called; the second time none does."""
    for step in (2, 10, 9):
        torch.save({"w": torch.full((4,), step), "step": step, "val_loss": 1 / step}, tmp_path / f"{step}.pt")
    looked = cs.import_from(tmp_path, store, dry_run=True)
    assert [item.step for item in looked.items] == [2, 9, 10]
    assert store.checkpoints() == []
    report = cs.import_from(tmp_path, store, only=["w"])
    assert [one.step for one in report.checkpoints] == [2, 9, 10]
    assert store.load("latest").keys() == {"w"}
    assert store.load("best:val_loss")["w"][0] == 10
    second = cs.import_from(tmp_path, store)
    assert [item.was_there for item in second.items] == [True] * 3
    assert second.checkpoints == []
    assert len(cs.import_from(tmp_path, store, only_latest=True, again=True).checkpoints) == 1
    assert [one.step for one in store.checkpoints()] == [2, 9, 10, 10]
    with pytest.raises(cs.StateError, match="one checkpoint"):
        cs.import_from(tmp_path, store, step=1)


def test_a_broken_one_does_not_keep_the_others_away(tmp_path: Path, store: cs.Store) -> None:
    for step in (1, 2, 3):
        torch.save({"w": torch.full((400,), step), "step": step}, tmp_path / f"step_{step}.pt")
    data = bytearray((tmp_path / "step_2.pt").read_bytes())
    at = data.index(torch.full((400,), 2).numpy().tobytes())
    data[at + 100] ^= 1
    (tmp_path / "step_2.pt").write_bytes(data)
    report = cs.import_from(tmp_path, store)
    assert not report.ok
    assert [(item.step, type(item.problem)) for item in report.items] == [
        (1, type(None)),
        (2, cs.IntegrityError),
        (3, type(None)),
    ]
    assert [one.step for one in store.checkpoints()] == [1, 3]
    # Mended, it comes after the newer one, from which a run should go on.
    torch.save({"w": torch.full((400,), 2), "step": 2}, tmp_path / "step_2.pt")
    with pytest.warns(UserWarning, match=r"is now step 2, and .* of step 3 is there, too"):
        assert [one.step for one in cs.import_from(tmp_path, store).checkpoints] == [2]
    # Cut off, it doesn't even tell its step: it might be the newest.
    (tmp_path / "step_2.pt").write_bytes(data[:-100])
    report = cs.import_from(tmp_path, store, only_latest=True, again=True)
    assert [item.path.name for item in report.items if item.problem] == ["step_2.pt"]
    assert [one.step for one in report.checkpoints] == [3]


def test_what_was_refused_can_be_left_out(tmp_path: Path, store: cs.Store) -> None:
    """An error names all classes; on request what holds an object of one stays away, and is named."""
    state = {
        "w": torch.ones(2),
        "step": 4,
        "config": Foreign(),
        "deep": {"list": [1, Foreign()], "kept": 1, "class": Foreign},
        "called": Reduced(print, 1),
        "sparse": torch.eye(3).to_sparse(),
        "names": Names(a=1),
    }
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(
        cs.StateError, match=r"builtins\.print, tests\.tools\.foreign\.Foreign, tests\.tools.*--without-refused"
    ):
        cs.import_from(tmp_path / "a.pt", store)
    report = cs.import_from(tmp_path / "a.pt", store, without_refused=True)
    assert same(store.load(), {"w": torch.ones(2), "step": 4, "deep": {"kept": 1}})
    assert {name: why.rpartition(" ")[2] for name, why in report.items[0].left_out.items()} == {
        "config": "tests.tools.foreign.Foreign",
        "deep/list": "tests.tools.foreign.Foreign",
        "deep/class": "tests.tools.foreign.Foreign",
        "called": "builtins.print",
        "sparse": "(torch.sparse_coo)",
        "names": "tests.tools.foreign.Names",
    }
    # PyTorch's reader puts items into no list but its own.
    torch.save({"items": Items([1, 2]), "step": 5}, tmp_path / "a.pt")
    with pytest.raises(cs.StateError, match=r"without its objects of tests\.tools\.foreign\.Items"):
        cs.import_from(tmp_path / "a.pt", store, without_refused=True)


def test_what_is_given_counts(tmp_path: Path, store: cs.Store) -> None:
    """A step, an epoch and metrics of the caller's go before what is recorded."""
    torch.save({"w": torch.ones(2), "step": 4, "epoch": 1, "loss": 0.5}, tmp_path / "a.pt")
    cs.import_from(tmp_path / "a.pt", store, step=5, epoch=2, metrics={"loss": 0.25, "acc": 0.5})
    (saved,) = store.checkpoints()
    assert (saved.step, saved.epoch, saved.metrics) == (5, 2, {"loss": 0.25, "acc": 0.5})
    with pytest.raises(cs.StateError, match="matches nothing"):
        cs.import_from(tmp_path / "a.pt", store, step=6, only=["nothing/*"])


def test_nothing_there(tmp_path: Path, store: cs.Store) -> None:
    with pytest.raises(cs.NotFoundError):
        cs.import_from(tmp_path / "gone.pt", store)
    with pytest.raises(cs.NotFoundError):
        cs.import_from(tmp_path, store)
    with pytest.raises(cs.FormatError, match="copy it"):
        cs.import_from("s3://bucket/a.pt", store)
