"""One event loop for all buckets of this process, which works until the very end of the process."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None


class _Threads(ThreadPoolExecutor):
    """A daemon thread for each call.

    Python's own executors take nothing more as soon as the main thread has ended, while a save in the background still
    needs them: host names are looked up and credentials are read there.
    """

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        future: Future[T] = Future()

        def act() -> None:
            try:
                future.set_result(fn(*args, **kwargs))
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=act, name="s3-ckptstore-call", daemon=True).start()
        return future


def event_loop() -> asyncio.AbstractEventLoop:
    """The loop, which runs in a thread of its own; a fork gets another one."""
    global _loop
    with _lock:
        if _loop is None:
            _loop = asyncio.new_event_loop()
            _loop.set_default_executor(_Threads())
            threading.Thread(target=_run, args=(_loop,), name="s3-ckptstore", daemon=True).start()
        return _loop


def _run(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    loop.run_forever()


def _forget(*_: Any) -> None:
    global _loop, _lock
    _loop, _lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget)
