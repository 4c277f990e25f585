"""Saves that are held up, broken or counted at a chosen place, and states to be saved."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn

from ckptstore.engine import buffers
from ckptstore.engine.buffers import StagingArea
from ckptstore.format import tensorfile
from ckptstore.state import staging

HANG_S = 30.0
"""Longer than anything here takes: whoever waits so long hangs."""

BLOCK = 64 << 10


@contextmanager
def small_blocks() -> Iterator[None]:
    """Blocks and buffers of 64 KiB, and tensors of 1 KiB read in place: a small state is like a large one."""
    with (
        mock.patch.object(tensorfile, "BLOCK_BYTES", BLOCK),
        mock.patch.object(buffers, "BLOCK_BYTES", BLOCK),
        mock.patch.object(staging, "IN_PLACE_BYTES", 1 << 10),
    ):
        yield


class Gate:
    """Calls of ``owner.name`` wait until it is opened. Used as a context manager, which opens it at the end.

    Attributes:
        reached: set when a call waits.
    """

    def __init__(self, owner: Any, name: str, *, only: Callable[..., bool] = lambda *_, **__: True) -> None:
        """``only``: for which calls, by their arguments."""
        self.reached, self._open = threading.Event(), threading.Event()
        self._only, self._real = only, getattr(owner, name)
        self._patch = mock.patch.object(owner, name, lambda *args, **options: self._call(*args, **options))

    def __enter__(self) -> Gate:
        self._patch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.open()
        self._patch.stop()

    def open(self) -> None:
        self._open.set()

    def wait(self) -> None:
        """Until a call has come."""
        assert self.reached.wait(HANG_S), "nobody came"

    def _call(self, *args: Any, **options: Any) -> Any:
        if self._only(*args, **options):
            self.reached.set()
            assert self._open.wait(HANG_S), "the gate was never opened"
        return self._real(*args, **options)


class Fault:
    """A call of ``owner.name`` raises, those for which ``only`` is true. ``fired`` counts them."""

    def __init__(
        self, owner: Any, name: str, error: BaseException, *, only: Callable[..., bool] = lambda *_, **__: True
    ) -> None:
        self.fired, self.error = 0, error
        self._only, self._real = only, getattr(owner, name)
        self._patch = mock.patch.object(owner, name, lambda *args, **options: self._call(*args, **options))

    def __enter__(self) -> Fault:
        self._patch.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._patch.stop()
        assert kind is not None or self.fired, "the fault did not fire"

    def _call(self, *args: Any, **options: Any) -> Any:
        if self._only(*args, **options):
            self.fired += 1
            raise self.error
        return self._real(*args, **options)


class Counted:
    """Buffers of the staging area: the most that were in use at a time, and all that ever were.

    Attributes:
        when_full: called when somebody finds none left.
    """

    def __init__(self) -> None:
        self.most = self.taken = 0
        self.seen: set[int] = set()
        self.when_full: Callable[[], None] = lambda: None
        self._take, self._give = StagingArea.try_take, StagingArea.give_back

    @contextmanager
    def counting(self) -> Iterator[Counted]:
        in_use: set[int] = set()

        def take(area: StagingArea) -> buffers.Buffer | None:
            with area.changed:
                buffer = self._take(area)
                if buffer is None:
                    self.when_full()
                else:
                    in_use.add(id(buffer))
                    self.seen.add(id(buffer))
                    self.taken, self.most = self.taken + 1, max(self.most, len(in_use))
            return buffer

        def give(area: StagingArea, buffer: buffers.Buffer) -> None:
            with area.changed:
                in_use.remove(id(buffer))
                self._give(area, buffer)

        with mock.patch.object(StagingArea, "try_take", take), mock.patch.object(StagingArea, "give_back", give):
            yield self
        assert not in_use, "a buffer was never given back"


class Training:
    """A small run: trained and frozen layers, an optimizer, and what only async saves copy."""

    def __init__(self, seed: int = 0, *, width: int = 128) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.Linear(width, width))
        self.base = nn.Linear(width, width).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.average = torch.randn(width, width)
        self.array = np.random.default_rng(seed).random((width, width))
        self.history = [seed, {"loss": 1.5}]
        self.step()

    @property
    def state(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "base": self.base,
            "optimizer": self.optimizer,
            "turned": self.average.t(),
            "part": self.average[::2, 1:],
            "average": self.average,
            "array": self.array,
            "history": self.history,
        }

    def step(self) -> None:
        """One step of the optimizer, whose gradients need no forward pass."""
        for parameter in self.model.parameters():
            parameter.grad = torch.randn_like(parameter)
        self.optimizer.step()

    def change_everything(self) -> None:
        """By all means, also such as neither a hook nor a version counter sees."""
        for parameter in [*self.model.parameters(), *self.base.parameters()]:
            parameter.data.numpy()[:] += 1
        for buffer in self.model.buffers():
            buffer.add_(1)
        for values in self.optimizer.state.values():
            for value in values.values():
                value.add_(1)
        self.optimizer.param_groups[0]["lr"] = 0.5
        self.average.data.numpy()[:] = 0
        self.array[:] = 0
        self.history[1].clear()  # type: ignore[attr-defined]
        self.history.append("later")

    def snapshot(self) -> dict[str, Any]:
        """What a load as plain data must give."""
        return frozen(
            {
                "model": self.model.state_dict(),
                "base": self.base.state_dict(),
                "optimizer": dict(enumerate(self.optimizer.state.values())),
                "lr": [group["lr"] for group in self.optimizer.param_groups],
                **{name: self.state[name] for name in ("turned", "part", "average", "array", "history")},
            }
        )


def plain(loaded: dict[str, Any]) -> dict[str, Any]:
    """A state of ``Training`` that was loaded, as ``snapshot`` gives it."""
    optimizer = loaded["optimizer"]
    names = [name for group in optimizer["groups"] for name in group["params"]]
    return frozen(
        {
            **{name: value for name, value in loaded.items() if name != "optimizer"},
            "optimizer": {number: optimizer["state"][name] for number, name in enumerate(names)},
            "lr": [group["lr"] for group in optimizer["groups"]],
        }
    )


def frozen(value: Any) -> Any:
    """The same with bytes in place of tensors and arrays, so that ``==`` compares bit by bit."""
    if isinstance(value, dict):
        return {str(key): frozen(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [frozen(inner) for inner in value]
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.detach().contiguous().numpy().tobytes()
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, value.tobytes()
    return value
