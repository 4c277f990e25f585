"""What the doctor finds: on storages that keep their promises, and on those that break one."""

from __future__ import annotations

import errno
import os
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ckptstore.errors import ExistsError, NotFoundError, StateError, StorageError, StorageFullError, UnavailableError
from ckptstore.storage import Entry, LocalStorage, posix
from ckptstore.storage.base import Upload
from ckptstore.storage.memory import MemoryReader, MemoryStorage
from ckptstore.tools import doctor, promises
from ckptstore.tools.doctor import IN_FLIGHT, Report, examine, examine_storage
from ckptstore.tools.promises import CREATES, RACERS, ROUNDS

BLOCK = 16 << 20
SIZE = 1 << 20
SHM = Path("/dev/shm")
PROMISES = [
    *("process_end", "power_cut", "exclusive_create", "atomic_create", "read_after_write", "list_after_write"),
    *("delete", "read_ranges", "refuse_existing"),
]


def broken(report: Report) -> list[str]:
    """Names of the promises that don't hold."""
    assert [promise.name for promise in report.promises] == PROMISES
    assert report.ok == all(promise.holds for promise in report.promises)
    return [promise.name for promise in report.promises if not promise.holds]


def detail(report: Report, name: str) -> str:
    return next(promise.detail for promise in report.promises if promise.name == name)


def is_on_disk(path: Path) -> bool:
    return LocalStorage(path).capabilities.durability == "power-cut"


def test_a_folder_on_disk(tmp_path: Path) -> None:
    if not is_on_disk(tmp_path):
        pytest.skip("the tests' folder is in memory")
    (tmp_path / "mine").write_text("x")
    report = examine(str(tmp_path), 2 * BLOCK + 5)

    assert broken(report) == []
    assert (report.place, report.durability) == (tmp_path.as_uri(), "power-cut")
    assert report.kind == LocalStorage(tmp_path).capabilities.kind
    assert len(report.create_s) == CREATES
    assert min(report.create_s) <= report.create_median_s <= max(report.create_s)
    assert [speed.in_flight for speed in report.speeds] == list(IN_FLIGHT)
    assert all(speed.write_s > 0 and speed.read_s for speed in report.speeds)
    assert report.free_bytes is not None
    assert report.free_bytes > 0
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_folder_that_is_not_there_yet_is_not_made(tmp_path: Path) -> None:
    """What the first save would make is tried in the nearest folder above."""
    report = examine(f"file://{tmp_path}/not yet/there", SIZE)

    assert report.place == tmp_path.as_uri()
    assert list(tmp_path.iterdir()) == []


def test_names_of_any_bytes(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"\xff ?#%41")
    folder.mkdir()
    assert examine(str(folder), SIZE).place == folder.as_uri()
    assert list(folder.iterdir()) == []


def test_memory_ends_with_the_process() -> None:
    report = examine("memory://doctor", SIZE)

    assert broken(report) == ["process_end", "power_cut"]
    assert (report.kind, report.durability, report.free_bytes) == ("memory", "none", None)
    assert report.direct_io == "not asked"
    assert MemoryStorage("doctor").list("") == []


@pytest.mark.skipif(not SHM.is_dir(), reason="there is no /dev/shm here")
def test_shared_memory_does_not_survive_a_power_cut() -> None:
    before = set(SHM.glob("doctor-*"))
    report = examine(str(SHM), SIZE)

    assert broken(report) == ["power_cut"]
    assert (report.kind, report.durability, report.direct_io) == ("tmpfs", "process-crash", "not asked")
    assert set(SHM.glob("doctor-*")) <= before


def test_direct_io_is_told_by_using_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = LocalStorage(tmp_path)
    if not storage.capabilities.direct_io:
        pytest.skip("direct I/O is not asked for here")
    asked: list[bool] = []

    def refuse(fd: int, on: bool) -> bool:
        asked.append(on)
        return not on

    monkeypatch.setattr(posix, "set_direct", refuse)
    report = examine_storage(storage, SIZE)
    assert asked[0]
    assert (report.direct_io, broken(report)) == ("refused", [] if is_on_disk(tmp_path) else ["power_cut"])


