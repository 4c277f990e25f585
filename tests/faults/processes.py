"""Run operations in a process of their own and break them at a chosen system call."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import ckptstore

from . import worker

CHANGING = (
    "openat mkdir mkdirat write pwrite64 pwritev pwritev2 fsync fdatasync close link linkat unlink unlinkat rmdir "
    "ftruncate fallocate rename renameat renameat2"
).split()
"""System calls that change what lies on the disk, or open and close what does."""

LOOKING = ["getdents64", "newfstatat", "fstat", "read"]
"""System calls whose wrong answer could be taken for "there is nothing"."""

_CALL = re.compile(r"^(?:\d+ +)?(\w+)\(")


class Point(NamedTuple):
    """One system call of an operation: the ``nth`` of its kind since the trace began."""

    call: str
    nth: int


@dataclass(frozen=True)
class Fault:
    """What happens at a point: "signal=KILL" before the call, "signal=SEGV" after it, "error=EIO" in its place."""

    point: Point
    effect: str
    sticky: bool = False

    @property
    def expression(self) -> str:
        return f"inject={self.point.call}:{self.effect}:when={self.point.nth}{'+' if self.sticky else ''}"

    def __str__(self) -> str:
        return self.expression


@dataclass(frozen=True)
class Result:
    """How a child ended: its exit status (negative: the signal), what it told, and the trace of its calls."""

    status: int
    messages: list[Any]
    trace: list[str]

    def told(self, word: str) -> Any:
        """What it told under ``word``, or None."""
        return next((message[word] for message in self.messages if word in message), None)


class Worker:
    """A running ``worker.py``."""

    def __init__(self, scratch: Path) -> None:
        self._log = scratch / "trace"
        project = Path(ckptstore.__file__).parents[1]
        # Nothing of the machine's or of Python's own may change the number of system calls.
        fixed = {"PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1", "OPENBLAS_NUM_THREADS": "1"}
        environment = {**os.environ, **fixed, "PYTHONPATH": str(project)}
        self._process = subprocess.Popen(
            [sys.executable, worker.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            cwd=scratch,
            text=True,
        )

    def close(self) -> None:
        with self._process as process:
            assert process.stdin is not None
            process.stdin.close()

    def run(self, path: Path, operation: str, step: int, *, trace: list[str] | None = None, **options: Any) -> Result:
        """Perform one order; ``trace`` is what strace is told besides the process."""
        order = {"path": str(path), "operation": operation, "step": step, **_PLAIN, **options}
        pid = int(self._ask(order))
        with self._traced(pid, trace):
            answer = json.loads(self._ask("go"))
        lines = self._log.read_text().splitlines() if trace is not None else []
        return Result(answer["status"], answer["messages"], lines)

    def points(self, path: Path, operation: str, step: int, calls: list[str], **options: Any) -> list[Point]:
        """Every call of one undisturbed run, between its two markers."""
        result = self.run(path, operation, step, trace=["-e", _filter([*CHANGING, *calls])], **options)
        assert result.status == 0, result
        assert result.told("error") is None, result
        return _between_markers(result.trace, calls)

    def broken(self, path: Path, operation: str, step: int, fault: Fault, **options: Any) -> Result:
        """Perform one order with ``fault`` in it."""
        trace = ["-y", "-e", f"trace={fault.point.call}", "-e", fault.expression]
        return self.run(path, operation, step, trace=trace, **options)

    def _ask(self, message: Any) -> str:
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(message) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        assert line, "the worker is gone"
        return line

    @contextmanager
    def _traced(self, pid: int, options: list[str] | None) -> Iterator[None]:
        if options is None:
            yield
            return
        command = ["strace", "-f", "-o", str(self._log), *options, "-p", str(pid)]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as strace:
            assert strace.stderr is not None
            # The child waits until strace says that it is attached.
            said = strace.stderr.readline()
            assert "attached" in said, said
            yield
            strace.communicate()


_PLAIN = {
    "threads": 1,
    "large": False,
    "again": False,
    "log": False,
    "dies_at": 0,
    "short_writes": False,
    "drop_fsyncs": None,
    "direct": True,
    "dies_after_s": 0,
}


def _filter(calls: list[str]) -> str:
    # With the question mark, strace passes over calls that this kind of processor doesn't have.
    return "trace=" + ",".join(f"?{call}" for call in dict.fromkeys(calls))


def _between_markers(trace: list[str], calls: list[str]) -> list[Point]:
    seen: Counter[str] = Counter()
    inside, points = False, []
    for line in trace:
        match = _CALL.match(line)
        if match is None:
            continue
        seen[match[1]] += 1
        if worker.BEGIN in line or worker.END in line:
            inside = worker.BEGIN in line
        elif inside and match[1] in calls:
            points.append(Point(match[1], seen[match[1]]))
    return points


def missing_strace(scratch: Path) -> str | None:
    """Why system calls can't be broken here, or None where they can."""
    if shutil.which("strace") is None:
        return "strace is missing: apt-get install strace"
    tried = subprocess.run(["strace", "-o", str(scratch / "probe"), "true"], capture_output=True, text=True)
    return f"strace may not trace here: {tried.stderr[:200]}" if tried.returncode else None
