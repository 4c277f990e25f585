"""A storage that stops in the middle, as a killed process would."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from ckptstore.storage.base import Entry, ObjectReader, ObjectWriter, Slot, Storage, Upload

T = TypeVar("T")


class Crash(BaseException):
    """Not one of the library's errors, nor any that it may handle."""


class CrashingStorage:
    """The real storage up to the ``at``-th change, where it raises ``Crash`` before or after the change took effect.

    Afterwards every call raises ``Crash``: a dead process does nothing more, and removes nothing.
    """

    def __init__(self, inner: Storage, at: int, *, after: bool) -> None:
        self.inner, self.left, self.after = inner, at, after
        self.dead = False
        self.url, self.capabilities = inner.url, inner.capabilities

    def change(self, action: Callable[[], T]) -> T:
        self.check()
        self.left -= 1
        if self.left > 0:
            return action()
        self.dead = True
        if self.after:
            action()
        raise Crash

    def check(self) -> None:
        if self.dead:
            raise Crash

    def list(self, prefix: str) -> list[Entry]:
        self.check()
        return self.inner.list(prefix)

    def size(self, key: str) -> int:
        self.check()
        return self.inner.size(key)

    def read(self, key: str, *, limit: int) -> bytes:
        self.check()
        return self.inner.read(key, limit=limit)

    def create(self, key: str, data: bytes) -> None:
        self.change(lambda: self.inner.create(key, data))

    def open_writer(self, key: str, *, size: int | None = None) -> ObjectWriter:
        return CrashingWriter(self, self.change(lambda: self.inner.open_writer(key, size=size)))

    def open_reader(self, key: str, *, size: int | None = None) -> ObjectReader:
        self.check()
        return self.inner.open_reader(key, size=size)

    def delete(self, keys: Iterable[str]) -> None:
        # One by one: a crash may come between any two.
        for key in keys:
            self.change(lambda key=key: self.inner.delete([key]))  # type: ignore[misc]

    def replace(self, key: str, by: str) -> None:
        self.change(lambda: self.inner.replace(key, by))

    def probe(self, key: str, data: bytes) -> None:
        self.check()
        self.inner.probe(key, data)

    def uploads(self) -> Sequence[Upload]:
        self.check()
        return self.inner.uploads()

    def abort_uploads(self, uploads: Iterable[Upload]) -> None:
        self.check()
        self.inner.abort_uploads(uploads)

    def close(self) -> None:
        self.inner.close()


class CrashingWriter:
    def __init__(self, storage: CrashingStorage, inner: Any) -> None:
        self.storage, self.inner = storage, inner

    def reserve(self, length: int) -> Slot:
        return self.inner.reserve(length)

    def write(self, slot: Slot, data: memoryview) -> None:
        self.storage.change(lambda: self.inner.write(slot, data))

    def finish(self) -> int:
        return self.storage.change(self.inner.finish)

    def abort(self) -> None:
        if not self.storage.dead:
            self.inner.abort()
