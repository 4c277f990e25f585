"""Where everything lies: ids and keys, one definition of each stored name."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from datetime import datetime
from functools import total_ordering
from typing import Final

from ckptstore.errors import FormatError
from ckptstore.format.digest import sha256

FORMAT: Final = 1
"""Version of the layout and records written here. A reader refuses a higher one."""

STORE = "store.json"
WRITERS = "writers/"
COMMITS = "commits/"
CHECKPOINTS = "checkpoints/"
HOLDS = "holds/"
TRASH = "trash/"
CONTROL = "control/"
RECEIPTS = "receipts/"
COPYING = "copying/"
VERIFICATIONS = "verifications/"
TEMPORARY = "tmp-"
"""Prefix of the last name of an object whose creation was interrupted."""

_ID = re.compile(r"(\d{4,9})-(\d{6,12})-step(\d{1,15})-([0-9a-f]{16})", re.ASCII)
_WRITER = re.compile(r"writers/(\d{4,9})\.json", re.ASCII)
_FILE = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}\.(safetensors|blocks)", re.ASCII)
_RECEIPT = re.compile(r"receipts/[0-9a-f]{16}/([^/]+)\.json", re.ASCII)
_VERIFICATION = re.compile(r"verifications/\d{8}T\d{6}\.\d{6}Z-[0-9a-f]{16}\.json", re.ASCII)
_HOLD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", re.ASCII)
_RESERVED = re.compile(r"latest|(best|step|epoch|milestone|hold)([:.].*)?|\d{4,9}-\d.*", re.IGNORECASE)


@total_ordering
@dataclass(frozen=True, slots=True)
class CheckpointId:
    """``<writer:04d>-<seq:06d>-step<step>-<16 hex>``, ordered by (writer, seq, hex): never by clock or step."""

    writer: int
    seq: int
    step: int
    unique: str

    def __str__(self) -> str:
        return f"{self.writer:04d}-{self.seq:06d}-step{self.step}-{self.unique}"

    def __lt__(self, other: CheckpointId) -> bool:
        return (self.writer, self.seq, self.unique) < (other.writer, other.seq, other.unique)


def new_id(writer: int, seq: int, step: int) -> CheckpointId:
    """A fresh id; its 64 random bits make every key under it unique, also among racing writers."""
    return CheckpointId(writer, seq, step, secrets.token_hex(8))


def parse_id(text: str) -> CheckpointId:
    """The inverse of ``str(id)``.

    Raises:
        FormatError: ``text`` is no canonical id.
    """
    match = _ID.fullmatch(text)
    if match:
        found = CheckpointId(int(match[1]), int(match[2]), int(match[3]), match[4])
        if str(found) == text:
            return found
    raise FormatError(f"{text!r} is no checkpoint id; one looks like 0001-000042-step1000-0123456789abcdef")


def try_id(text: str) -> CheckpointId | None:
    """The id, or None where ``text`` is something else."""
    try:
        return parse_id(text)
    except FormatError:
        return None


def commit_key(id: CheckpointId) -> str:
    return f"{COMMITS}{id}.json"


def tombstone_key(id: CheckpointId) -> str:
    return f"{TRASH}{id}.json"


def folder(id: CheckpointId) -> str:
    return f"{CHECKPOINTS}{id}/"


def manifest_key(id: CheckpointId) -> str:
    return f"{folder(id)}manifest.json"


def part_key(id: CheckpointId, rank: int) -> str:
    return f"{folder(id)}part-{rank:05d}.json"


def file_key(id: CheckpointId, name: str) -> str:
    return f"{folder(id)}{name}"


def is_data_file(key: str) -> bool:
    """Whether a data file may lie under ``key``, as opposed to a manifest or a part."""
    return key.endswith((".safetensors", ".blocks"))


def writer_key(writer: int) -> str:
    return f"{WRITERS}{writer:04d}.json"


def hold_key(name: str) -> str:
    return f"{HOLDS}{name}.json"


def control_key(action: str) -> str:
    return f"{CONTROL}{action}.json"


def receipts_of(place: str) -> str:
    """The folder of the receipts for copies at ``place``, a backup's URL."""
    return f"{RECEIPTS}{sha256(place.encode())[:16]}/"


