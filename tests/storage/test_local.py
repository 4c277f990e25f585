"""A local folder keeps the contract: past the page cache, through it, and in memory-backed ``/dev/shm``."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ckptstore.errors import ExistsError, NotFoundError, StorageError
from ckptstore.storage import LocalStorage, Storage, local

from .contract import StorageContract, read_object, write_object

SHM = Path("/dev/shm")


class RawFiles:
    def __init__(self, root: Path) -> None:
        self.root = root

    def get(self, key: str) -> bytes:
        return (self.root / key).read_bytes()

    def put(self, key: str, data: bytes) -> None:
        path = self.root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def keys(self) -> list[str]:
        """All files, and the folders that are empty."""
        found = [path for path in self.root.rglob("*") if not path.is_dir() or not any(path.iterdir())]
        return sorted(path.relative_to(self.root).as_posix() for path in found)


class LocalContract(StorageContract):
    direct = True

    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        return tmp_path / "root"

    @pytest.fixture
    def reopen(self, root: Path) -> Callable[..., Storage]:
        return lambda **options: LocalStorage(root, direct=self.direct, **options)

    @pytest.fixture
    def storage(self, reopen: Callable[..., Storage]) -> Storage:
        return reopen()

    @pytest.fixture
    def raw(self, root: Path) -> RawFiles:
        return RawFiles(root)


class TestDirect(LocalContract):
    pass


class TestBuffered(LocalContract):
    direct = False


@pytest.mark.skipif(not SHM.is_dir(), reason="no /dev/shm here")
class TestSharedMemory(LocalContract):
    @pytest.fixture
    def root(self, tmp_path: Path) -> Iterator[Path]:
        root = SHM / f"ckptstore-{os.getpid()}-{tmp_path.name}"
        yield root
        shutil.rmtree(root, ignore_errors=True)

    def test_it_survives_no_power_cut(self, storage: Storage) -> None:
        assert storage.capabilities.durability == "process-crash"
        assert storage.capabilities.kind == "tmpfs"


class TestWithoutHardLinks(LocalContract):
    """The contract once more where ``link`` is refused, as on vfat and some network mounts."""

    @pytest.fixture(autouse=True)
    def refused(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        calls: list[str] = []

        def refuse(source: str, target: str, **_: object) -> None:
            calls.append(target)
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", refuse)
        return calls

    def test_the_capabilities_say_so(self, storage: Storage, raw: RawFiles, refused: list[str]) -> None:
        assert storage.capabilities.atomic_create
        storage.create("a/b", b"x")
        storage.create("a/c", b"y")

        assert refused == ["b"]
        assert not storage.capabilities.atomic_create
        assert raw.keys() == ["a/b", "a/c"]

    def test_a_failed_write_leaves_no_torn_object(
        self, storage: Storage, raw: RawFiles, monkeypatch: pytest.MonkeyPatch, refused: list[str]
    ) -> None:
        storage.create("a", b"x")
        monkeypatch.setattr(os, "write", _raising(OSError(28, "No space left on device")))

        with pytest.raises(StorageError, match="space") as caught:
            storage.create("b", b"y")

        assert refused == ["a"]
        assert caught.value.outcome == "failed"
        assert raw.keys() == ["a"]


@pytest.fixture
def vfat(tmp_path: Path) -> Iterator[Path]:
    """A real file system without hard links, on a loop device."""
    mkfs, mount = shutil.which("mkfs.vfat"), shutil.which("mount")
    if mkfs is None or mount is None or os.geteuid() != 0 or "vfat" not in Path("/proc/filesystems").read_text():
        pytest.skip("needs root, mkfs.vfat, mount and vfat in the kernel")
    image, point = tmp_path / "image", tmp_path / "mount"
    point.mkdir()
    with image.open("wb") as file:
        file.truncate(32 << 20)
    subprocess.run([mkfs, image], check=True, capture_output=True)
    if subprocess.run([mount, "-o", "loop", image, point], capture_output=True).returncode:
        pytest.skip("loop devices can't be mounted here")
    yield point
    subprocess.run(["umount", point], check=True)


def test_a_real_vfat(vfat: Path) -> None:
    storage = LocalStorage(vfat / "root")
    storage.create("commits/a", b"x")
    write_object(storage, "d/large", [b"y" * 100_000], sized=True)

    with pytest.raises(ExistsError):
        storage.create("commits/a", b"z")

    assert storage.capabilities.kind == "vfat"
    assert not storage.capabilities.atomic_create
    assert storage.read("commits/a", limit=1) == b"x"
    assert read_object(storage, "d/large") == b"y" * 100_000
    storage.close()


def _raising(error: OSError) -> Callable[..., int]:
    def fail(*_: object, **__: object) -> int:
        raise error

    return fail


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


def test_a_folder_below_a_file_is_refused_at_open(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")

    for path in (tmp_path / "file", tmp_path / "file/root"):
        with pytest.raises(StorageError, match="file is no folder"):
            LocalStorage(path)
        with pytest.raises(StorageError, match="file is no folder"):
            LocalStorage(path, read_only=True)


def test_a_root_that_is_a_dangling_symlink_is_refused_at_open(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")

    with pytest.raises(StorageError, match="link is no folder"):
        LocalStorage(tmp_path / "link/root")


def test_the_root_may_be_reached_through_symlinks(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")

    LocalStorage(tmp_path / "link").create("a", b"x")

    assert (tmp_path / "real/a").read_bytes() == b"x"


@pytest.mark.skipif(os.geteuid() == 0, reason="permission bits don't stop root")
def test_an_unwritable_root_is_refused_at_open(root: Path) -> None:
    root.mkdir(mode=0o500)

    with pytest.raises(StorageError, match=r"isn't writable.*read_only=True"):
        LocalStorage(root)
    assert LocalStorage(root, read_only=True).list("") == []


def test_an_unwritable_root_is_refused_at_open_also_for_root(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's answer is replaced, because it always says yes to root."""
    root.mkdir()
    asked: list[str] = []
    monkeypatch.setattr(os, "access", lambda path, *_, **__: asked.append(path))

    with pytest.raises(StorageError, match=r"isn't writable.*read_only=True"):
        LocalStorage(root)
    assert asked == [str(root)]


