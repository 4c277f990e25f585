"""What was verified, and what came of it: one small record a verification. For people; nothing is decided by them."""

from __future__ import annotations

import socket
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Literal

from ckptstore.engine.catalogue import Checkpoint, Damage, read_each
from ckptstore.engine.commit import read_record, read_store
from ckptstore.errors import CheckpointError, FormatError, NotFoundError
from ckptstore.format import layout
from ckptstore.format.records import VerificationRecord, seal, unseal
from ckptstore.storage.base import Storage

KEPT = 20
"""Records that stay; older ones go when a new one comes."""


@dataclass(frozen=True)
class Verification:
    """A verification that was finished, as it was put down then.

    Attributes:
        created: when it ended: UTC, by the clock of whoever verified.
        host: the machine that did it.
        by: "verify", or "scrub" for a complete pass of ``scrub=``.
        id: the one checkpoint that was read; None: all that lay there.
        newest: id of the newest checkpoint that was read; None where there was none.
        sample: share of the blocks that was read.
        checkpoints: how many were read.
        read_bytes: stored bytes read.
        seconds: time it took.
        damages: how many were found, and left.
        repaired: how many were found, and are no more.
    """

    created: datetime
    host: str
    by: Literal["verify", "scrub"]
    id: str | None
    newest: str | None
    sample: float
    checkpoints: int
    read_bytes: int
    seconds: float
    damages: int
    repaired: int

    @property
    def ok(self) -> bool:
        """Whether all that was read is good."""
        return not self.damages


@dataclass
class Tally:
    """What one verification found."""

    by: Literal["verify", "scrub"]
    newest: Checkpoint | None
    checkpoints: int
    whole: bool = True
    sample: float = 1.0
    read_bytes: int = 0
    seconds: float = 0.0
    damages: int = 0
    repaired: int = 0


def remember(storage: Storage, found: Tally) -> None:
    """Put down what was ``found``, as far as possible: where nothing can be written, nothing is lost."""
    with suppress(CheckpointError):
        when = datetime.now(UTC)
        storage.create(layout.verification_key(when), seal(_record(storage, found, when)))
        keys = sorted(entry.key for entry in storage.list(layout.VERIFICATIONS) if layout.is_verification(entry.key))
        storage.delete(keys[:-KEPT])


def _record(storage: Storage, found: Tally, when: datetime) -> VerificationRecord:
    newest = found.newest
    return VerificationRecord(
        store_id=newest.record.store_id if newest is not None else read_store(storage).store_id,
        created=when.isoformat(timespec="microseconds").replace("+00:00", "Z"),
        host=socket.gethostname()[:200],
        by=found.by,
        id=newest.id if newest is not None and not found.whole else None,
        newest=newest.id if newest is not None else None,
        sample=found.sample,
        checkpoints=found.checkpoints,
        read_bytes=found.read_bytes,
        seconds=round(found.seconds, 3),
        damages=found.damages,
        repaired=found.repaired,
    )


def read_verifications(storage: Storage) -> tuple[list[Verification], list[Damage]]:
    """All that was put down, the newest first, and the records that can't be read.

    Raises:
        StorageError: the storage can't be read.
    """
    # Their names begin with the time.
    keys = sorted((e.key for e in storage.list(layout.VERIFICATIONS) if layout.is_verification(e.key)), reverse=True)
    found: dict[str, Verification] = {}

    def look(key: str) -> None:
        # Newer ones came since it was listed, and it had to go.
        with suppress(NotFoundError):
            found[key] = read_record(storage, key, partial(_verification, key))

    bad = read_each(keys, look, storage)
    return [found[key] for key in keys if key in found], [Damage(key, str(bad[key])) for key in keys if key in bad]


def _verification(key: str, data: bytes) -> Verification:
    record = unseal(data, key, [VerificationRecord])
    try:
        created = datetime.fromisoformat(record.created).astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise FormatError(f"{key} was written at {record.created[:40]!r}, which is no time", key=key) from error
    return Verification(created=created, **record.model_dump(exclude={"format", "store_id", "created"}))
