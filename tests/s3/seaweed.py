"""A real S3 server for one test process: SeaweedFS on loopback, its data in a temporary folder."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from botocore.config import Config
from botocore.session import get_session

READY_S = 60.0
ACCESS, SECRET = "ci-access", "ci-secret-7f3a9c"
READER, READER_SECRET = "ci-reader", "ci-reader-5b2e81"
"""May read and list, and nothing else."""
PUBLIC = "public"
"""How the names of buckets begin that anybody may read."""


def binary() -> str | None:
    """Where ``weed`` lies: beside this Python, or on the path."""
    beside = Path(sys.executable).parent / "weed"
    return str(beside) if beside.exists() else shutil.which("weed")


def free_ports(count: int) -> list[int]:
    """Free ports whose neighbours ten thousand above, which the server takes too, are free as well.

    All below those that the system gives to outgoing connections, which would come in between.
    """
    found: list[int] = []
    while len(found) < count:
        port = random.randrange(10_000, 22_000)
        with socket.socket() as one, socket.socket() as other, suppress(OSError):
            one.bind(("127.0.0.1", port))
            other.bind(("127.0.0.1", port + 10_000))
            found += [port] if port not in found else []
    return found


class Seaweed:
    """The server. ``kill`` and ``start`` may follow each other; the data stay."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "data").mkdir(parents=True)
        self._config()
        self._ports = free_ports(4)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._ports[3]}"

    @property
    def options(self) -> dict[str, Any]:
        """What s3fs needs to know of it."""
        return {
            "key": ACCESS,
            "secret": SECRET,
            "endpoint_url": self.endpoint,
            "client_kwargs": {"region_name": "us-east-1"},
        }

    def client(self) -> Any:
        """A plain botocore client, past the code under test."""
        return get_session().create_client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=ACCESS,
            aws_secret_access_key=SECRET,
            region_name="us-east-1",
            config=Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 1}, read_timeout=20),
        )

    def start(self) -> None:
        """Return when it serves signed requests."""
        master, volume, filer, s3 = self._ports
        binary_path = binary()
        assert binary_path is not None
        command = [
            *(binary_path, "-logtostderr=true", "server", f"-dir={self.folder / 'data'}", "-idleTimeout=120"),
            *("-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-master.port={master}", "-master.telemetry=false"),
            *("-master.electionTimeout=1s", "-master.heartbeatInterval=200ms", "-master.volumeSizeLimitMB=1024"),
            *("-master.garbageThreshold=0.05", "-master.vacuumIntervalSeconds=20"),
            *(f"-volume.port={volume}", "-volume.max=0", "-volume.preStopSeconds=1"),
            *("-filer", f"-filer.port={filer}", "-s3", f"-s3.port={s3}", f"-s3.config={self.folder / 's3.json'}"),
            *("-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.autoCreateBucket=false"),
            "-s3.allowDeleteBucketNotEmpty=false",
        ]
        log = (self.folder / "log").open("ab")
        self._process = subprocess.Popen(
            command,
            cwd=self.folder,
            stdout=log,
            stderr=log,
            env=os.environ | {"GOMEMLIMIT": "1GiB", "WEED_S3_SSE_KEY": "what objects are encrypted with here"},
            start_new_session=True,
        )
        log.close()
        self._wait()

    def kill(self) -> None:
        """SIGKILL, in the midst of whatever it does."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def bucket(self, prefix: str = "b") -> str:
        """The name of a new bucket."""
        name = f"{prefix}{uuid4().hex}"
        self.client().create_bucket(Bucket=name)
        return name

    def _wait(self) -> None:
        assert self._process is not None
        # One for all starts: there is room for few buckets.
        deadline, probe = time.monotonic() + READY_S, "ready"
        client = self.client()
        while True:
            assert self._process.poll() is None, (self.folder / "log").read_text()[-2000:]
            try:
                with suppress(client.exceptions.BucketAlreadyOwnedByYou, client.exceptions.BucketAlreadyExists):
                    client.create_bucket(Bucket=probe)
                client.put_object(Bucket=probe, Key="x", Body=b"x")
                assert client.get_object(Bucket=probe, Key="x")["Body"].read() == b"x"
                return
            except Exception:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)

    def _config(self) -> None:
        owner = {"name": "ci", "credentials": [{"accessKey": ACCESS, "secretKey": SECRET}]}
        reader = {"name": "reader", "credentials": [{"accessKey": READER, "secretKey": READER_SECRET}]}
        identities = [
            owner | {"actions": ["Admin", "Read", "Write", "List", "Tagging"]},
            reader | {"actions": ["Read", "List"]},
            {"name": "anonymous", "actions": [f"Read:{PUBLIC}*", f"List:{PUBLIC}*"]},
        ]
        (self.folder / "s3.json").write_text(json.dumps({"identities": identities}))
        (self.folder / "filer.toml").write_text(
            f'[filer.options]\nrecursive_delete = false\ns3.empty_folder_cleanup_delay = "50ms"\n'
            f'[leveldb2]\nenabled = true\ndir = "{self.folder / "filer"}"\n'
        )
        (self.folder / "filer").mkdir()
        (self.folder / "master.toml").write_text("[master.maintenance]\nscripts = ''\n")
