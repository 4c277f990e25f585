"""The process that the fault tests break: it saves, deletes, reports, and dies when and how it is told.

Run as a script it reads one order a line and forks once for each, so that Python and NumPy start only once and every
child makes the same system calls in the same order. It needs no torch.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import json
import os
import random
import resource
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn
from unittest import mock

import ckptstore
from ckptstore.engine.catalogue import Checkpoint
from ckptstore.engine.facts import Facts
from ckptstore.engine.saver import Job
from ckptstore.store import Store

BLOCK_BYTES = 16 << 20
BEGIN, END = "/ckptstore-marker-begin", "/ckptstore-marker-end"
"""Names that don't exist; removing them marks in a trace of system calls where the operation begins and ends."""

HANGS_AFTER_S = 30.0
"""How long a child may take before it is ended."""

_PR_SET_PTRACER, _ANY_PROCESS = 0x59616D61, -1

Tensors = Mapping[str, bytes]
Order = dict[str, Any]


@dataclass(frozen=True)
class Spec:
    name: str
    shape: tuple[int, ...]
    dtype: str = "F32"
    logical: str | None = None


@dataclass(frozen=True)
class Source:
    spec: Spec
    data: memoryview
    frozen: bool = False
    fickle: bool = False

    def read_into(self, offset: int, out: memoryview) -> None:
        out[:] = self.data[offset : offset + len(out)]

    def view(self, offset: int, length: int) -> memoryview:
        return self.data[offset : offset + length]

    near = True
    region = None

    def moved(self) -> bool:
        return False

    def rebase(self) -> None:
        pass

    def release(self) -> None:
        pass


@dataclass(frozen=True)
class State:
    """What ``capture`` would give."""

    sources: Sequence[Source]
    tree: Any
    parameters: int = 0


def tensors(step: int, *, large: bool = False) -> Tensors:
    """Three components, each a data file of its own: 100 KB, 40 bytes, and 20 KB or a little over one block."""
    sizes = {"a/x": 100_000, "b/y": 40, "c/z": BLOCK_BYTES + 5000 if large else 20_000}
    return {name: random.Random(f"{name} {step}").randbytes(size) for name, size in sizes.items()}