def receipt_key(place: str, id: CheckpointId) -> str:
    return f"{receipts_of(place)}{id}.json"


def receipt_id(key: str) -> CheckpointId | None:
    """The id in ``receipts/<place>/<id>.json``, or None for any other key."""
    match = _RECEIPT.fullmatch(key)
    return try_id(match[1]) if match else None


def copying_key(id: CheckpointId) -> str:
    return f"{COPYING}{id}.json"


def copying_id(key: str) -> CheckpointId | None:
    """The id in ``copying/<id>.json``, or None for any other key."""
    name = key.removeprefix(COPYING)
    return try_id(name.removesuffix(".json")) if name != key and name.endswith(".json") else None


def verification_key(when: datetime) -> str:
    """A fresh key for what was verified until ``when``, in UTC: as text they are in the order of time."""
    return f"{VERIFICATIONS}{when:%Y%m%dT%H%M%S.%f}Z-{secrets.token_hex(8)}.json"


def is_verification(key: str) -> bool:
    """Whether ``key`` is one of ``verification_key``."""
    return _VERIFICATION.fullmatch(key) is not None


def record_id(key: str) -> CheckpointId | None:
    """The id in ``commits/<id>.json`` or ``trash/<id>.json``, or None for any other key."""
    parent, _, name = key.partition("/")
    if parent + "/" not in (COMMITS, TRASH) or not name.endswith(".json"):
        return None
    return try_id(name.removesuffix(".json"))


def folder_id(key: str) -> CheckpointId | None:
    """The id whose folder ``key`` lies in, or None."""
    parts = key.split("/")
    return try_id(parts[1]) if len(parts) >= 3 and parts[0] + "/" == CHECKPOINTS else None


def writer_number(key: str) -> int | None:
    """The number in ``writers/<n>.json``, or None for any other key."""
    match = _WRITER.fullmatch(key)
    return int(match[1]) if match and writer_key(int(match[1])) == key else None


def hold_name(key: str) -> str | None:
    """The name in ``holds/<name>.json``, or None for any other key."""
    name = key.removeprefix(HOLDS)
    if name == key or not name.endswith(".json"):
        return None
    name = name.removesuffix(".json")
    return name if _HOLD.fullmatch(name) else None


def check_hold_name(name: str) -> str:
    """``name`` itself, if a hold may have it.

    Raises:
        FormatError: it could be taken for a selector or an id, or is no plain name.
    """
    if not _HOLD.fullmatch(name):
        raise FormatError(f"{name!r} can't name a hold: letters, digits, '.', '_', '-', at most 100, no '/' or ':'")
    if _RESERVED.fullmatch(name) or name.startswith(TEMPORARY):
        raise FormatError(f"{name!r} can't name a hold: it is a selector or looks like an id; choose another name")
    return name


def check_file_name(name: str) -> str:
    """``name`` itself, if a data file may have it: a name, never a path.

    Raises:
        FormatError: anything else.
    """
    if _FILE.fullmatch(name) and not name.startswith(TEMPORARY):
        return name
    raise FormatError(f"{name!r} can't be a data file's name")


def file_name(component: str, taken: set[str], *, suffix: str) -> str:
    """A data file's name for a component of the state, unique among ``taken`` also where case is ignored."""
    base = re.sub(r"[^a-z0-9._-]+", "-", component.lower()).strip(".-_")[:80] or "state"
    if base.startswith(TEMPORARY):
        base = f"c-{base}"
    name, n = f"{base}{suffix}", 1
    while name in taken:
        n += 1
        name = f"{base}-{n}{suffix}"
    taken.add(name)
    return check_file_name(name)