def test_direct_io_that_works_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the file system says is replaced, because not every one here takes it."""
    storage = LocalStorage(tmp_path)
    storage.capabilities = replace(storage.capabilities, direct_io=True)
    monkeypatch.setattr(posix, "set_direct", lambda fd, on: True)
    monkeypatch.setattr(posix, "reopen_direct", lambda file: posix.Descriptor(os.dup(file.fd)))
    assert examine_storage(storage, SIZE).direct_io == "used"


# --- storages that break a promise ---


class Overwriting(MemoryStorage):
    """Everybody wins."""

    def create(self, key: str, data: bytes) -> None:
        self.delete([key])
        super().create(key, data)


class Emptying(MemoryStorage):
    """Refuses what exists, and changes it all the same."""

    def create(self, key: str, data: bytes) -> None:
        try:
            super().create(key, data)
        except ExistsError:
            if "/abilities/" in key:
                self.delete([key])
            raise


class Unconditional(MemoryStorage):
    """Found by its probe to know no conditions, so that each creation has to look first, and may be overtaken."""

    def __init__(self) -> None:
        super().__init__()
        self.probed: list[str] = []

    def probe(self, key: str, data: bytes) -> None:
        assert self.read(key, limit=len(data)) == data
        self.probed.append(key)
        self.capabilities = replace(self.capabilities, exclusive_create=False, checks_writes=True)


class Whole(MemoryStorage):
    """Gives the beginning of an object, whatever part was asked for."""

    def open_reader(self, key: str, *, size: int | None = None) -> MemoryReader:
        reader = super().open_reader(key)
        inner = reader.read_into
        if "/abilities/" in key:
            reader.read_into = lambda offset, buffer: inner(0, buffer)  # type: ignore[method-assign]
        return reader


class CheckThenPut(MemoryStorage):
    """Looks before it puts, as an object store without conditional writes would have to."""

    def create(self, key: str, data: bytes) -> None:
        taken = key in {entry.key for entry in self.list("")}
        time.sleep(0.01)
        if not taken:
            self.delete([key])
        super().create(key, data)


class Refusing(MemoryStorage):
    """Tells even the winner of a race that the key is taken."""

    def create(self, key: str, data: bytes) -> None:
        super().create(key, data)
        if "/race/" in key:
            super().create(key, data)


class Swapping(MemoryStorage):
    """The winner is told so, and the bytes of somebody else are there."""

    def create(self, key: str, data: bytes) -> None:
        super().create(key, data[::-1] if "/race/" in key else data)


class Torn(MemoryStorage):
    """A key is taken at once, and its bytes come later."""

    def __init__(self) -> None:
        super().__init__()
        self.young: set[str] = set()

    def create(self, key: str, data: bytes) -> None:
        if key not in self._objects:
            self.young.add(key)
        super().create(key, data)
        time.sleep(0.05)
        self.young.discard(key)

    def read(self, key: str, *, limit: int) -> bytes:
        data = super().read(key, limit=limit)
        return data[: len(data) // 2] if key in self.young else data


class Unlinked(MemoryStorage):
    """Has no way to make an object appear whole, and says so."""

    def __init__(self) -> None:
        super().__init__()
        self.capabilities = replace(self.capabilities, atomic_create=False)


class Forgetful(MemoryStorage):
    """Listings lack the newest object."""

    def list(self, prefix: str) -> list[Entry]:
        return sorted(sorted(super().list(prefix), key=lambda entry: entry.modified)[:-1])


class Late(MemoryStorage):
    """An object can be read some time after it was created."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: set[str] = set()

    def read(self, key: str, *, limit: int) -> bytes:
        if "/small/" in key and key not in self.asked:
            self.asked.add(key)
            raise NotFoundError(f"{key} isn't there yet", key=key)
        return super().read(key, limit=limit)


class Keeping(MemoryStorage):
    """Deletes nothing."""

    def delete(self, keys: Any) -> None:
        list(keys)


class Sweeping(MemoryStorage):
    """Deletes the whole folder with the object."""

    def delete(self, keys: Any) -> None:
        folders = tuple(key.rpartition("/")[0] for key in keys)
        super().delete([entry.key for entry in self.list("") if entry.key.startswith(folders)])


class BadBlocks(MemoryStorage):
    """One bit of each large object comes back flipped."""

    def open_reader(self, key: str, *, size: int | None = None) -> MemoryReader:
        data = bytearray(self.read(key, limit=1 << 30))
        data[-1] ^= 1
        return MemoryReader(bytes(data))


class LosingBlocks(MemoryStorage):
    """Large objects are not there."""

    def size(self, key: str) -> int:
        raise NotFoundError(f"{key} isn't there", key=key)


