"""Training loops that save while they train, each in its own way; loops of frameworks are in files of their own."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import Any, ClassVar, Self

import torch
from torch.utils.data import DataLoader, Dataset

import ckptstore as cs
from benchmarks.rounds import timed
from benchmarks.savers import DcpAsync, DcpOverlapped, Saver
from benchmarks.workload import Size, Workload
from ckptstore.store import SaveMode


@dataclass
class SaveTimes:
    """One save: after which step, for how long training waited, and when it was durable, counted from its beginning.

    ``durable_s`` is None where the way to save never waits for the storage.
    """

    step: int
    blocked_s: float
    durable_s: float | None


class Rows(Dataset[Any]):
    """As many samples as a loop needs, drawn when they are asked for."""

    def __init__(self, workload: Workload, count: int) -> None:
        self._workload, self._count = workload, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Any:
        return self._workload.row()


class Loop:
    """A plain loop that saves nothing, and the base of those that do.

    A context manager: on leaving, nothing of it is left on storage.
    """

    def __init__(self, folder: str, size: Size) -> None:
        self.folder = Path(folder)
        self.size = size
        self.workload = self.make_workload()

    def make_workload(self) -> Workload:
        """What is trained."""
        return Workload(self.size)

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self.folder)

    def train(self, steps: int) -> None:
        """Train for so many steps, and save nothing."""
        for rows in self.loader(steps):
            self.backward(rows)
            self.workload.optimizer.step()

    def train_saving(self, steps: int, every: int) -> list[SaveTimes]:
        """Train for so many steps, and save after each ``every``; returns when all of them are over."""
        self.train(steps)
        return [SaveTimes(step, 0.0, None) for step in range(every, steps + 1, every)]

    def loader(self, steps: int) -> DataLoader[Any]:
        """The batches of so many steps."""
        return DataLoader(Rows(self.workload, steps * self.size.batch), batch_size=self.size.batch)

    def backward(self, rows: torch.Tensor) -> torch.Tensor:
        """Gradients of one batch; its loss."""
        self.workload.optimizer.zero_grad()
        loss = self.workload.loss(rows)
        loss.backward()
        return loss


class Ours(Loop):
    """A ``Checkpointer`` in the plain loop."""

    mode: ClassVar[SaveMode] = "overlapped"

    def train_saving(self, steps: int, every: int) -> list[SaveTimes]:
        found: list[SaveTimes] = []

        def note(saved: cs.Saved) -> None:
            found.append(SaveTimes(saved.checkpoint.step, saved.stall_s, saved.seconds))

        store, save = str(self.folder / "store"), cs.every(steps=every)
        with cs.Checkpointer(
            store, self.workload.state, save=save, mode=self.mode, on_saved=note, verbose=False
        ) as ckpt:
            ckpt.resume()
            for rows in ckpt.batches(self.loader(steps)):
                loss = self.backward(rows)
                self.workload.optimizer.step()
                ckpt.step(loss=loss)
        return found


class OursAsync(Ours):
    """The same, copied at the call."""

    mode = "async"


class WithSaver(Loop):
    """A plain loop that calls a ``Saver``, and waits for the last save before it begins the next one."""

    saver: ClassVar[Callable[[str, Workload], Saver]] = DcpAsync
    is_durable = True

    def __enter__(self) -> Self:
        super().__enter__()
        self._stack = ExitStack()
        self._saver = self._stack.enter_context(type(self).saver(str(self.folder / "saves"), self.workload))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        super().__exit__(kind, error, trace)

    def train_saving(self, steps: int, every: int) -> list[SaveTimes]:
        found: list[SaveTimes] = []
        waiting: Thread | None = None
        for step, rows in enumerate(self.loader(steps), 1):
            self.backward(rows)
            if found:
                found[-1].blocked_s += timed(self._saver.before_step)
            self.workload.optimizer.step()
            if step % every == 0:
                begin = time.perf_counter()
                if waiting is not None:
                    waiting.join()
                found.append(times := SaveTimes(step, time.perf_counter() - begin, None))
                waiting = self._save(times)
        if waiting is not None:
            waiting.join()
        return found

    def _save(self, times: SaveTimes) -> Thread:
        begin = time.perf_counter()
        self._saver.save()
        times.blocked_s += time.perf_counter() - begin

        def wait() -> None:
            self._saver.wait()
            times.durable_s = time.perf_counter() - begin if self.is_durable else None

        thread = Thread(target=wait)
        thread.start()
        return thread


class Dcp(WithSaver):
    """``dcp.async_save`` as it comes."""


class DcpStaged(WithSaver):
    """``dcp.async_save`` that copies in a thread, waited for by hand before the step."""

    saver = DcpOverlapped


class PlainSave(Saver):
    """``torch.save`` and nothing else, as most loops have it: what the system has not written yet can be lost."""

    def save(self) -> None:
        self.count += 1
        torch.save({**self.workload.plain(), "rng": torch.get_rng_state()}, self.folder / f"{self.count:03d}.pt")


class Torch(WithSaver):
    """``torch.save`` of model, optimizer and random state."""

    saver = PlainSave
    is_durable = False


def _framework(module: str) -> Callable[[str, Size], Loop]:
    """The loop of a framework, which is imported when it is made: that takes seconds."""

    def make(folder: str, size: Size) -> Loop:
        made: Loop = import_module(module).FrameworkLoop(folder, size)
        return made

    return make


LOOPS: dict[str, Callable[[str, Size], Loop]] = {
    "none": Loop,
    "ckptstore_overlapped": Ours,
    "ckptstore_async": OursAsync,
    "dcp": Dcp,
    "dcp_overlapped": DcpStaged,
    "torch": Torch,
    "lightning": _framework("benchmarks.lightningloop"),
    "huggingface": _framework("benchmarks.huggingfaceloop"),
}
"""By name; made of a folder that is not yet there and the size of the model."""
_NEEDS = {"lightning": ("lightning",), "huggingface": ("transformers", "accelerate")}


def installed(names: tuple[str, ...]) -> tuple[str, ...]:
    """Those of ``names`` whose packages are there."""
    return tuple(name for name in names if all(find_spec(package) for package in _NEEDS.get(name, ())))
