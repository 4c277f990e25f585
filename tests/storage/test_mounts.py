"""The type of file system is read from the system's own table."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckptstore.errors import StorageError
from ckptstore.storage import LocalStorage, mounts
from ckptstore.storage.mounts import bucket_url, filesystem_at, is_remote

TABLE = r"""
22 1 254:0 / / rw,relatime - ext4 /dev/vda rw
25 22 0:23 / /dev/shm rw - tmpfs tmpfs rw
30 22 0:40 / /data rw,relatime shared:1 master:2 - xfs /dev/sdb rw
31 30 0:41 / /data/team rw - nfs4 server:/export rw,vers=4.2
32 30 0:42 / /data/old rw - nfs server:/old rw
33 32 0:43 / /data/old rw - btrfs /dev/sdc rw
34 22 0:44 / /mnt/with\040blank\134slash rw - cifs //server/share rw
35 22 0:45 / /mnt/s3 rw - fuse mountpoint-s3 rw,user_id=0
36 22 0:46 / /mnt/gcs rw - fuse.gcsfuse bucket rw
37 22 0:47 / /mnt/empty rw - ramfs  rw
a line of some other kind
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "ext4"),
        ("/home/user", "ext4"),
        ("/dev/shm", "tmpfs"),
        ("/dev/shm/x", "tmpfs"),
        ("/dev/shmx", "ext4"),
        ("/data/x", "xfs"),
        ("/data/team/runs", "nfs4"),
        ("/data/teams", "xfs"),
        ("/data/old/x", "btrfs"),
        ("/mnt/with blank\\slash/x", "cifs"),
        ("/mnt/s3/x", "fuse.mountpoint-s3"),
        ("/mnt/gcs", "fuse.gcsfuse"),
        ("/mnt/empty", "ramfs"),
    ],
)
def test_the_longest_and_latest_mount_counts(path: str, kind: str) -> None:
    assert filesystem_at(path, TABLE) == kind


def test_an_empty_table_says_unknown() -> None:
    assert filesystem_at("/x", "") == "unknown"


def test_this_system_has_a_table(tmp_path: Path) -> None:
    if not Path(mounts.MOUNTINFO).exists():
        pytest.skip("no table of mounts on this system")
    assert mounts.filesystem_of(str(tmp_path)) != "unknown"


@pytest.mark.parametrize("kind", ["nfs", "nfs4", "cifs", "fuse.sshfs", "fuse", "fuseblk", "lustre"])
def test_network_and_fuse_are_remote(kind: str) -> None:
    assert is_remote(kind)
    assert not is_remote("ext4")


@pytest.mark.parametrize(
    ("kind", "scheme"),
    [
        ("fuse.gcsfuse", "gs://"),
        ("fuse.s3fs", "s3://"),
        ("fuse.goofys", "s3://"),
        ("fuse.mountpoint-s3", "s3://"),
        ("fuse.rclone", "s3://"),
        ("fuse.blobfuse", "az://"),
        ("fuse.blobfuse2", "az://"),
    ],
)
def test_mounted_buckets_are_refused_with_the_url_to_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, scheme: str
) -> None:
    monkeypatch.setattr(mounts, "MOUNTINFO", str(tmp_path / "table"))
    (tmp_path / "table").write_text(f"36 22 0:46 / {tmp_path.resolve()} rw - {kind} bucket rw\n")

    assert scheme in (bucket_url(kind) or "")
    with pytest.raises(StorageError, match=scheme):
        LocalStorage(tmp_path / "runs")


@pytest.mark.parametrize("kind", ["ext4", "nfs4", "fuse.sshfs", "fuse.juicefs"])
def test_other_mounts_are_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(mounts, "MOUNTINFO", str(tmp_path / "table"))
    (tmp_path / "table").write_text(f"36 22 0:46 / {tmp_path.resolve()} rw - {kind} source rw\n")

    storage = LocalStorage(tmp_path / "runs")
    storage.create("a", b"x")

    assert storage.capabilities.kind == kind
    assert storage.capabilities.direct_io == (kind == "ext4")
    assert bucket_url(kind) is None
