"""Tensors on a CUDA device on their way out: read by a stream of their own, through pinned memory.

No copy is made on the device. Training goes on meanwhile in its own stream; what was queued there when the save was
asked for comes first.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import cuda

from ckptstore.state.dtypes import CARRIERS


class DeviceReader:
    """Reads tensors of one device for one save. Made in the thread that trains, used in any."""

    def __init__(self, device: torch.device) -> None:
        self._ready = cuda.Event()  # type: ignore[no-untyped-call]
        self._ready.record(cuda.current_stream(device))
        self._stream = _side_stream(device)

    @contextmanager
    def queue(self) -> Iterator[None]:
        """What is asked of the device inside comes after what was queued when the save was asked for."""
        with cuda.stream(self._stream):
            self._stream.wait_event(self._ready)
            yield

    def read_into(self, tensor: torch.Tensor, offset: int, out: memoryview) -> None:
        """Copy bytes ``[offset, offset + len(out))`` of a contiguous tensor; only the calling thread waits."""
        # torch keeps pinned blocks that were let go of, and gives them out again.
        pinned = _pinned(len(out))
        with self.queue():
            pinned.copy_(flat_bytes(tensor)[offset : offset + len(out)], non_blocking=True)
            done = cuda.Event()  # type: ignore[no-untyped-call]
            done.record(self._stream)
        done.synchronize()
        np.copyto(np.frombuffer(out, np.uint8), pinned.numpy())


def flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a contiguous tensor as bytes."""
    return tensor.detach().view(CARRIERS[tensor.element_size()]).reshape(-1).view(torch.uint8)


_side_streams: dict[torch.device, cuda.Stream] = {}


def _side_stream(device: torch.device) -> cuda.Stream:
    """One stream a device, for all saves: a transfer engine does one copy at a time anyway."""
    if device not in _side_streams:
        _side_streams[device] = cuda.Stream(device)  # type: ignore[no-untyped-call]
    return _side_streams[device]


def _pinned(count: int) -> torch.Tensor:
    return torch.empty(count, dtype=torch.uint8, pin_memory=True)
