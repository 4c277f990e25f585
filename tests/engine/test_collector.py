"""Pausing the cycle collector leaves it as it was."""

from __future__ import annotations

import gc
import os
import threading

import pytest

from ckptstore.engine.collector import collector_paused


def test_pauses_and_resumes() -> None:
    """Off inside, on again afterwards, also after an error."""

    def fails() -> None:
        with collector_paused():
            assert not gc.isenabled()
            raise ValueError("inside")

    assert gc.isenabled()
    with pytest.raises(ValueError, match="inside"):
        fails()
    assert gc.isenabled()


def test_leaves_a_disabled_collector_off() -> None:
    """Who switched it off wants it off."""
    gc.disable()
    try:
        with collector_paused():
            assert not gc.isenabled()
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_other_threads_leave_it_alone() -> None:
    """A training loop that turns the collector off while a save is planned behind it finds it off."""
    seen = []

    def behind() -> None:
        with collector_paused():
            seen.append(gc.isenabled())

    thread = threading.Thread(target=behind)
    thread.start()
    thread.join()
    assert seen == [True]


def test_a_child_forked_meanwhile_collects() -> None:
    """Nobody would turn it on again: the thread that paused it is not in the child."""
    codes = []

    def fork() -> None:
        pid = os.fork()
        if pid == 0:
            os._exit(0 if gc.isenabled() else 7)
        codes.append(os.waitpid(pid, 0)[1])

    with collector_paused():
        thread = threading.Thread(target=fork)
        thread.start()
        thread.join()
        assert not gc.isenabled()
    assert codes == [0]
