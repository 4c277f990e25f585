"""Digests by name: BLAKE3 for blocks, SHA-256 for the records that point at them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Final, Protocol, TypeAlias

import blake3

from ckptstore.errors import FormatError

Buffer: TypeAlias = bytes | bytearray | memoryview

BLOCK_DIGEST: Final = "blake3"
"""Name written to new stores. Both digests are 256 bits, in lower-case hex."""


class Hasher(Protocol):
    """A digest in the making."""

    def update(self, data: Buffer, /) -> object: ...
    def hexdigest(self) -> str: ...


def sha256(data: Buffer) -> str:
    """SHA-256 of ``data`` as 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


_BY_NAME: dict[str, Callable[[], Hasher]] = {"blake3": blake3.blake3, "sha256": hashlib.sha256}


def new_hasher(name: str) -> Hasher:
    """A hasher for the digest named in a store.

    Raises:
        FormatError: unknown name. Never "skip verification" (a record could ask for a weak one).
    """
    if name in _BY_NAME:
        return _BY_NAME[name]()
    raise FormatError(f"unknown block digest {name!r}; known: {', '.join(_BY_NAME)}. A newer ckptstore may know it")


def block_digest(name: str, data: Buffer) -> str:
    """The digest called ``name`` of ``data``, as 64 hex digits.

    Raises:
        FormatError: unknown name.
    """
    hasher = new_hasher(name)
    hasher.update(data)
    return hasher.hexdigest()
