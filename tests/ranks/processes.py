"""Real ranks: processes that talk by gloo, forked from one that has imported all that takes time."""

from __future__ import annotations

import contextlib
import os
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from typing import Any

from tests.forked import CONTEXT, preload

preload("tests.ranks.preload")
TIMEOUT_S = 120
FAILED_S = 10


class Failure(Exception):
    """What a rank raised: kind, text and trace."""

    @property
    def kind(self) -> str:
        return str(self.args[0])

    @property
    def text(self) -> str:
        return str(self.args[1])


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _main(pipe: Any, rank: int, size: int, port: int, function: Callable[..., Any], args: Sequence[Any]) -> None:
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(size))
    try:
        distributed.init_process_group("gloo")
        result: Any = function(*args)
    except BaseException as error:
        result = Failure(type(error).__name__, str(error), traceback.format_exc())
    pipe.send(result)
    # Whoever waits lets all go at once: rank 0 keeps the messages of all.
    with contextlib.suppress(EOFError, ConnectionResetError):
        pipe.recv()
    os._exit(0)


class Ranks:
    """A group of ranks that run one function each."""

    def __init__(self, size: int, function: Callable[..., Any], *args: Any, each: Sequence[Any] | None = None) -> None:
        """``each``: one more argument for each rank."""
        self.size = size
        port = free_port()
        self.pipes, self.processes = [], []
        for rank in range(size):
            mine, theirs = CONTEXT.Pipe()
            own = (*args, each[rank]) if each is not None else args
            process = CONTEXT.Process(target=_main, args=(theirs, rank, size, port, function, own))
            process.start()
            theirs.close()
            self.pipes.append(mine)
            self.processes.append(process)

    def results(self, timeout_s: float = TIMEOUT_S) -> list[Any]:
        """What each gave, or the ``Failure`` of it; None of one that was killed."""
        found: dict[int, Any] = {}
        ends = time.monotonic() + timeout_s
        while len(found) < self.size and (left_s := ends - time.monotonic()) > 0:
            waiting = {pipe: rank for rank, pipe in enumerate(self.pipes) if rank not in found}
            for pipe in wait(list(waiting), left_s):
                try:
                    found[waiting[pipe]] = pipe.recv()
                except (EOFError, ConnectionResetError):
                    found[waiting[pipe]] = None
                if isinstance(found[waiting[pipe]], Failure):
                    # The others may wait for it in vain.
                    ends = min(ends, time.monotonic() + FAILED_S)
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            pipe.close()
            process.join(10 if len(found) == self.size else 0.1)
            process.kill()
        for failed in found.values():
            if isinstance(failed, Failure) and len(found) < self.size:
                raise failed
        assert len(found) == self.size, f"these ranks hang: {sorted(set(range(self.size)) - found.keys())}"
        return [found[rank] for rank in range(self.size)]


def run(size: int, function: Callable[..., Any], *args: Any, each: Sequence[Any] | None = None) -> list[Any]:
    """What ``function`` gives on each of ``size`` ranks; the first error of a rank is raised."""
    found = Ranks(size, function, *args, each=each).results()
    for result in found:
        if isinstance(result, Failure):
            raise result
    return found
