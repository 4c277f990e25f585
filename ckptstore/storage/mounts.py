"""Which file system a path lies on, and what that means for checkpoints."""

from __future__ import annotations

import os
import re

MOUNTINFO = "/proc/self/mountinfo"

VOLATILE = frozenset({"tmpfs", "ramfs", "devtmpfs"})
"""File systems that live in memory: fsync succeeds and promises nothing."""

_NETWORK = frozenset(
    {
        *("nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "virtiofs", "afs", "ceph", "lustre", "beegfs", "gpfs"),
        *("orangefs", "pvfs2", "wekafs", "glusterfs"),
    }
)

_BUCKET_URLS = {
    "gcsfuse": "gs://bucket/…",
    "s3fs": "s3://bucket/…",
    "goofys": "s3://bucket/…",
    "geesefs": "s3://bucket/…",
    "mountpoint-s3": "s3://bucket/…",
    "yas3fs": "s3://bucket/…",
    "riofs": "s3://bucket/…",
    "blobfuse": "az://container/…",
    "blobfuse2": "az://container/…",
    "rclone": "the remote's own URL, as s3://bucket/…, gs://bucket/… or az://container/…",
}

_ESCAPE = re.compile(r"\\([0-7]{3})")


def filesystem_of(path: str) -> str:
    """Type of the file system that holds the existing ``path``; "unknown" where the system doesn't tell."""
    try:
        with open(MOUNTINFO, encoding="utf-8", errors="surrogateescape") as file:
            return filesystem_at(os.path.realpath(path), file.read())
    except OSError:
        return "unknown"


def filesystem_at(path: str, mountinfo_text: str) -> str:
    """Type of the file system at ``path`` (absolute, without symlinks), as ``ext4`` or ``fuse.s3fs``.

    A mount whose type is plain ``fuse`` is named after its source: ``fuse.mountpoint-s3``.
    """
    longest, kind = "", "unknown"
    # Not splitlines(): a mount point may hold characters that Unicode takes for line ends.
    for line in mountinfo_text.split("\n"):
        mount, separator, source = line.partition(" - ")
        if not separator:
            continue
        point = _ESCAPE.sub(lambda match: chr(int(match[1], 8)), mount.split(" ")[4])
        # ">=": of two mounts on one point the later one hides the earlier.
        if len(point) >= len(longest) and _is_below(path, point):
            longest, kind = point, _kind(*source.split(" ")[:2])
    return kind


def _kind(kind: str, source: str) -> str:
    return f"fuse.{source}" if kind == "fuse" else kind


def _is_below(path: str, mount_point: str) -> bool:
    return path == mount_point or path.startswith(mount_point.rstrip("/") + "/")


def is_remote(kind: str) -> bool:
    """True for network file systems, and for FUSE, behind which anything may be."""
    return kind in _NETWORK or kind.startswith("fuse")


def bucket_url(kind: str) -> str | None:
    """What to open instead of a mounted bucket, whose files appear only when closed; None for all else."""
    return _BUCKET_URLS.get(kind.removeprefix("fuse.")) if kind.startswith("fuse.") else None