def test_a_read_only_file_system_is_refused_at_open(root: Path) -> None:
    root.mkdir()
    bind = f"mount --bind {root} {root} && mount -o remount,bind,ro {root} {root}"
    script = f"""
from ckptstore.storage import LocalStorage
LocalStorage({str(root)!r}, read_only=True)
try:
    LocalStorage({str(root)!r})
except OSError as error:
    print(error)
"""
    unshare = shutil.which("unshare")
    command = [str(unshare), "--mount", "sh", "-c", f'{bind} && exec "$0" -c "$1"', sys.executable, script]
    if unshare is None or subprocess.run([*command[:4], bind], capture_output=True).returncode:
        pytest.skip("read-only bind mounts need root")
    done = subprocess.run(command, capture_output=True, text=True, env=_with_project())

    assert "is on a read-only file system" in done.stdout, done.stderr


def _with_project() -> dict[str, str]:
    project = Path(local.__file__).parents[2]
    return {**os.environ, "PYTHONPATH": str(project)}


def test_missing_folders_above_the_root_are_made(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path / "a/b/c")
    assert storage.list("") == []

    storage.create("x", b"1")

    assert (tmp_path / "a/b/c/x").read_bytes() == b"1"


def test_the_umask_decides_who_may_read(root: Path) -> None:
    old = os.umask(0o027)
    try:
        LocalStorage(root).create("a/b", b"x")
        write_object(LocalStorage(root), "a/c", [b"y"], sized=True)
    finally:
        os.umask(old)

    assert [(root / name).stat().st_mode & 0o777 for name in ("", "a", "a/b", "a/c")] == [0o750, 0o750, 0o640, 0o640]


def test_a_root_removed_while_open_is_an_error_and_not_empty(root: Path) -> None:
    storage = LocalStorage(root)
    storage.create("a", b"x")
    shutil.rmtree(root)

    for use in (lambda: storage.list(""), lambda: storage.create("b", b""), lambda: storage.size("a")):
        with pytest.raises(StorageError, match="was removed"):
            use()
    assert not root.exists()


def test_empty_folders_are_listed_and_deleted(root: Path) -> None:
    storage = LocalStorage(root)
    for folder in ("a/b/c", "a/d", "full/empty"):
        (root / folder).mkdir(parents=True)
    (root / "full/file").write_text("x")

    assert [entry.key for entry in storage.list("")] == ["a/b/c/", "a/d/", "full/empty/", "full/file"]
    assert storage.list("a/d/") == []

    storage.delete(["a/b/c/", "full/empty/", "full/", "a/"])

    assert RawFiles(root).keys() == ["a/d", "full/file"]
    storage.delete(["a/d/"])
    assert RawFiles(root).keys() == ["full/file"]


