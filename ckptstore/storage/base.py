"""Bytes at keys: what every backend does, and how each call fails.

A key is a relative path of names joined by "/". A name matches ``[A-Za-z0-9][A-Za-z0-9._-]*`` and has at
most 200 characters, so that it means the same on every file system and object store. Nothing that is good is
ever overwritten: an object appears whole, once, and disappears by ``delete``; ``replace`` is for damaged ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from ckptstore.errors import StorageError

ALIGNMENT = 4096
"""Memory, offsets and lengths that are multiples of this take the fast path (direct I/O)."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}", re.ASCII)


class Entry(NamedTuple):
    """One object in a listing. A key that ends in "/" is an empty folder, which a killed save may leave."""

    key: str
    size: int
    modified: float
    """Seconds since 1970 by the storage's clock. For people and for delaying deletion, never for order."""


class Upload(NamedTuple):
    """A large object that was begun and neither finished nor aborted, where the storage keeps such a thing."""

    key: str
    token: str
    """By which the storage knows it."""
    begun: float
    """Seconds since 1970 by the storage's clock."""


class Slot(NamedTuple):
    """A reserved place in an object that is being written."""

    number: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a backend can promise. Differences between backends are data, not branches."""

    durability: Literal["power-cut", "process-crash", "none"]
    """What an acknowledged write survives: a power cut, the end of this process only, or not even that."""
    atomic_create: bool
    """False: ``create`` is exclusive, but a crash inside it may leave a torn object behind."""
    direct_io: bool
    """True: aligned block transfers bypass the page cache."""
    kind: str
    """File system type or service, as ``ext4``, ``nfs4``, ``memory``."""
    exclusive_create: bool = True
    """False: of several who create one key at the same time more than one may be told that it did."""
    checks_writes: bool = False
    """True: what is damaged on its way to the storage is refused there, by a checksum that was sent along."""
    in_flight: int | None = None
    """How many blocks are worth moving at a time; None: one more than there are cores."""


class ObjectWriter(Protocol):
    """One object in the making; invisible or unreferenced until ``finish``. ``write`` is thread-safe."""

    def reserve(self, length: int) -> Slot:
        """Take the next ``length`` bytes. Called in the order in which the slots shall follow each other."""

    def write(self, slot: Slot, data: memoryview) -> None:
        """Write ``data`` (exactly ``slot.length`` bytes) at its slot; any thread, any order.

        Raises:
            StorageError: the object is lost and must be aborted; no write to it is ever retried here.
        """

    def finish(self) -> int:
        """Make the bytes durable, close, and return the size in bytes. The *name* is durable only after the
        next ``create`` in the same folder."""

    def abort(self) -> None:
        """Drop what was written, as far as possible. Never raises; does nothing after ``finish``."""


class ObjectReader(Protocol):
    """One object opened for reading: always the same bytes, also if its name disappears meanwhile."""

    size: int

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """Fill ``buffer`` from ``offset`` and return how many bytes there were (fewer only at the end).

        Raises:
            IntegrityError: these bytes can't be read for good (a bad sector).
            StorageError: the read failed; ``transient`` says whether to try again.
        """

    def close(self) -> None:
        """Release the object. Safe to call twice."""


class Storage(Protocol):
    """A place that holds objects under keys. All methods are thread-safe."""

    url: str
    """For people: without credentials."""
    capabilities: Capabilities

    def list(self, prefix: str) -> list[Entry]:
        """All objects under ``prefix`` (a folder with its "/", or "" for everything), sorted by key.

        Temporary objects of interrupted writes are listed too (their last name starts with ``tmp-``).
        A folder that isn't there is empty; a storage that can't be listed completely is an error.

        Raises:
            StorageError, UnavailableError: never an incomplete list.
        """

    def size(self, key: str) -> int:
        """Size in bytes.

        Raises:
            NotFoundError: no such object.
            IntegrityError: something stands there that is no object, or it can't be read for good.
            StorageError: the backend failed.
        """

    def read(self, key: str, *, limit: int) -> bytes:
        """The whole object.

        Raises:
            NotFoundError: no such object.
            FormatError: it has more than ``limit`` bytes (nothing is read then).
            IntegrityError: something stands there that is no object, or it can't be read for good.
            StorageError: the backend failed.
        """

    def create(self, key: str, data: bytes) -> None:
        """Put a small object, whole and durable, unless the key is taken. Exactly one of many racers wins.

        On return it is durable, and so are the names of all objects finished before in the same folder.

        Raises:
            ExistsError: the key is taken (by whom, ``read`` tells).
            StorageError: ``outcome`` is "failed" (not there) or "unknown" (read it back to find out).
        """

    def open_writer(self, key: str, *, size: int | None = None) -> ObjectWriter:
        """Begin a large object; ``size`` in bytes, where known, reserves the space.

        Raises:
            ExistsError: the key is taken.
            StorageFullError: ``size`` bytes are not there.
        """

    def open_reader(self, key: str, *, size: int | None = None) -> ObjectReader:
        """Open an object for reading; ``size`` in bytes, where known, may spare looking at it.

        Then the first read may be what tells that it is missing or has another size, as an ``IntegrityError``.

        Raises:
            NotFoundError: no such object.
            IntegrityError: something stands there that is no object (a symlink, a device).
            StorageError: the backend failed.
        """

    def delete(self, keys: Iterable[str]) -> None:
        """Remove objects and the folders left empty by that; missing ones are no error. Durable on return.

        Raises:
            StorageError: some may be gone, some not; calling again finishes the work.
        """

    def replace(self, key: str, by: str) -> None:
        """Put the object ``by``, of the same folder, in the place of ``key``, which is damaged or gone.

        Whoever looks sees the one or the other. Durable on return; ``by`` is no more.

        Raises:
            NotFoundError: there is no ``by``.
            StorageError: the one or the other is there.
        """

    def probe(self, key: str, data: bytes) -> None:
        """Try at ``key``, which was created with ``data`` before, what this storage is able to do.

        ``capabilities`` tell what was found. Leaves nothing behind, and the object as it is.

        Raises:
            StorageError: the backend failed, or can't do what nothing works without.
        """

    def uploads(self) -> Sequence[Upload]:
        """Large objects that were begun and neither finished nor aborted, also those that are on their way now.

        Empty where an interrupted write leaves nothing, or only what ``list`` shows.
        """

    def abort_uploads(self, uploads: Iterable[Upload]) -> None:
        """Drop what ``uploads`` have stored so far; those that are no more are no error."""

    def close(self) -> None:
        """Release what the storage holds open. Safe to call twice."""


def is_key(key: str) -> bool:
    """Whether ``key`` follows the grammar."""
    return all(_NAME.fullmatch(name) for name in key.split("/"))


def check_key(key: str) -> str:
    """``key`` itself, if it follows the grammar.

    Raises:
        StorageError: it doesn't, so that no name read from storage can lead out of the root.
    """
    if is_key(key):
        return key
    raise StorageError(f"{key!r} is no valid key: names of letters, digits, '.', '_', '-', joined by '/'", key=key)


def check_prefix(prefix: str) -> str:
    """``prefix`` itself, if it is "" or a key followed by "/".

    Raises:
        StorageError: it is neither.
    """
    if not prefix or (prefix.endswith("/") and is_key(prefix[:-1])):
        return prefix
    raise StorageError(f"{prefix!r} is no folder to list: a key followed by '/', or '' for everything", key=prefix)
