"""``memory://`` keeps the contract, and shares its objects by name."""

from __future__ import annotations

import time
from collections.abc import Callable
from uuid import uuid4

import pytest

from ckptstore.errors import NotFoundError
from ckptstore.storage import MemoryStorage, Storage
from ckptstore.storage.memory import StoredObject, _spaces

from .contract import StorageContract


class RawMemory:
    def __init__(self, name: str) -> None:
        self.name = name

    def get(self, key: str) -> bytes:
        return _spaces[self.name][key].data

    def put(self, key: str, data: bytes) -> None:
        _spaces[self.name][key] = StoredObject(data, time.time())

    def keys(self) -> list[str]:
        return sorted(_spaces[self.name])


class TestMemoryStorage(StorageContract):
    @pytest.fixture
    def reopen(self) -> Callable[..., Storage]:
        name = uuid4().hex
        return lambda **options: MemoryStorage(name, **options)

    @pytest.fixture
    def storage(self, reopen: Callable[..., Storage]) -> Storage:
        return reopen()

    @pytest.fixture
    def raw(self, storage: Storage) -> RawMemory:
        return RawMemory(storage.url.removeprefix("memory://"))


def test_without_a_name_nothing_is_shared() -> None:
    one = MemoryStorage()
    one.create("a", b"x")

    assert MemoryStorage().list("") == []
    assert [entry.key for entry in one.list("")] == ["a"]


def test_it_promises_no_durability() -> None:
    assert MemoryStorage().capabilities.durability == "none"


def test_an_unknown_name_is_not_found_when_read_only() -> None:
    with pytest.raises(NotFoundError, match="memory://nobody-opened-this"):
        MemoryStorage("nobody-opened-this", read_only=True)
