"""What the throughput of checkpoints is compared by: each subject saves a state durably and loads it in place."""

from __future__ import annotations

import mmap
import os
import secrets
import shutil
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

if TYPE_CHECKING:
    import torch

    from ckptstore.store import Store

    Tensors = dict[str, torch.Tensor]

_BLOCK_BYTES = 16 << 20
_PAGE_BYTES = 4096
_RAW_THREADS = 2


class Subject(Protocol):
    """One way to save and load. A context manager: on leaving, nothing of it is left on storage."""

    place: str
    fills_target: bool

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def save(self, state: Tensors) -> None:
        """Save; durable on return."""

    def load(self, target: Tensors) -> None:
        """Bring what was saved into the memory of ``target``."""


class _InFolder:
    """A subject whose files lie in a folder of its own."""

    fills_target = True

    def __init__(self, place: str, size_bytes: int) -> None:
        self.place = place
        self.size_bytes = size_bytes
        self.folder = Path(place)
        self.file = str(self.folder / "state")

    def __enter__(self) -> Self:
        self.folder.mkdir()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self.folder)


class CkptStore:
    """``store.save`` and ``store.load(into=…)``, hashes and all."""

    fills_target = True

    def __init__(self, place: str, size_bytes: int) -> None:
        self.place = place
        self._store: Store | None = None

    def __enter__(self) -> Self:
        from ckptstore.opening import open

        self._store = open(self.place)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._store is not None
        if "://" not in self.place:
            shutil.rmtree(self.place, ignore_errors=True)
        elif error is None:
            self._store.delete("latest")
            self._store.prune(grace_s=0)
        self._store.close()

    def save(self, state: Tensors) -> None:
        assert self._store is not None
        self._store.save({"model": state}, step=1)

    def load(self, target: Tensors) -> None:
        assert self._store is not None
        self._store.load("latest", into={"model": target})


class TorchSave(_InFolder):
    """``torch.save``, then fsync of the file and its folder."""

    def save(self, state: Tensors) -> None:
        import torch

        torch.save(state, self.file)
        sync(self.file)
        sync(self.place)

    def load(self, target: Tensors) -> None:
        import torch

        loaded = torch.load(self.file, weights_only=True, mmap=False)
        _copy(loaded, target)


class Safetensors(_InFolder):
    """``safetensors.torch.save_file``, then fsync of the file and its folder."""

    def save(self, state: Tensors) -> None:
        from safetensors.torch import save_file

        save_file(state, self.file)
        sync(self.file)
        sync(self.place)

    def load(self, target: Tensors) -> None:
        from safetensors.torch import load_file

        _copy(load_file(self.file), target)


class Dcp(_InFolder):
    """``torch.distributed.checkpoint`` in one process; it syncs its files itself, and the folder is synced here."""

    def save(self, state: Tensors) -> None:
        from torch.distributed import checkpoint

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            checkpoint.state_dict_saver.save({"model": state}, checkpoint_id=self.file, no_dist=True)
        sync(self.file)
        sync(self.place)

    def load(self, target: Tensors) -> None:
        from torch.distributed import checkpoint

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            checkpoint.state_dict_loader.load({"model": target}, checkpoint_id=self.file, no_dist=True)


class Raw(_InFolder):
    """The machine's limit: blocks of 16 MiB written and read by two threads, past the page cache, nothing hashed."""

    fills_target = False

    def __enter__(self) -> Self:
        self._end = -(-self.size_bytes // _PAGE_BYTES) * _PAGE_BYTES
        self._pages = [mmap.mmap(-1, _BLOCK_BYTES) for _ in range(_RAW_THREADS)]
        for page in self._pages:
            page[:] = secrets.token_bytes(_BLOCK_BYTES)
        return super().__enter__()

    def save(self, state: Tensors) -> None:
        with self._opened(os.O_WRONLY | os.O_CREAT) as fd:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(fd, 0, self._end)
            self._in_blocks(lambda block, offset: _write(fd, block, offset))
            os.fsync(fd)
        sync(self.place)

    def load(self, target: Tensors) -> None:
        with self._opened(os.O_RDONLY) as fd:
            self._in_blocks(lambda block, offset: _read(fd, block, offset))

    @contextmanager
    def _opened(self, flags: int) -> Iterator[int]:
        try:
            fd = os.open(self.file, flags | getattr(os, "O_DIRECT", 0), 0o600)
        except OSError:
            # The file system takes no direct I/O.
            fd = os.open(self.file, flags, 0o600)
        try:
            yield fd
        finally:
            os.close(fd)

    def _in_blocks(self, transfer: Callable[[memoryview, int], None]) -> None:
        def lane(number: int) -> None:
            page = memoryview(self._pages[number])
            for offset in range(number * _BLOCK_BYTES, self._end, _RAW_THREADS * _BLOCK_BYTES):
                transfer(page[: self._end - offset], offset)

        with ThreadPoolExecutor(_RAW_THREADS) as lanes:
            list(lanes.map(lane, range(_RAW_THREADS)))


SUBJECTS: dict[str, Callable[[str, int], Subject]] = {
    "ckptstore": CkptStore,
    "torch": TorchSave,
    "safetensors": Safetensors,
    "dcp": Dcp,
    "raw": Raw,
}
"""What can be measured, by name; made of the place for its files and the bytes of the state."""


def sync(path: str) -> None:
    """Make a file or folder durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def drop_cache(place: str) -> None:
    """Drop every file below a folder from the page cache, so that the next read comes from the storage."""
    for folder, _, names in os.walk(place):
        for name in names:
            fd = os.open(os.path.join(folder, name), os.O_RDONLY)
            try:
                # Only what is on storage already can be dropped.
                os.fsync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)


def _copy(loaded: Tensors, target: Tensors) -> None:
    for name, tensor in target.items():
        tensor.copy_(loaded[name])


def _write(fd: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)


def _read(fd: int, buffer: memoryview, offset: int) -> None:
    done = 0
    while done < len(buffer) and (count := os.preadv(fd, [buffer[done:]], offset + done)):
        done += count