def state(content: Tensors, frozen: Sequence[str] = ()) -> State:
    tree: dict[str, Any] = {}
    for name in content:
        component, _, rest = name.partition("/")
        tree.setdefault(component, {})[rest] = {"$": "tensor", "name": name}
    sources = [
        Source(Spec(name, (len(data) // 4,)), memoryview(data), name in frozen) for name, data in content.items()
    ]
    return State(sources, tree)


def save(store: Store, step: int, *, large: bool = False, durable: str = "primary") -> Checkpoint:
    """Save ``tensors(step)`` past ``capture``, which would need torch."""
    facts = Facts(step, None, {}, {}, [f"step {step}"])
    return store._dispatcher.save(Job(state(tensors(step, large=large)), facts, durable))


FROZEN = "a/x"
"""The tensor that never changes in states that borrow."""


def tuned(step: int, *, large: bool = False) -> Tensors:
    """``tensors(step)``, of which one is as in every other step."""
    return {**tensors(step, large=large), FROZEN: tensors(0)[FROZEN]}


def save_tuned(store: Store, step: int, *, large: bool = False) -> Checkpoint:
    """Save ``tuned(step)``: what never changes is borrowed, where there is somebody to borrow from."""
    content = state(tuned(step, large=large), [FROZEN])
    return store._dispatcher.save(Job(content, Facts(step, None, {}, {}, [f"step {step}"])))


# --- what an order can ask for ---


def _save(store: Store, order: Order, tell: Callable[[Any], None]) -> None:
    tell({"ack": save(store, order["step"], large=order["large"]).id})


def _save_tuned(store: Store, order: Order, tell: Callable[[Any], None]) -> None:
    saved = save_tuned(store, order["step"], large=order["large"])
    tell({"ack": saved.id, "borrowed": bool(saved.record.lenders)})


def _delete(store: Store, order: Order, tell: Callable[[Any], None]) -> None:
    # It is in the trash already where a first try came that far.
    if any(checkpoint.step == order["step"] for checkpoint in store.checkpoints()):
        tell({"buried": store.delete(f"step:{order['step']}").id})
    tell({"pruned": list(store.prune(grace_s=0).reclaimed)})


_OPERATIONS = {"save": _save, "save tuned": _save_tuned, "delete": _delete}


def perform(order: Order, tell: Callable[[Any], None]) -> None:
    """Do ``order`` and ``tell`` how it ended; with ``again``, a failed one is repeated on the same open store."""
    if order["log"]:
        _perform_recorded(order, tell)
        return
    with _shim(order) as injected, ckptstore.open(order["path"], threads=order["threads"]) as store:
        operation = _OPERATIONS[order["operation"]]
        _mark(BEGIN)
        try:
            operation(store, order, tell)
        except BaseException as error:
            tell({"error": _describe(error)})
            if order["again"]:
                try:
                    operation(store, order, lambda message: tell({"again": message}))
                except BaseException as second:
                    tell({"again": {"error": _describe(second)}})
        _mark(END)
        tell({"injected": len(injected)})


def _perform_recorded(order: Order, tell: Callable[[Any], None]) -> None:
    """Do ``order`` and tell the log of its calls; it ends abruptly after ``dies_at`` of them, where that isn't 0."""
    # Beside this file; as a script it belongs to no package.
    from recorder import Recorder

    def die(log: list[Any]) -> NoReturn:
        tell({"log": log})
        os._exit(0)

    with Recorder(order["path"], dies_at=order["dies_at"], die=die) as recorder:
        with ckptstore.open(order["path"], threads=1) as store:
            _OPERATIONS[order["operation"]](store, order, lambda message: recorder.note(message) or tell(message))
        die(recorder.log)


def _mark(path: str) -> None:
    try:
        os.rmdir(path)
    except OSError:
        return


def _describe(error: BaseException) -> dict[str, Any]:
    causes = []
    cause = error.__cause__
    while cause is not None:
        causes.append(type(cause).__name__)
        cause = cause.__cause__
    kinds = [kind.__name__ for kind in type(error).__mro__]
    fields = {name: getattr(error, name, None) for name in ("id", "key")}
    return {"kinds": kinds, "causes": causes, "message": str(error), **fields}


# --- faults made inside the process ---


@contextmanager
def _shim(order: Order) -> Iterator[list[int]]:
    """The fault that ``order`` asks for; the list is what it did."""
    if order["short_writes"]:
        with short_writes() as done:
            yield done
    elif order["drop_fsyncs"] is not None:
        with dropped_fsyncs(order["drop_fsyncs"], direct=order["direct"]) as done:
            yield done
    else:
        yield []


@contextmanager
def short_writes() -> Iterator[list[int]]:
    """Every write stops early: after a page where direct I/O may be on, else after a third."""
    done: list[int] = []

    def shortened(real: Callable[..., int], limit: Callable[[int], int]) -> Callable[..., int]:
        def write(fd: int, data: memoryview, *offset: int) -> int:
            length = len(data)
            count = real(fd, memoryview(data)[: limit(length)], *offset)
            if count < length:
                done.append(count)
            return count

        return write

    with (
        mock.patch("os.write", shortened(os.write, lambda length: -(-length // 3))),
        mock.patch("os.pwrite", shortened(os.pwrite, lambda length: 4096)),
    ):
        yield done


@contextmanager
def dropped_fsyncs(numbers: Sequence[int], *, direct: bool) -> Iterator[list[int]]:
    """Leave out the calls of ``os.fsync`` with these numbers (from 0): a library that forgot them."""
    real, count, done = os.fsync, itertools.count(), list[int]()

    def fsync(fd: int) -> None:
        number = next(count)
        if number in numbers:
            done.append(number)
        else:
            real(fd)

    with ExitStack() as patches:
        patches.enter_context(mock.patch("os.fsync", fsync))
        if not direct:
            patches.enter_context(mock.patch("ckptstore.storage.posix.set_direct", lambda fd, on: not on))
        yield done


# --- the server ---


def serve() -> None:
    """One fork for each line of standard input; see ``processes.Worker`` for the other end."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _warm_up()
    for line in sys.stdin:
        _answer(json.loads(line))


def _warm_up() -> None:
    """Import what is imported on first use, so that no child opens modules in the middle of its operation."""
    with ckptstore.open("memory://warm-up", threads=1) as store:
        save(store, 1)
        store.delete("latest")
        store.prune(grace_s=0)


def _answer(order: Order) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        ours.close()
        _child(order, theirs)
    theirs.close()
    # Attached earlier, strace would count calls that come before the order.
    assert ours.recv(16) == b"ready"
    print(pid, flush=True)
    sys.stdin.readline()
    ours.send(b"go")
    messages = []
    while message := ours.recv(1 << 20):
        messages.append(json.loads(message))
    ours.close()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    print(json.dumps({"status": status, "messages": messages}), flush=True)


def _child(order: Order, channel: socket.socket) -> None:
    # Objects freed at other times in other runs would close files there.
    gc.disable()
    ctypes.CDLL(None).prctl(_PR_SET_PTRACER, _ANY_PROCESS, 0, 0, 0)
    channel.send(b"ready")
    channel.recv(16)
    # SIGALRM's default action ends the process as abruptly as SIGKILL does. Nothing here may go on for ever.
    signal.setitimer(signal.ITIMER_REAL, order["dies_after_s"] or HANGS_AFTER_S)
    perform(order, lambda message: channel.send(json.dumps(message).encode()) and None)
    os._exit(0)


if __name__ == "__main__":
    serve()
