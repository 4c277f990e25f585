"""Scripts in processes of their own, which end as any do; but forked from one that has imported what takes seconds."""

from __future__ import annotations

import atexit
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import ckptstore

ROOT = Path(ckptstore.__file__).parents[1]
TIMEOUT_S = 120.0
# The script runs in the module of this one, and the interpreter ends with it.
MAIN = """
import sys
from tests.background import scripts
job = scripts.serve(sys.argv[1])
if job is not None:
    sys.argv[1:] = job["arguments"]
    exec(job["code"])
"""
WARM = """
import torch, torch.utils.data, ckptstore, ckptstore.engine.loader, ckptstore.state.capture, ckptstore.state.decode
model = torch.nn.Linear(2, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
ckptstore.open("memory://warm")
import tests.frozen
"""
"""Imports also what is imported at the first use, and begins no thread."""


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a script to its end, with ``arguments`` in ``sys.argv``; one that hangs fails."""
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as asking,
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as errors,
    ):
        asking.connect(_server())
        job = json.dumps({"code": code, "arguments": arguments}).encode()
        socket.send_fds(asking, [job], [out.fileno(), errors.fileno()])
        child = int(asking.recv(100))
        if not select.select([asking], [], [], TIMEOUT_S)[0]:
            os.kill(child, signal.SIGKILL)
            raise subprocess.TimeoutExpired(code, TIMEOUT_S)
        code_found = int(asking.recv(100))
        texts = [_text(out), _text(errors)]
    return subprocess.CompletedProcess([code, *arguments], code_found, *texts)


def _text(file: Any) -> str:
    file.seek(0)
    return str(file.read().decode())


@functools.cache
def _server() -> str:
    """Where the process listens that scripts are forked from."""
    place = tempfile.mkdtemp(prefix="scripts-")
    address = os.path.join(place, "socket")
    server = subprocess.Popen(
        [sys.executable, "-c", MAIN, address],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert server.stdout is not None
    assert server.stdout.readline() == b"ready\n"

    def end() -> None:
        server.communicate()
        os.unlink(address)
        os.rmdir(place)

    atexit.register(end)
    return address


def serve(address: str) -> dict[str, Any] | None:
    """Fork for whoever asks, until nobody can any more; in the fork, what it is to do."""
    exec(WARM, {})
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
        listening.bind(address)
        listening.listen()
        print("ready", flush=True)
        while True:
            if sys.stdin.fileno() in select.select([listening, sys.stdin], [], [])[0]:
                return None
            asking, _ = listening.accept()
            job, files, *_ = socket.recv_fds(asking, 1 << 20, 2)
            child = os.fork()
            if child == 0:
                break
            asking.send(str(child).encode())
            for file in files:
                os.close(file)
            with asking:
                asking.send(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])).encode())
    asking.close()
    for file, number in zip(files, (1, 2), strict=True):
        os.dup2(file, number)
        os.close(file)
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    return dict(json.loads(job))
