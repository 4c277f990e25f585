"""Ways to save a training run beside its steps: what training waits for, and what it doesn't."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

import ckptstore as cs
from benchmarks.rounds import settle
from benchmarks.workload import Workload
from ckptstore.tools.subjects import Raw, sync


class Saver:
    """Saves nothing: training without saves, and the base of those that do.

    A context manager: on leaving, nothing of it is left on storage.
    """

    def __init__(self, folder: str, workload: Workload) -> None:
        self.workload = workload
        self.folder = Path(folder)
        self.count = 0

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self.folder)

    def save(self) -> None:
        """Begin a save; on return, training may go on up to its next ``optimizer.step()``."""

    def read(self) -> None:
        """Until nothing of the state is still to be read, without hastening it."""

    def before_step(self) -> None:
        """What the user must do before ``optimizer.step()``, so that what is saved is what was there at the call."""

    def busy(self) -> bool:
        """Whether a save is going on."""
        return False

    def wait(self) -> None:
        """Until what was saved is durable."""

    def reported_s(self) -> float | None:
        """Seconds that training was blocked by the last save as the library itself counts them, where it does."""
        return None

    def tidy(self) -> None:
        """Remove what was saved so far, to make room."""
        for path in self.folder.iterdir():
            shutil.rmtree(path)
        settle()

    def next_place(self) -> str:
        """A path that no save has used."""
        self.count += 1
        return str(self.folder / f"{self.count:03d}")


class Copy(Saver):
    """The machine's limit for a copy at the call: one plain pass over memory that is there already."""

    def __enter__(self) -> Self:
        self._buffers = {name: tensor.clone() for name, tensor in self.workload.tensors().items()}
        return super().__enter__()

    def save(self) -> None:
        for name, tensor in self.workload.tensors().items():
            self._buffers[name].copy_(tensor)


class Write(Saver):
    """The machine's limit for the background: as many bytes in plain direct blocks, from nowhere and not hashed."""

    def __enter__(self) -> Self:
        self._raw = Raw(str(self.folder), self.workload.bytes).__enter__()
        self._pool = ThreadPoolExecutor(1)
        self._written: Future[None] | None = None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()
        self._raw.__exit__(kind, error, trace)

    def save(self) -> None:
        self._written = self._pool.submit(self._raw.save, {})

    def busy(self) -> bool:
        return self._written is not None and not self._written.done()

    def wait(self) -> None:
        if self._written is not None:
            self._written.result()

    def tidy(self) -> None:
        Path(self._raw.file).unlink(missing_ok=True)
        settle()


class TorchSave(Saver):
    """``torch.save``, then fsync of the file and its folder: blocks from beginning to end."""

    def save(self) -> None:
        place = self.next_place()
        Path(place).mkdir()
        torch.save(self.workload.plain(), f"{place}/state.pt")
        sync(f"{place}/state.pt")
        sync(place)


class Background(Saver):
    """One whose save goes on behind the training; ``_begin`` starts it and keeps what ``wait`` needs."""

    def __enter__(self) -> Self:
        self._upload: Any = None
        self._staging: Any = None
        return super().__enter__()

    def read(self) -> None:
        if self._staging is not None:
            self._staging.result()

    def before_step(self) -> None:
        self.read()

    def busy(self) -> bool:
        return self._upload is not None and not self._upload.done()

    def wait(self) -> None:
        if self._upload is not None:
            self._upload.result()


class DcpAsync(Background):
    """``dcp.async_save`` as it comes: it copies the state at the call, and a thread writes the copy."""

    def save(self) -> None:
        from torch.distributed import checkpoint

        begun = checkpoint.async_save(self.workload.plain(), checkpoint_id=self.next_place(), **self._options())
        self._staging = getattr(begun, "staging_completion", None)
        self._upload = getattr(begun, "upload_completion", begun)

    def _options(self) -> dict[str, Any]:
        return {"no_dist": True}


