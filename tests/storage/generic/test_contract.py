"""What fsspec reaches does what every storage does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import pytest

from ckptstore.storage import Storage
from ckptstore.storage.generic import GenericStorage
from tests.storage.contract import StorageContract
from tests.storage.generic.rig import FolderRaw, MemoryRaw, VanishingContract


class TestMemoryOfFsspec(VanishingContract, StorageContract):
    @pytest.fixture
    def root(self) -> str:
        return uuid4().hex

    @pytest.fixture
    def reopen(self, root: str) -> Callable[..., Storage]:
        return lambda **how: GenericStorage("memory", root, {}, **how)

    @pytest.fixture
    def storage(self, reopen: Callable[..., Storage]) -> Storage:
        return reopen()

    @pytest.fixture
    def raw(self, root: str) -> MemoryRaw:
        return MemoryRaw(root)


class TestFolderOfFsspec(VanishingContract, StorageContract):
    @pytest.fixture
    def reopen(self, tmp_path: Path) -> Callable[..., Storage]:
        return lambda **how: GenericStorage("local", str(tmp_path), {}, **how)

    @pytest.fixture
    def storage(self, reopen: Callable[..., Storage]) -> Storage:
        return reopen()

    @pytest.fixture
    def raw(self, tmp_path: Path) -> FolderRaw:
        return FolderRaw(tmp_path)

    def test_empty_folders_go_with_their_last_object(self, storage: Storage, raw: FolderRaw) -> None:
        raw.put("a/b/c", b"x")
        raw.put("a/d", b"x")

        storage.delete(["a/b/c"])

        assert [path.name for path in raw.root.rglob("*")] == ["a", "d"]
        storage.delete(["a/d"])
        assert list(raw.root.iterdir()) == []
