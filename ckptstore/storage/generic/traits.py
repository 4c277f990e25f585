"""What a class of file systems is known to do. fsspec's own interface doesn't tell.

Known are those that were read and tried; all others are taken to do no more than their class defines.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fsspec import AbstractFileSystem
from fsspec.asyn import AsyncFileSystem


@dataclass(frozen=True, slots=True)
class Traits:
    """How objects come to be, and to go, in one class of file systems."""

    publish: Literal["put", "rename", "copy", "never"]
    """How a whole object gets its name: by one request; from a temporary one by renaming it, or by copying it within
    the storage. Never: this class can't, or can't write at all."""
    create: Literal["conditional", "exclusive open", "one process", "look first"]
    """How a key that is taken is told: by the server; by opening with "x", which a crash may leave half written; by
    looking first, which is enough where there is one process, and weaker where there are more."""
    durability: Literal["power-cut", "process-crash", "none"] = "process-crash"
    """What an acknowledged write survives, as far as anybody knows."""
    open_mode: str = "xb"
    """Which opens for writing what isn't there yet, where that is how things are created."""
    folders: bool = False
    """Folders are there by themselves: made before writing, removed when they are empty."""
    threads: bool = False
    """Several threads may ask at once."""
    copies: bool = True
    """A copy within the storage is complete when the request for it returns."""
    asks_ahead: bool = False
    """A file has ``readv``, which asks for a whole range at once, where ``read`` waits for each small piece of it."""
    bucket: bool = False
    """Paths begin with a bucket, which may be missing."""
    by_links: bool = False
    """Paths are URLs, and a listing is what a page links to."""


_KNOWN = {
    ("s3fs", "S3FileSystem"): Traits("put", "conditional", "power-cut", threads=True, bucket=True),
    ("gcsfs", "GCSFileSystem"): Traits("put", "conditional", "power-cut", threads=True, bucket=True),
    # Azure copies in the background, and the target can be read before it is complete.
    ("adlfs", "AzureBlobFileSystem"): Traits(
        "put", "conditional", "power-cut", threads=True, copies=False, bucket=True
    ),
    ("fsspec", "MemoryFileSystem"): Traits("copy", "one process", "none", threads=True),
    ("fsspec", "LocalFileSystem"): Traits("rename", "exclusive open", folders=True, threads=True),
    # One connection, whose answers go to whoever reads it first.
    ("fsspec", "SFTPFileSystem"): Traits("rename", "exclusive open", open_mode="wxb", folders=True, asks_ahead=True),
    ("fsspec", "HTTPFileSystem"): Traits("never", "look first", threads=True, by_links=True),
}


def traits_of(fs: AbstractFileSystem) -> Traits:
    """What ``fs`` does, by its class or the nearest of its parents that is known."""
    for cls in type(fs).__mro__:
        known = _KNOWN.get((cls.__module__.partition(".")[0], cls.__name__))
        if known is not None:
            return known
    publish: Literal["rename", "copy", "never"] = "never"
    if overrides(fs, "mv"):
        publish = "rename"
    elif overrides(fs, "cp_file"):
        publish = "copy"
    return Traits(publish, "look first", threads=isinstance(fs, AsyncFileSystem))


def overrides(fs: AbstractFileSystem, method: str) -> bool:
    """Whether the class of ``fs`` does this itself, in its plain or its asynchronous form."""
    base = AsyncFileSystem if isinstance(fs, AsyncFileSystem) else AbstractFileSystem
    names = (method, f"_{method}")
    return any(getattr(type(fs), name, None) is not getattr(base, name, None) for name in names)