class DcpOverlapped(DcpAsync):
    """``dcp.async_save`` with a stager that is kept and copies in a thread; the user must wait for that."""

    shared_memory = False

    def __enter__(self) -> Self:
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        options = StagingOptions(
            use_pinned_memory=False,
            use_shared_memory=self.shared_memory,
            use_async_staging=True,
            use_non_blocking_copy=False,
        )
        self._stager = DefaultStager(options)
        return super().__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stager.close()
        super().__exit__(kind, error, trace)

    def _options(self) -> dict[str, Any]:
        return {"no_dist": True, "async_stager": self._stager}


class DcpProcess(DcpOverlapped):
    """The same with a process of its own that writes: all that DCP offers to keep out of the training's way."""

    shared_memory = True

    def __enter__(self) -> Self:
        from torch import distributed

        distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
        return super().__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        from torch import distributed

        super().__exit__(kind, error, trace)
        distributed.destroy_process_group()

    def _options(self) -> dict[str, Any]:
        from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

        return {"async_stager": self._stager, "async_checkpointer_type": AsyncCheckpointerType.PROCESS}


class TorchSnapshot(Background):
    """``Snapshot.async_take`` of torchsnapshot, which copies at the call and syncs nothing."""

    def save(self) -> None:
        from torchsnapshot import Snapshot, StateDict

        self._pending = Snapshot.async_take(self.next_place(), {"state": StateDict(**self.workload.plain())})

    def busy(self) -> bool:
        return not self._pending.done()

    def wait(self) -> None:
        self._pending.wait()


class InStore(Saver):
    """``store.save``, each time into the same store; durable on return."""

    def __enter__(self) -> Self:
        self._store = cs.open(str(self.folder))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._store.close()
        super().__exit__(kind, error, trace)

    def save(self) -> None:
        self.count += 1
        self._store.save(self.workload.state, step=self.count)


class Async(InStore):
    """``store.save(mode="async")``: copied at the call into memory that is kept."""

    mode = "async"

    def __enter__(self) -> Self:
        self._handle: Any = None
        return super().__enter__()

    def save(self) -> None:
        self.count += 1
        self._handle = self._store.save(self.workload.state, step=self.count, mode=self.mode)

    def busy(self) -> bool:
        return self._handle is not None and not self._handle.done()

    def wait(self) -> None:
        if self._handle is not None:
            self._handle.result()

    def reported_s(self) -> float | None:
        return self._handle.stall_s if self._handle is not None else None

    def tidy(self) -> None:
        for checkpoint in self._store.checkpoints():
            self._store.delete(checkpoint.id)
        self._store.prune(grace_s=0)
        settle()


class Overlapped(Async):
    """``store.save(mode="overlapped")``: read in place until the next ``optimizer.step()``, which waits by itself."""

    mode = "overlapped"

    def __enter__(self) -> Self:
        cs.fence(self.workload.optimizer)
        return super().__enter__()

    def read(self) -> None:
        # wait_staged would copy what is not yet read, as a step does: there is no other sign of it than the end.
        self.wait()


SAVERS: dict[str, Callable[[str, Workload], Saver]] = {
    "none": Saver,
    "copy": Copy,
    "write": Write,
    "ckptstore_overlapped": Overlapped,
    "ckptstore_async": Async,
    "dcp": DcpAsync,
    "dcp_overlapped": DcpOverlapped,
    "dcp_process": DcpProcess,
    "torch": TorchSave,
    "torchsnapshot": TorchSnapshot,
}
"""By name; made of a folder that is not yet there and the run that is saved."""


def installed(names: tuple[str, ...]) -> tuple[str, ...]:
    """Those of ``names`` whose package is there."""
    return tuple(name for name in names if name != "torchsnapshot" or find_spec(name) is not None)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings of the rivals, most of which come from their threads: one process is meant."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def savers(folder: str, workload: Workload, names: tuple[str, ...]) -> Iterator[dict[str, Saver]]:
    """The savers ``names`` below ``folder``, each of which has saved once: memory and imports are warm."""
    with quiet(), ExitStack() as stack:
        made = {name: stack.enter_context(SAVERS[name](os.path.join(folder, name), workload)) for name in names}
        for saver in made.values():
            saver.save()
            saver.wait()
            saver.tidy()
        yield made
