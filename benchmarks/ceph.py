"""A second S3 server to measure with: Ceph's, from the packages ceph-mon, ceph-osd and radosgw. Flushes what it takes.

One monitor, one OSD on a sparse file, one gateway; no cluster that anybody should keep anything in.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from botocore.config import Config
from botocore.session import get_session

from tests.s3.seaweed import ACCESS, SECRET, free_ports

READY_S = 120.0
_PROGRAMS = ("ceph-mon", "ceph-osd", "radosgw", "radosgw-admin", "ceph", "monmaptool")
_DISK_BYTES = 30 << 30
_CONFIG = """[global]
fsid = {fsid}
mon_host = v2:127.0.0.1:{mon}
public_addr = 127.0.0.1
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
ms_mon_client_mode = crc
ms_bind_ipv6 = false
run_dir = {folder}
admin_socket = {folder}/$name.asok
log_file = {folder}/$name.log
pid_file =
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 8
osd_crush_chooseleaf_type = 0
osd_objectstore = bluestore
osd_memory_target = 1073741824
mon_data = {folder}/mon
mon_warn_on_pool_no_redundancy = false
mon_allow_pool_size_one = true
osd_data = {folder}/osd
bluestore_block_size = {disk}
rgw_frontends = beast endpoint=127.0.0.1:{rgw}
rgw_enable_usage_log = false
"""


def installed() -> bool:
    """Whether all its programs are there."""
    return all(shutil.which(program) for program in _PROGRAMS)


class Ceph:
    """The server, ``start`` to ``kill``; its data stay in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.folder.mkdir(parents=True)
        self._mon, self._rgw = free_ports(2)
        self._processes: list[subprocess.Popen[bytes]] = []
        text = _CONFIG.format(fsid=uuid4(), mon=self._mon, rgw=self._rgw, folder=self.folder, disk=_DISK_BYTES)
        (self.folder / "ceph.conf").write_text(text)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._rgw}"

    @property
    def options(self) -> dict[str, Any]:
        """What s3fs needs to know of it."""
        return {
            "key": ACCESS,
            "secret": SECRET,
            "endpoint_url": self.endpoint,
            "client_kwargs": {"region_name": "us-east-1"},
        }

    def start(self) -> None:
        """Return when it serves signed requests."""
        try:
            self._monitor()
            self._disk()
            user = ["user", "create", "--uid=bench", "--display-name=bench", "--access-key", ACCESS, "--secret", SECRET]
            self._run("radosgw-admin", *user, "--cluster=ceph")
            self._begin("radosgw", "-n", "client.rgw", "-f")
            self._wait()
        except BaseException:
            self.kill()
            raise

    def kill(self) -> None:
        """End all of it."""
        for process in reversed(self._processes):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self._processes.clear()

    def bucket(self) -> str:
        """The name of a new bucket."""
        name = f"b{uuid4().hex}"
        self.client().create_bucket(Bucket=name)
        return name

    def _monitor(self) -> None:
        fsid = next(line.split()[2] for line in (self.folder / "ceph.conf").read_text().splitlines() if "fsid" in line)
        map = str(self.folder / "monmap")
        where = f"[v2:127.0.0.1:{self._mon}]"
        self._run("monmaptool", "--create", "--addv", "a", where, "--fsid", fsid, map, configured=False)
        (self.folder / "mon").mkdir()
        self._run("ceph-mon", "--mkfs", "-i", "a", "--monmap", map)
        self._begin("ceph-mon", "-i", "a", "-f")

    def _disk(self) -> None:
        (self.folder / "osd").mkdir()
        uuid = str(uuid4())
        self._run("ceph", "osd", "new", uuid)
        self._run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", uuid)
        self._begin("ceph-osd", "-i", "0", "-f")

    def _run(self, program: str, *arguments: str, configured: bool = True) -> None:
        conf = ["-c", str(self.folder / "ceph.conf")] if configured else []
        with (self.folder / "log").open("ab") as log:
            subprocess.run(
                [program, *conf, *arguments], check=True, stdout=log, stderr=log, timeout=READY_S, cwd=self.folder
            )

    def _begin(self, program: str, *arguments: str) -> None:
        command = [program, "-c", str(self.folder / "ceph.conf"), *arguments]
        with (self.folder / "log").open("ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.folder, start_new_session=True)
        self._processes.append(process)

    def client(self) -> Any:
        """A plain botocore client."""
        return get_session().create_client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=ACCESS,
            aws_secret_access_key=SECRET,
            region_name="us-east-1",
            config=Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 1}, read_timeout=30),
        )

    def _wait(self) -> None:
        deadline, client, name = time.monotonic() + READY_S, self.client(), f"ready{uuid4().hex}"
        while True:
            try:
                with suppress(client.exceptions.BucketAlreadyOwnedByYou):
                    client.create_bucket(Bucket=name)
                # The first write makes the pool, which takes seconds.
                client.put_object(Bucket=name, Key="x", Body=b"x")
                return
            except Exception:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.3)