@pytest.mark.parametrize(
    ("make", "name", "why"),
    [
        (Emptying, "refuse_existing", "it was refused, and the bytes changed"),
        (Whole, "read_ranges", "1 of 4 parts of an object came back as written"),
        (Overwriting, "exclusive_create", f"in {ROUNDS} of {ROUNDS} races of {RACERS} threads not one won but 16"),
        (CheckThenPut, "exclusive_create", "not one won but"),
        (Refusing, "exclusive_create", "not one won but 0"),
        (Swapping, "exclusive_create", f"in {ROUNDS} of {ROUNDS} races the winner's bytes are not what is there"),
        (Torn, "atomic_create", "racers read nothing or half an object"),
        (Unlinked, "atomic_create", "on memory a crash may leave a torn record"),
        (Forgetful, "list_after_write", f"0 of {CREATES} listings"),
        (Late, "read_after_write", f"0 of {CREATES} small objects"),
        (Keeping, "delete", "0 of 8 deleted objects are gone, and 8 of 8 others are left"),
        (Sweeping, "delete", "8 of 8 deleted objects are gone, and 0 of 8 others are left"),
        (BadBlocks, "read_after_write", "16 of 16 small objects came back as written, and 0 of 3 large ones"),
        (LosingBlocks, "read_after_write", "16 of 16 small objects came back as written, and 0 of 3 large ones"),
    ],
)
def test_who_breaks_a_promise_is_found_out(make: Callable[[], MemoryStorage], name: str, why: str) -> None:
    storage = make()
    report = examine_storage(storage, SIZE)

    also = {Swapping: {"atomic_create"}, Overwriting: {"refuse_existing"}, BadBlocks: {"read_ranges"}}.get(make, set())
    assert set(broken(report)) == {"process_end", "power_cut", name} | also
    assert why in detail(report, name)
    left = set(storage._objects)
    assert bool(left) == (make is Keeping), "also what listings lose is removed"


def test_blocks_that_did_not_come_back_have_no_speed() -> None:
    assert [speed.read_s for speed in examine_storage(BadBlocks(), SIZE).speeds] == [None] * len(IN_FLIGHT)


def test_blocks_in_flight_are_really_so_many() -> None:
    """Each read waits until as many are under way as there shall be, and none more is."""

    class Meeting(MemoryStorage):
        def open_reader(self, key: str, *, size: int | None = None) -> MemoryReader:
            reader = super().open_reader(key)
            if "/blocks/" not in key:
                return reader
            in_flight = int(key[-1])
            inner, met = reader.read_into, threading.Barrier(in_flight, timeout=60)

            def read_into(offset: int, buffer: memoryview) -> int:
                under_way.append(offset)
                met.wait()
                most[in_flight] = max(most.get(in_flight, 0), len(under_way))
                met.wait()
                under_way.remove(offset)
                return inner(offset, buffer)

            reader.read_into = read_into  # type: ignore[method-assign]
            return reader

    under_way: list[int] = []
    most: dict[int, int] = {}
    examine_storage(Meeting(), 4 * BLOCK)
    assert most == {1: 1, 2: 2, 4: 4}


def test_a_storage_without_conditions_is_told_with_what_follows_from_it() -> None:
    """Whatever the races show, it may be luck."""
    storage = Unconditional()
    report = examine_storage(storage, SIZE)

    assert broken(report) == ["process_end", "power_cut", "exclusive_create", "refuse_existing"]
    assert len(storage.probed) == 1
    assert storage.probed[0].startswith("doctor-")
    assert "memory doesn't decide who wins; 5 races" in detail(report, "exclusive_create")
    assert "can't refuse by itself; only looking first" in detail(report, "refuse_existing")
    assert report.checks_writes
    assert ["may notice late" in report.consequences[0], "for 7 days" in report.consequences[1]] == [True, True]
    assert storage.list("") == []


def test_a_storage_that_only_seems_to_refuse_has_worse_consequences() -> None:
    """One at a time it refuses; of many several win, and the library can't know."""
    report = examine_storage(CheckThenPut(), SIZE)

    assert broken(report) == ["process_end", "power_cut", "exclusive_create"]
    assert ["start one at a time" in report.consequences[0], "while nothing is saved" in report.consequences[1]] == [
        True,
        True,
    ]
    assert not report.checks_writes
    assert list(examine_storage(MemoryStorage(), SIZE).consequences) == []


def test_races_that_take_long_are_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(promises, "RACES_S", 0.0)
    report = examine_storage(MemoryStorage(), SIZE)

    assert detail(report, "exclusive_create") == "1 race of 16 threads: one winner each, and its bytes are there"
    assert detail(report, "atomic_create") == "none of 16 racers read nothing or half an object"


def test_what_is_far_away_is_read_once_and_with_more_in_flight() -> None:
    class Far(MemoryStorage):
        def __init__(self) -> None:
            super().__init__()
            self.capabilities = replace(self.capabilities, in_flight=8)
            self.opened: list[str] = []

        def open_reader(self, key: str, *, size: int | None = None) -> MemoryReader:
            self.opened.append(key.rpartition("/")[2])
            return super().open_reader(key)

    storage = Far()
    report = examine_storage(storage, SIZE)

    assert [speed.in_flight for speed in report.speeds] == [1, 4, 8, 16]
    assert storage.opened == ["tmp-object", "tmp-1", "tmp-4", "tmp-8", "tmp-16"]
    assert all(speed.read_s for speed in report.speeds)
    assert report.direct_io == "no file system"


# --- ends before its end ---


