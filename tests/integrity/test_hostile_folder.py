"""A folder that others can write to: symlinks, FIFOs, devices and odd names in the place of every object."""

from __future__ import annotations

import os
import shutil
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from ckptstore.errors import CheckpointError, FormatError, IntegrityError
from tests.integrity.checks import error_of, verified
from tests.integrity.stores import GOOD, NEW, FolderRaw, Pair, flat, opened, pair, read, save, silence, state


@pytest.fixture
def p(store_path: Path) -> Pair:
    return pair(FolderRaw(store_path))


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """What nobody may touch or read through the store."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "precious").write_bytes(b"precious")
    return folder


def symlink_to_itself_elsewhere(path: Path, outside: Path) -> None:
    """The object's true bytes, by a symlink: exactly what an attacker could exchange between two reads."""
    shutil.move(path, outside / path.name)
    path.symlink_to(outside / path.name)


def dangling_symlink(path: Path, outside: Path) -> None:
    path.unlink()
    path.symlink_to(outside / "nothing")


def fifo(path: Path, outside: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def unix_socket(path: Path, outside: Path) -> None:
    path.unlink()
    here = os.getcwd()
    os.chdir(path.parent)
    try:
        # The name of a socket may have 107 characters only.
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(path.name)
    finally:
        os.chdir(here)


def folder(path: Path, outside: Path) -> None:
    path.unlink()
    path.mkdir()


def device(path: Path, outside: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


PLANTED = [symlink_to_itself_elsewhere, dangling_symlink, fifo, unix_socket, folder, device]
Plant = Callable[[Path, Path], None]


@pytest.mark.parametrize("plant", PLANTED)
@pytest.mark.parametrize("name", ["manifest.json", "part-00000.json", "model.safetensors"])
def test_in_the_place_of_a_checkpoints_file(p: Pair, store_path: Path, outside: Path, name: str, plant: Plant) -> None:
    """Refused without being followed or waited for; the other checkpoint loads."""
    plant(store_path / p.key(name), outside)
    with opened(p.raw.url) as store, silence():
        error = error_of(lambda: store.load(p.bad.id))
        assert isinstance(error, IntegrityError), repr(error)
        assert name in str(error)
        assert flat(store.load("latest")) == dict(GOOD)
        assert flat(store.load(p.good.id)) == dict(GOOD)
        assert not store.verify().ok
    assert (outside / "precious").read_bytes() == b"precious"


@pytest.mark.parametrize("plant", PLANTED)
@pytest.mark.parametrize("key", ["store.json", "writers/0001.json", "commit"])
def test_in_the_place_of_a_record(p: Pair, store_path: Path, outside: Path, key: str, plant: Plant) -> None:
    """Reported as damage, and stepped around; nothing is ever taken for absent or read through it."""
    plant(store_path / (p.commit if key == "commit" else key), outside)
    with opened(p.raw.url) as store, silence():
        assert error_of(lambda: store.load("latest")) is None
        # A folder has an object's name and isn't listed as one.
        assert not store.verify().ok or (plant is folder and key != "store.json")
        assert error_of(lambda: save(store, state(NEW), 3)) is None
        assert flat(store.load("step:3")) == dict(NEW)
    assert (outside / "precious").read_bytes() == b"precious"


@pytest.mark.parametrize("name", ["commits", "checkpoints", "writers", "checkpoint"])
def test_symlinked_folders(p: Pair, store_path: Path, outside: Path, name: str) -> None:
    """A folder of the store that is a symlink is not followed, neither by reading nor by deleting."""
    path = store_path / (f"checkpoints/{p.bad.id}" if name == "checkpoint" else name)
    shutil.move(path, outside / path.name)
    path.symlink_to(outside / path.name)
    before = sorted(str(f) for f in outside.rglob("*"))
    with opened(p.raw.url) as store, silence():
        error = error_of(lambda: store.load(p.bad.id))
        assert error is None or isinstance(error, CheckpointError)
        assert (error is None) == (name == "writers")
        error_of(lambda: save(store, state(NEW), 3))
        error_of(lambda: store.delete(p.bad.id))
        error_of(lambda: store.prune(grace_s=0))
    assert sorted(str(f) for f in outside.rglob("*")) == before


ODD = [
    "tmp-é",
    "tmp-a b",
    "tmp-\udcff",
    "tmp-x\n",
    "tmp-",
    ".nfs0000000000000001",
    ".DS_Store",
    "a\\b",
    "Thumbs.db",
    "-rf",
    "x" * 255,
]


def fill(folder: Path) -> None:
    for name in ODD:
        (folder / name).write_bytes(b"odd")
    (folder / ".snapshot").mkdir()
    (folder / ".snapshot" / "model.safetensors").write_bytes(b"odd")


@pytest.mark.parametrize("where", ["", "commits", "writers", "checkpoints", "good", "bad", "unfinished"])
def test_odd_names(p: Pair, store_path: Path, where: str) -> None:
    """Names that no store gives are neither read nor in the way: of saving, verifying, deleting and pruning."""
    unfinished = store_path / "checkpoints" / "0001-000007-step7-0123456789abcdef"
    unfinished.mkdir()
    (unfinished / "model.safetensors").write_bytes(b"unfinished")
    folders = {"good": store_path / f"checkpoints/{p.good.id}", "bad": store_path / f"checkpoints/{p.bad.id}"}
    place = {**folders, "unfinished": unfinished}.get(where, store_path / where)
    fill(place)
    with opened(p.raw.url) as store:
        assert flat(store.load("latest")) == dict(NEW)
        report = store.verify()
        assert report.ok
        assert [leftover.id for leftover in report.leftovers if leftover.id] == [unfinished.name]
        third = save(store, state(GOOD), 3)
        store.delete(p.bad.id)
        pruned = store.prune(grace_s=0)
        assert pruned.reclaimed == [p.bad.id]
        assert unfinished.name in pruned.leftovers
        assert not (unfinished / "model.safetensors").exists()
        assert not (store_path / p.key("model.safetensors")).exists()
        assert [c.id for c in store.checkpoints()] == [p.good.id, third.id]
        again = store.prune(grace_s=0)
        assert (again.reclaimed, again.freed_bytes) == ([], 0)
    # What is not the store's own stays, but in the folder of an id that is removed.
    assert (place / "Thumbs.db").exists() or where in ("bad", "unfinished")
    assert (place / ".snapshot" / "model.safetensors").exists()


def test_planted_temporary_names(p: Pair, store_path: Path, outside: Path) -> None:
    """Symlinks under names of temporary objects are never written through, and collected without being followed."""
    for folder in ("", "commits", "writers", f"checkpoints/{p.bad.id}"):
        (store_path / folder / "tmp-0123456789abcdef").symlink_to(outside / "precious")
        (store_path / folder / "tmp-dangling").symlink_to(outside / "new")
    with opened(p.raw.url) as store:
        save(store, state(GOOD), 3)
        assert store.verify().ok
        store.prune(grace_s=0)
        assert store.verify().leftovers == []
    assert not (outside / "new").exists()
    assert (outside / "precious").read_bytes() == b"precious"
    assert not list(store_path.rglob("tmp-*"))


def test_planted_targets_of_the_next_save(p: Pair, store_path: Path, outside: Path) -> None:
    """Whoever guesses the next writer's key gains nothing: creation is exclusive and follows no symlink."""
    (store_path / "writers" / "0002.json").symlink_to(outside / "precious")
    with opened(p.raw.url) as store, silence():
        saved = save(store, state(GOOD), 3)
    assert saved.id.startswith("0003-")
    assert (outside / "precious").read_bytes() == b"precious"


def test_a_symlink_exchanged_while_it_is_read(p: Pair, store_path: Path, outside: Path) -> None:
    """What was opened is what is read: bytes exchanged after the check of the name are not followed."""
    key = p.key("model.safetensors")
    with opened(p.raw.url) as store:
        contents = store.contents(p.bad)
        reader = store._storage.open_reader(contents.files[0].key)
        symlink_to_itself_elsewhere(store_path / key, outside)
        (outside / "model.safetensors").write_bytes(b"other")
        (store_path / key).unlink()
        (store_path / key).write_bytes(b"x" * reader.size)
        reader.close()
        with pytest.raises(IntegrityError):
            read(store, store.resolve(p.bad.id))


def test_objects_that_shrink_while_they_are_read(p: Pair, store_path: Path) -> None:
    """A file cut after it was opened is damage, not a crash and not zeros."""
    path = store_path / p.key("model.safetensors")
    with opened(p.raw.url) as store:
        open_reader, cut = store._storage.open_reader, []

        def cutting(key: str, **how: object):  # type: ignore[no-untyped-def]
            reader = open_reader(key, **how)
            os.truncate(path, 4100)
            cut.append(key)
            return reader

        store._storage.open_reader = cutting  # type: ignore[method-assign, assignment]
        with pytest.raises(IntegrityError, match="ends after"):
            read(store, store.resolve(p.bad.id))
        assert cut


def test_many_planted_records(p: Pair, store_path: Path) -> None:
    """A thousand records that are none cost a warning each, and no checkpoint."""
    for n in range(1000):
        (store_path / "commits" / f"0001-{n + 100:06d}-step1-0123456789abcdef.json").write_bytes(b"{}")
    with opened(p.raw.url) as store, silence() as caught:
        assert flat(store.load("latest")) == dict(NEW)
    assert len(caught) == 1000
    assert len(verified(p).records) == 1000


def test_a_fifo_never_blocks(p: Pair, store_path: Path) -> None:
    """Reading a whole store with a FIFO for every object ends."""
    for key in p.listing():
        (store_path / key).unlink()
        os.mkfifo(store_path / key)

    def look() -> None:
        with opened(p.raw.url) as store, silence():
            for action in (store.checkpoints, store.verify, lambda: store.load("latest"), store.holds, store.deleted):
                error_of(action)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()


def test_foreign_things_are_told(p: Pair, store_path: Path) -> None:
    """verify lists what is not the store's."""
    (store_path / "notes.txt").write_text("mine")
    (store_path / f"checkpoints/{p.bad.id}/model.bin").write_text("mine")
    assert set(verified(p).foreign) == {"notes.txt", p.key("model.bin")}


def test_hold_names(p: Pair) -> None:
    """A hold can't be named so that it leads elsewhere or is taken for something else."""
    names = ["../x", "a/b", "", ".", "..", "latest", "LATEST", "best:loss", "step:1", "epoch:1", "0001-000001", "tmp-x"]
    with opened(p.raw.url) as store:
        for name in [*names, "x" * 101, "é", "a b", "a\n", "\0", "step", "best.loss", p.good.id]:
            with pytest.raises(FormatError, match="can't name a hold"):
                store.hold("latest", name)
        assert store.holds() == {}
