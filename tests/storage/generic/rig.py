"""File systems of fsspec under names of their own, as tests need them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from ckptstore.errors import IntegrityError, StorageError


def register(protocol: str, cls: type[fsspec.AbstractFileSystem]) -> None:
    """Let URLs of ``protocol`` mean ``cls``."""
    fsspec.register_implementation(protocol, cls, clobber=True)


class MemoryRaw:
    """The objects below ``root`` of fsspec's memory, past the code under test."""

    def __init__(self, root: str) -> None:
        self.root = f"/{root}/"

    def get(self, key: str) -> bytes:
        data: bytes = MemoryFileSystem.store[self.root + key].getvalue()
        return data

    def put(self, key: str, data: bytes) -> None:
        MemoryFileSystem().pipe_file(self.root + key, data)

    def keys(self) -> list[str]:
        return sorted(name.removeprefix(self.root) for name in MemoryFileSystem.store if name.startswith(self.root))


class FolderRaw:
    """The files below a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def get(self, key: str) -> bytes:
        return (self.root / key).read_bytes()

    def put(self, key: str, data: bytes) -> None:
        (self.root / key).parent.mkdir(parents=True, exist_ok=True)
        (self.root / key).write_bytes(data)

    def keys(self) -> list[str]:
        return sorted(path.relative_to(self.root).as_posix() for path in self.root.rglob("*") if path.is_file())


class VanishingContract:
    """For storage where nothing is left to read of an object that was removed."""

    def test_open_reader_survives_deletion(self, storage: Any, raw: Any) -> None:
        """It can't. Then that is said, and no other object's bytes are taken for it."""
        raw.put("a", b"x" * 5000)
        reader = storage.open_reader("a")
        storage.delete(["a"])
        with pytest.raises(IntegrityError, match="removed while it was read"):
            reader.read_into(0, memoryview(bytearray(5000)))
        raw.put("a", b"y" * 4000)
        with pytest.raises(IntegrityError, match="replaced while it was read"):
            reader.read_into(0, memoryview(bytearray(5000)))


class Injected(ConnectionResetError):
    """The fault that tests inject."""


class BrokenFile:
    """Writes half of what it is given, then breaks; closing publishes that half, as fsspec's own files do."""

    def __init__(self, file: Any, fired: list[str], path: str) -> None:
        self._file, self._fired, self._path = file, fired, path

    def write(self, data: Any) -> int:
        self._file.write(data[: len(data) // 2])
        self._fired.append(self._path)
        raise Injected("the connection broke")

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> BrokenFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class FragileFileSystem(MemoryFileSystem):
    """fsspec's memory, through files alone: each path that contains ``breaking`` breaks in the midst of a write."""

    protocol = "fragile"
    breaking: ClassVar[str | None] = None
    fired: ClassVar[list[str]] = []

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.removeprefix("fragile://"))

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        with self.open(path, "wb") as file:
            file.write(value)

    def _open(self, path: str, mode: str = "rb", **how: Any) -> Any:
        file = super()._open(path, mode, **how)
        if mode != "rb" and self.breaking is not None and self.breaking in path:
            return BrokenFile(file, self.fired, path)
        return file


class BucketContract:
    """For storage whose paths begin with a bucket."""

    def test_a_missing_bucket_is_no_empty_store(self, elsewhere: Any) -> None:
        with pytest.raises(StorageError, match="bucket"):
            elsewhere.list("")
        with pytest.raises(StorageError, match="no such bucket") as caught:
            elsewhere.create("a", b"x")
        assert caught.value.outcome == "failed"
        writer = elsewhere.open_writer("b")
        with pytest.raises(StorageError, match="no such bucket"):
            writer.finish()
        writer.abort()


def patience(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Have what is opened from now on try again for ``seconds``."""
    for name in ("DEADLINE_S", "PATIENCE_S"):
        monkeypatch.setattr(f"ckptstore.storage.retrying.{name}", seconds)