class Interrupted(MemoryStorage):
    """Ctrl-C while a key that holds ``at`` is created."""

    def __init__(self, at: str) -> None:
        super().__init__()
        self.at = at

    def create(self, key: str, data: bytes) -> None:
        super().create(key, data)
        if self.at in key:
            raise KeyboardInterrupt


@pytest.mark.parametrize("at", ["small/tmp-03", "race/tmp-02", "blocks/tmp-2.marker"])
def test_ctrl_c_leaves_nothing(at: str) -> None:
    storage = Interrupted(at)
    with pytest.raises(KeyboardInterrupt):
        examine_storage(storage, SIZE)
    assert storage.list("") == []


def test_ctrl_c_before_all_racers_have_come_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that wait at the start for the others are sent home."""
    submit, started = ThreadPoolExecutor.submit, []

    def interrupted(self: Any, *args: Any, **options: Any) -> Any:
        started.append(args)
        if len(started) == RACERS // 2:
            raise KeyboardInterrupt
        return submit(self, *args, **options)

    monkeypatch.setattr(ThreadPoolExecutor, "submit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        examine(str(tmp_path), SIZE)
    assert len(started) == RACERS // 2
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def full(fd: int, size: int) -> None:
        calls.append(size)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(posix, "preallocate", full)
    with pytest.raises(StorageFullError, match="No space left"):
        examine(str(tmp_path), SIZE)
    assert calls == [SIZE]
    assert list(tmp_path.iterdir()) == []


def test_what_fails_is_told_and_not_that_nothing_can_be_removed() -> None:
    class ReadOnly(MemoryStorage):
        def create(self, key: str, data: bytes) -> None:
            raise StorageError("you may not write")

        def delete(self, keys: Any) -> None:
            asked.append(list(keys))
            raise StorageError("you may not delete")

    asked: list[list[str]] = []
    with pytest.raises(StorageError, match="you may not write"):
        examine_storage(ReadOnly(), SIZE)
    assert len(asked) == 1


def test_what_can_not_be_removed_is_told() -> None:
    class Undeletable(MemoryStorage):
        def delete(self, keys: Any) -> None:
            names = list(keys)
            if any("/blocks/" in name for name in names) and len(names) > 2:
                raise StorageError("something is left")
            super().delete(names)

    with pytest.raises(StorageError, match="something is left"):
        examine_storage(Undeletable(), SIZE)


def test_what_is_out_of_reach_is_not_cleaned_up() -> None:
    class Gone(MemoryStorage):
        lists = 0

        def list(self, prefix: str) -> list[Entry]:
            self.lists += 1
            raise UnavailableError("the network is down")

        def delete(self, keys: Any) -> None:
            raise AssertionError("that would take as long again")

    storage = Gone()
    with pytest.raises(UnavailableError, match="the network is down"):
        examine_storage(storage, SIZE)
    assert storage.lists == 2


def test_uploads_that_were_begun_are_dropped() -> None:
    """Its own, where a storage keeps those that were broken off."""

    class Keeping(MemoryStorage):
        def uploads(self) -> list[Upload]:
            mine = next(key for key in created if key.startswith("doctor-")).partition("/")[0]
            return [Upload(f"{mine}/blocks/tmp-1", "1", 0.0), Upload("checkpoints/x/model", "2", 0.0)]

        def create(self, key: str, data: bytes) -> None:
            created.append(key)
            super().create(key, data)

        def abort_uploads(self, uploads: Any) -> None:
            aborted.extend(upload.token for upload in uploads)

    created: list[str] = []
    aborted: list[str] = []
    examine_storage(Keeping(), SIZE)
    assert aborted == ["1"]


# --- places and arguments ---


def test_too_little_space_is_said_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(StorageFullError, match=r"GB free and .* are needed, twice"):
        examine(str(tmp_path / "not-yet"), 10**18)
    assert list(tmp_path.iterdir()) == []


def test_file_systems_that_do_not_count_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(total=0, used=0, free=0)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)  # type: ignore[attr-defined]
    assert examine(str(tmp_path), SIZE).free_bytes is None


def test_the_size_is_checked(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="size_bytes=1 "):
        examine(str(tmp_path), 1)
    assert list(tmp_path.iterdir()) == []


def test_places_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="file is no folder"):
        examine(str(tmp_path / "file/store"), SIZE)
    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    with pytest.raises(StorageError, match="isn't writable"):
        examine(str(tmp_path / "store"), SIZE)


def test_progress_names_what_is_tried() -> None:
    seen: list[tuple[str, int, int]] = []
    examine_storage(MemoryStorage(), SIZE, progress=lambda *report: seen.append(report))
    assert [done for _, done, _ in seen] == [0, 1, 2, 3, 4]
    assert {total for _, _, total in seen} == {5}
    assert seen[0][0] == "small objects"
    assert seen[-1][0] == "blocks, 4 in flight"
