"""Threads, turnstile and buffers: order, errors, bounds."""

from __future__ import annotations

import threading

import pytest

from ckptstore.engine.buffers import BufferPool, copy_bytes
from ckptstore.engine.workers import Turnstile, run
from ckptstore.format.tensorfile import BLOCK_BYTES


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_task_runs_once(threads: int) -> None:
    """Each task is done exactly once, by however many threads."""
    done: list[int] = []
    run(range(100), done.append, threads=threads)
    assert sorted(done) == list(range(100))


def test_one_thread_is_the_callers() -> None:
    """With one thread all work happens in the calling one."""
    seen = set()
    run(range(3), lambda _: seen.add(threading.get_ident()), threads=1)
    assert seen == {threading.get_ident()}


@pytest.mark.parametrize("threads", [1, 3])
def test_first_error_stops_all(threads: int) -> None:
    """The first error is raised, after all threads have ended, and no further tasks are begun."""
    begun = []

    def work(number: int) -> None:
        begun.append(number)
        if number == 5:
            raise ValueError("five")

    with pytest.raises(ValueError, match="five"):
        run(range(10_000), work, threads=threads)
    assert len(begun) < 10_000
    assert not [t for t in threading.enumerate() if t.name.startswith("ckptstore-")]


def test_an_error_in_the_task_list_is_raised() -> None:
    """The list of tasks may do I/O itself, and fail."""

    def tasks() -> object:
        yield 1
        raise OSError("listing")

    with pytest.raises(OSError, match="listing"):
        run(tasks(), lambda _: None, threads=2)  # type: ignore[arg-type]


def test_turnstile_lets_pass_in_order() -> None:
    """Callers pass in the order of their numbers, whatever order they come in."""
    turnstile, passed = Turnstile(), []
    threads = [
        threading.Thread(target=turnstile.pass_in_turn, args=(n, lambda n=n: passed.append(n))) for n in (3, 1, 2, 0)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert passed == [0, 1, 2, 3]


def test_broken_turnstile_sends_waiters_home() -> None:
    """Who waits for somebody that failed gets the same error instead of waiting for ever."""
    turnstile, caught = Turnstile(), []

    def wait() -> None:
        try:
            turnstile.pass_in_turn(1, lambda: None)
        except ValueError as error:
            caught.append(str(error))

    thread = threading.Thread(target=wait)
    thread.start()
    turnstile.break_off(ValueError("zero failed"))
    thread.join(timeout=10)
    assert caught == ["zero failed"]


def test_pool_is_bounded_and_reused() -> None:
    """No more buffers than allowed exist, each is aligned and one block long, and they are used again."""
    pool = BufferPool(3 * BLOCK_BYTES)
    with pool.lease(2) as first, pool.lease(1) as second:
        assert [len(view) for view in first + second] == [BLOCK_BYTES] * 3
        waiter_got = threading.Event()

        def waiter() -> None:
            with pool.lease(1):
                waiter_got.set()

        thread = threading.Thread(target=waiter)
        thread.start()
        assert not waiter_got.wait(0.05)
    thread.join(timeout=10)
    assert waiter_got.is_set()


@pytest.mark.parametrize("size", [0, 1, 1000, 70_000])
def test_copy_bytes(size: int) -> None:
    """Small and large copies give the same bytes."""
    source, target = bytes(range(256)) * (size // 256 + 1), bytearray(size)
    copy_bytes(memoryview(target), memoryview(source)[:size])
    assert target == source[:size]