def test_the_root_itself_is_never_removed(root: Path) -> None:
    storage = LocalStorage(root)
    storage.create("a/b", b"x")
    storage.delete(["a/b"])

    assert root.is_dir()
    assert list(root.iterdir()) == []


def test_foreign_names_are_listed_and_not_entered(root: Path) -> None:
    storage = LocalStorage(root)
    storage.create("a/b", b"x")
    (root / "a/some file.txt").write_text("xyz")
    (root / "lost+found").mkdir()
    (root / "lost+found/inside").write_text("x")
    (root / os.fsdecode(b"a/\xff")).write_text("")

    listed = {entry.key: entry.size for entry in storage.list("")}

    assert listed == {"a/b": 1, "a/some file.txt": 3, "lost+found/": 0, "a/\udcff": 0}
    for key in ("a/some file.txt", "a/\udcff"):
        with pytest.raises(StorageError, match="no valid key"):
            storage.read(key, limit=9)


def test_many_files_are_all_listed_while_others_disappear(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "a").mkdir(parents=True)
    for i in range(3000):
        (root / f"a/{i:04d}").touch()
    vanished: list[str] = []
    scan = local._entry

    def remove_first(prefix: str, item: os.DirEntry[str]) -> object:
        if item.name.endswith("7"):
            os.unlink(root / prefix / item.name)
            vanished.append(item.name)
        return scan(prefix, item)

    monkeypatch.setattr(local, "_entry", remove_first)

    found = LocalStorage(root).list("")

    assert len(vanished) == 300
    assert [entry.key for entry in found] == [f"a/{i:04d}" for i in range(3000) if i % 10 != 7]


def test_threads_that_list_at_once_all_see_everything(root: Path) -> None:
    root.mkdir()
    for i in range(3000):
        (root / f"{i:04d}").touch()
    storage = LocalStorage(root)

    with ThreadPoolExecutor(4) as pool:
        counts = list(pool.map(lambda _: len(storage.list("")), range(12)))

    assert counts == [3000] * 12


def test_a_forked_child_reads(root: Path) -> None:
    storage = LocalStorage(root)
    write_object(storage, "a", [b"x" * 10_000], sized=True)
    reader = storage.open_reader("a")

    child = os.fork()
    if child == 0:
        try:
            buffer = bytearray(10_000)
            reader.read_into(0, memoryview(buffer))
            same = buffer == read_object(storage, "a") and storage.list("")[0].size == 10_000
            os._exit(0 if same else 1)
        finally:
            os._exit(2)

    assert os.waitpid(child, 0)[1] == 0
    assert storage.read("a", limit=10_000) == b"x" * 10_000


def test_descriptors_are_given_back(root: Path) -> None:
    storage = LocalStorage(root)
    storage.create("a/b", b"x" * 5000)
    before = len(os.listdir("/dev/fd"))
    for i in range(5):
        storage.read("a/b", limit=9999)
        read_object(storage, "a/b")
        storage.create(f"c/d/{i}", b"")
        write_object(storage, f"c/e/{i}", [b"x"], sized=True)
        storage.open_writer("c/f").abort()
        storage.list("")
        storage.delete([f"c/d/{i}"])
        with pytest.raises(NotFoundError):
            storage.read("c/none", limit=1)

    assert len(os.listdir("/dev/fd")) == before
    storage.close()
    assert len(os.listdir("/dev/fd")) == before - 1


def test_standard_streams_are_never_the_file(root: Path) -> None:
    """A process with its standard streams closed prints; nothing of it may go into an object."""
    script = f"""
import os
from ckptstore.storage import LocalStorage
for fd in (0, 1, 2):
    os.close(fd)
storage = LocalStorage({str(root)!r})
writer = storage.open_writer("a")
writer.write(writer.reserve(4), memoryview(b"good"))
for fd in (0, 1, 2):
    try:
        os.write(fd, b"bad!")
    except OSError:
        pass
writer.finish()
storage.create("done", b"")
"""
    subprocess.run([sys.executable, "-c", script], check=True, env=_with_project())

    assert (root / "a").read_bytes() == b"good"
    assert (root / "done").exists()
