"""The pool of buffers across forks and where memory lacks."""

from __future__ import annotations

import mmap
import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ckptstore.engine import buffers
from ckptstore.engine.buffers import BufferPool
from ckptstore.format.tensorfile import BLOCK_BYTES
from ckptstore.state import tensors
from ckptstore.state.capture import capture


def in_child(action: Callable[[], None]) -> int:
    """Exit code of a forked child that does ``action``; one that hangs is killed."""
    pid = os.fork()
    if pid == 0:
        signal.alarm(30)
        try:
            action()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_forked_child_writes_into_memory_of_its_own() -> None:
    """What a child does with a store leaves alone the blocks that its parent is saving."""
    pool = BufferPool(2 * BLOCK_BYTES)
    with pool.lease(2) as views:
        views[0][:4], views[1][:4] = b"mine", b"mine"

    def overwrite() -> None:
        with pool.lease(2) as views:
            assert bytes(views[0][:4]) == bytes(views[1][:4]) == bytes(4)
            views[0][:4], views[1][:4] = b"evil", b"evil"

    assert in_child(overwrite) == 0
    with pool.lease(2) as views:
        assert bytes(views[0][:4]) == bytes(views[1][:4]) == b"mine"


def test_a_child_forked_during_a_lease_has_all_buffers() -> None:
    """Leases of threads that the child doesn't have are none of its own."""
    pool = BufferPool(2 * BLOCK_BYTES)

    def lease_all() -> None:
        with pool.lease(2):
            pass

    with pool.lease(2):
        assert in_child(lease_all) == 0


def test_a_child_forked_while_a_tensor_is_copied_can_copy() -> None:
    """The lock that another thread of the parent holds at the fork is free in the child."""
    [source] = capture(torch.ones(4, 4).t()[1:]).sources
    out = memoryview(bytearray(source.nbytes))
    with tensors._LOCK:
        assert in_child(lambda: source.read_into(0, out)) == 0


def test_a_buffer_that_cant_be_had_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """After memory lacked for a while, leases don't wait for buffers that never came to be."""
    pool = BufferPool(2 * BLOCK_BYTES)
    refused = []

    class Full:
        MAP_PRIVATE, MAP_ANONYMOUS = mmap.MAP_PRIVATE, mmap.MAP_ANONYMOUS

        @staticmethod
        def mmap(*args: Any, **flags: Any) -> mmap.mmap:
            refused.append(args)
            raise OSError(12, "Cannot allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr(buffers, "mmap", Full)
        for _ in range(3):
            with pytest.raises(OSError, match="allocate"), pool.lease():
                pass
    assert len(refused) == 3
    assert pool._unallocated == 2
    with pool.lease(2):
        pass
