"""Readers of foreign checkpoints, as this process sees them: confined processes that it trusts in nothing."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

from ckptstore import errors
from ckptstore.format.jsontext import parse_json
from ckptstore.tools.importing import channel

_START_S = 300.0
_MEMORY = 1 << 30
_READ_BYTES_PER_S = 20 << 20
"""The slowest storage that one may wait for."""

_CODE = (
    "import json,sys;given=json.loads(sys.argv[1]);sys.path[:]=given['path'];"
    "from ckptstore.tools.importing.zygote import main;main(given['socket'])"
)
_KEPT_VARIABLES = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "LANG", "LC_ALL")
_ERRORS: dict[str, type[errors.CheckpointError]] = {
    "format": errors.FormatError,
    "integrity": errors.IntegrityError,
    "storage": errors.StorageError,
}


class Sandbox:
    """Makes readers; use as a context manager. The first takes the second that PyTorch needs to load."""

    def __init__(self, *, memory_bytes: int = _MEMORY, cpu_s: int = 120, patience_s: float = 120.0) -> None:
        """What a reader may take, besides what the size of its files asks for.

        Args:
            memory_bytes: of memory.
            cpu_s: of work.
            patience_s: without an answer.
        """
        self.memory_bytes, self.cpu_s, self.patience_s = memory_bytes, cpu_s, patience_s
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process that readers come from."""
        if self._process is not None and self._control is not None:
            self._control.close()
            self._process.kill()
            self._process.wait()
            self._process = self._control = None

    def reader(self, name: str) -> Reader:
        """A process that reads one checkpoint, called ``name`` in errors.

        Raises:
            StorageError: no process can be started.
        """
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                pid = self._ask(b"F", [theirs.fileno()])
        except BaseException:
            ours.close()
            raise
        return Reader(self, ours, pid, name)

    def end(self, pid: int) -> int:
        """How a reader ended, as ``os.waitpid`` tells it; one that runs is killed."""
        if self._control is None:
            # It has seen its socket close, and nobody knows whose number that is by now.
            return 0
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        return self._ask(b"W" + pid.to_bytes(8, "little"), [])

    def _ask(self, message: bytes, descriptors: list[int]) -> int:
        with self._lock:
            control = self._control or self._start()
            try:
                socket.send_fds(control, [message], descriptors)
                answer = bytearray(8)
                channel.receive_into(control, memoryview(answer))
                return int.from_bytes(answer, "little")
            except (OSError, channel.GoneError) as error:
                self.close()
                raise errors.StorageError("the process that reads foreign files has ended") from error
            except BaseException:
                # An answer that nobody takes would be taken for the next one.
                self.close()
                raise

    def _start(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        path = [str(Path(__file__).parents[3]), *(os.path.abspath(one) for one in sys.path if one)]
        given = json.dumps({"path": path, "socket": theirs.fileno()})
        with theirs:
            self._process = subprocess.Popen(  # noqa: S603
                [sys.executable, "-I", "-B", "-c", _CODE, given],
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                cwd="/",
                # Ctrl-C is for this process, which ends the others.
                start_new_session=True,
            )
        self._control = ours
        ours.settimeout(_START_S)
        try:
            channel.receive_into(ours, memoryview(bytearray(1)))
        except (channel.GoneError, TimeoutError) as error:
            self.close()
            raise errors.StorageError("the process that reads foreign files doesn't start") from error
        return ours


def _environment() -> dict[str, str]:
    """Variables for a process that nobody shall learn a secret from."""
    kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    return {**kept, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


class Reader:
    """One reader. ``close`` ends it."""

    def __init__(self, sandbox: Sandbox, sock: socket.socket, pid: int, name: str) -> None:
        self.pid = pid
        self._sandbox, self._sock, self._name = sandbox, sock, name
        self._cpu_s = 0
        self._lock = threading.Lock()
        self._failed: errors.CheckpointError | None = None
        self._open = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End it."""
        with self._lock:
            self._end()

    def _end(self) -> int:
        if not self._open:
            return 0
        self._open = False
        self._sock.close()
        return self._sandbox.end(self.pid)

    def open(self, job: Mapping[str, Any], *, size: int, files: int, pulse: Callable[[int], None]) -> Any:
        """Have it take a checkpoint apart; its answer, of which nothing is checked but that it is JSON.

        Args:
            job: what to read, see ``reader.py``.
            size: bytes of all its files, which its limits follow from.
            files: number of these.
            pulse: called with the number of bytes read so far.

        Raises:
            StateError, FormatError, IntegrityError: as it says, or it went beyond a limit, or crashed.
            StorageError: it was killed.
        """
        box = self._sandbox
        self._cpu_s = box.cpu_s + 20 * (size >> 30)
        limits = {"memory_bytes": box.memory_bytes + 2 * size, "cpu_s": self._cpu_s, "files": files}
        patience_s = box.patience_s + size / _READ_BYTES_PER_S
        with self._lock, self._explained(patience_s):
            channel.send_json(self._sock, {**job, "size": size, "limits": limits})
            while True:
                kind, length = channel.receive_head(self._sock)
                payload = channel.receive_payload(self._sock, kind, length)
                if kind == channel.PULSE:
                    pulse(int.from_bytes(payload, "little"))
                elif kind == channel.JSON:
                    return parse_json(payload, self._name, limit=channel.JSON_LIMIT)
                else:
                    self._raise(payload)

    def read(self, index: int, offset: int, out: memoryview) -> None:
        """Fill ``out`` with bytes of a tensor's image; any thread.

        Raises:
            StateError, FormatError, IntegrityError, StorageError: as ``open``.
        """
        with self._lock:
            if self._failed is not None:
                # Whoever was first has been told.
                raise self._failed
            with self._explained(self._sandbox.patience_s):
                channel.send(self._sock, channel.READ, channel.REQUEST.pack(index, offset, len(out)))
                kind, length = channel.receive_head(self._sock)
                if kind == channel.BYTES and length == len(out):
                    channel.receive_into(self._sock, out)
                else:
                    self._raise(channel.receive_payload(self._sock, kind, length))

    def _explained(self, patience_s: float) -> _Explained:
        if self._open:
            self._sock.settimeout(patience_s)
        return _Explained(self)

    def _raise(self, payload: bytes) -> NoReturn:
        fields = parse_json(payload, self._name, limit=1 << 20)
        code, message = str(fields.get("code")), str(fields.get("message"))
        if code == "memory":
            raise errors.FormatError(f"{self._name} needs more memory to be read than its size explains")
        if code == "state":
            path = fields.get("path")
            raise errors.StateError(message, path=None if path is None else str(path))
        key = fields.get("key")
        raise _ERRORS.get(code, errors.FormatError)(message, key=None if key is None else str(key))

    def broken(self, error: Exception) -> errors.CheckpointError:
        """What it means that the reader doesn't answer, or answers nonsense; it is ended."""
        if isinstance(error, errors.CheckpointError):
            self._failed = error
            self._end()
            return error
        status = self._end()
        if isinstance(error, TimeoutError):
            self._failed = errors.FormatError(f"{self._name} takes longer to read than its size explains: given up")
        else:
            self._failed = self._death(status)
        return self._failed

    def _death(self, status: int) -> errors.CheckpointError:
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        if number == signal.SIGXCPU:
            return errors.FormatError(f"{self._name} takes more than {self._cpu_s} s of work to read: it was given up")
        if number == signal.SIGKILL:
            return errors.StorageError(f"the process that reads {self._name} was killed, maybe for lack of memory")
        name = signal.Signals(number).name if number else f"exit code {os.WEXITSTATUS(status)}"
        return errors.FormatError(f"the process that reads {self._name} crashed ({name}): it is damaged or hostile")


class _Explained:
    """Turns what goes wrong between the processes into what it means."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, channel.GoneError | TimeoutError | OSError | errors.CheckpointError):
            told = self._reader.broken(error)
            if told is not error:
                raise told from error
