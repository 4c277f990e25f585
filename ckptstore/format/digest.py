"""Digests by name: BLAKE3 for blocks, SHA-256 for the records that point at them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Final, TypeAlias

import blake3

from ckptstore.errors import FormatError

Buffer: TypeAlias = bytes | bytearray | memoryview

BLOCK_DIGEST: Final = "blake3"
"""Name written to new stores. Both digests are 256 bits, in lower-case hex."""


def _blake3(data: Buffer) -> str:
    return blake3.blake3(data).hexdigest()


def sha256(data: Buffer) -> str:
    """SHA-256 of ``data`` as 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


_BY_NAME: dict[str, Callable[[Buffer], str]] = {"blake3": _blake3, "sha256": sha256}


def block_digest(name: str) -> Callable[[Buffer], str]:
    """The function for a digest named in a store.

    Raises:
        FormatError: unknown name. Never "skip verification" (a record could ask for a weak one).
    """
    if name in _BY_NAME:
        return _BY_NAME[name]
    raise FormatError(f"unknown block digest {name!r}; known: {', '.join(_BY_NAME)}. A newer ckptstore may know it")
