"""The commit register: one create-once key decides the fate of each checkpoint.

Whoever wants a checkpoint to exist creates ``commits/<id>.json`` as "commit"; whoever wants to collect an
unfinished one creates the same key as "condemned". One register, one winner, no clock.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from ckptstore import __version__
from ckptstore.errors import (
    CommitUnknownError,
    ExistsError,
    FormatError,
    IntegrityError,
    NotFoundError,
    SaveFailedError,
    StaleWriterError,
    StorageError,
)
from ckptstore.format import layout
from ckptstore.format.digest import BLOCK_DIGEST
from ckptstore.format.layout import CheckpointId
from ckptstore.format.records import (
    SMALL_LIMIT,
    CommitRecord,
    CondemnedRecord,
    StoreRecord,
    TombstoneRecord,
    WriterRecord,
    now,
    seal,
    unseal,
)
from ckptstore.storage.base import Storage

_log = logging.getLogger("ckptstore")
T = TypeVar("T")

_CLAIM_ROUNDS = 1000


def read_record(storage: Storage, key: str, parse: Callable[[bytes], T], *, limit: int = SMALL_LIMIT) -> T:
    """What ``parse`` makes of the object; read a second time where that is damaged.

    A flip on the way up heals by itself, one on the storage does not.

    Raises:
        NotFoundError, IntegrityError, FormatError: as ``parse`` and ``Storage.read``.
    """
    with suppress(IntegrityError, FormatError):
        return parse(storage.read(key, limit=limit))
    return parse(storage.read(key, limit=limit))


def read_store(storage: Storage) -> StoreRecord:
    """``store.json``.

    Raises:
        NotFoundError: there is no store here.
        IntegrityError, FormatError: it is damaged, or of a newer format.
    """
    return read_record(storage, layout.STORE, lambda data: unseal(data, layout.STORE, [StoreRecord]))


def new_store(known_id: str | None = None) -> StoreRecord:
    """A ``store.json`` as it is written today."""
    return StoreRecord(
        store_id=known_id or secrets.token_hex(16),
        digest=BLOCK_DIGEST,
        created=now(),
        created_by=f"ckptstore {__version__}",
    )


def ensure_store(storage: Storage, *, known_id: str | None = None, like: StoreRecord | None = None) -> StoreRecord:
    """``store.json``, created if missing; ``known_id`` is the store's id where its commits still tell it.

    ``like`` is the same store's record in another place, where one is known: then this one has the same bytes.

    Raises:
        IntegrityError: it is damaged, and no commit tells the id.
    """
    record = like or new_store(known_id)
    if known_id is None and _is_created(storage, record):
        # Without commits it is a new one, most likely: asking first would be in vain.
        return record
    try:
        return read_store(storage)
    except NotFoundError:
        return record if _is_created(storage, record) else read_store(storage)
    except IntegrityError as error:
        if known_id is None:
            message = f"{error}, and no commit tells the store's id: remove it, and the next save writes it anew"
            raise IntegrityError(message, key=layout.STORE) from error
        # Nothing is overwritten, and training goes on: all that matters of it stands in every commit too.
        return record


def _is_created(storage: Storage, record: StoreRecord) -> bool:
    try:
        storage.create(layout.STORE, seal(record))
    except ExistsError:
        return False
    return True


def writers(storage: Storage) -> list[int]:
    """The numbers of all writers that ever claimed the store, ascending."""
    numbers = (layout.writer_number(entry.key) for entry in storage.list(layout.WRITERS))
    return sorted(n for n in numbers if n is not None)


def claim_writer(storage: Storage, store_id: str, *, above: int) -> int:
    """Become the newest writer: the number created, higher than ``above`` and than every other."""
    for _ in range(_CLAIM_ROUNDS):
        number = 1 + max([above, *writers(storage)])
        if claim_number(storage, number, writer_record(store_id, number)):
            return number
    raise StorageError(f"{storage.url}: another writer took every number tried in writers/")


def writer_record(store_id: str, number: int) -> bytes:
    """What this process puts down to be writer ``number``."""
    record = WriterRecord(
        writer=number, store_id=store_id, host=socket.gethostname()[:200], pid=os.getpid(), created=now()
    )
    return seal(record)


def claim_number(storage: Storage, number: int, data: bytes) -> bool:
    """Become writer ``number`` with ``data``; False if another one is it."""
    key = layout.writer_key(number)
    try:
        storage.create(key, data)
        if storage.capabilities.exclusive_create:
            return True
    except ExistsError:
        # Ours, if an answer was lost on the way, or came too late.
        pass
    # Where two may have been told that they created it, the bytes tell whose it is: each has other ones.
    try:
        return storage.read(key, limit=SMALL_LIMIT) == data
    except (NotFoundError, IntegrityError, FormatError):
        return False


def _proven_store(data: bytes) -> bytes:
    unseal(data, layout.STORE, [StoreRecord])
    return data


def try_out(storage: Storage) -> bool:
    """Learn what the storage can do; False where there is no good ``store.json`` yet to try it at.

    Raises:
        StorageError: it can't do what nothing works without.
    """
    try:
        # Proven, as a server that knows no conditions is going to be given it again.
        data = read_record(storage, layout.STORE, _proven_store)
    except (NotFoundError, FormatError, IntegrityError):
        return False
    storage.probe(layout.STORE, data)
    if not storage.capabilities.exclusive_create:
        _log.warning(
            "%s doesn't refuse to create what exists (If-None-Match). Checkpoints there are whole and checked all "
            "the same; but a run that was replaced may notice late, and prune leaves unfinished saves alone for "
            "7 days. 'ckptstore doctor' tells what holds",
            storage.url,
        )
    return True


def check_fence(storage: Storage, number: int) -> None:
    """Nothing, as long as ``number`` is the newest writer.

    Raises:
        StaleWriterError: a newer one has claimed the store.
    """
    newest = max(writers(storage), default=0)
    if newest > number:
        raise StaleWriterError(
            f"{storage.url}: writer {newest} has opened this store after writer {number} (this run). "
            "Nothing saved here could become 'latest' any more: stop this run, or open a store of its own for it"
        )


def read_fate(storage: Storage, id: CheckpointId) -> CommitRecord | CondemnedRecord:
    """What ``commits/<id>.json`` says.

    Raises:
        NotFoundError: the fate is open.
        IntegrityError, FormatError: the record is damaged.
    """
    key = layout.commit_key(id)
    return read_record(storage, key, lambda data: parse_fate(data, key))


def parse_fate(data: bytes, key: str) -> CommitRecord | CondemnedRecord:
    """The record that stands under ``key``.

    Raises:
        IntegrityError, FormatError: it is damaged, or belongs under another key.
    """
    kinds: list[type[CommitRecord | CondemnedRecord]] = [CommitRecord, CondemnedRecord]
    record = unseal(data, key, kinds)
    if layout.COMMITS + record.id + ".json" != key:
        raise IntegrityError(f"{key} holds the record of {record.id}", key=key, expected=key, actual=record.id)
    return record


def commit(storage: Storage, id: CheckpointId, record: CommitRecord) -> None:
    """Make the checkpoint exist: durable and read back, or an error that says what is certain.

    Raises:
        SaveFailedError: certainly not committed.
        CommitUnknownError: it may be; nothing was deleted.
    """
    key, data = layout.commit_key(id), seal(record)
    unknown: StorageError | None = None
    try:
        storage.create(key, data)
    except ExistsError:
        # Ours, if an answer was lost on the way and the request came twice.
        pass
    except StorageError as error:
        if error.outcome == "failed":
            raise
        unknown = error
    _confirm(storage, id, data, unknown)


def _confirm(storage: Storage, id: CheckpointId, data: bytes, unknown: StorageError | None) -> None:
    key = layout.commit_key(id)
    question = CommitUnknownError(
        f"{id}: whether it was committed is unknown ({unknown}); "
        f"store.resolve({str(id)!r}) tells once the storage answers",
        id=str(id),
        step=id.step,
        key=key,
    )
    # A failed fsync can't be repeated: the record is visible then, but not proven to be durable.
    if unknown is not None and not unknown.transient:
        raise question from unknown
    try:
        found = storage.read(key, limit=SMALL_LIMIT)
        # A flip on the way up heals by itself.
        found = found if found == data else storage.read(key, limit=SMALL_LIMIT)
    except (StorageError, NotFoundError, IntegrityError) as error:
        raise question from error
    if found == data:
        return
    if isinstance(parse_fate(found, key), CondemnedRecord):
        raise SaveFailedError(
            f"{id} was condemned as a leftover while it was being saved; save again", id=str(id), step=id.step, key=key
        )
    raise IntegrityError(f"{key} was read back with other bytes than were written", id=str(id), step=id.step, key=key)


def condemn(storage: Storage, id: CheckpointId, store_id: str, reason: str) -> bool:
    """Decide that an unfinished checkpoint never will exist; False if it was committed first.

    Raises:
        StorageError: undecided; nothing may be deleted.
    """
    record = CondemnedRecord(store_id=store_id, id=str(id), created=now(), reason=reason[:1000])
    try:
        storage.create(layout.commit_key(id), seal(record))
    except ExistsError:
        return isinstance(read_fate(storage, id), CondemnedRecord)
    return True


EVICTED = "every backup has it"
"""The reason in the tombstone of a checkpoint that is let go here, and no less there for that."""

RETIRED = "not kept by "
"""How the reason begins in the tombstone of a checkpoint that the rules gave up."""


def tombstone_reason(storage: Storage, id: CheckpointId) -> str | None:
    """Why ``id`` was buried; None where it has no tombstone, "" where that is damaged.

    Raises:
        StorageError: its tombstone can't be read.
    """
    key = layout.tombstone_key(id)
    try:
        return unseal(storage.read(key, limit=SMALL_LIMIT), key, [TombstoneRecord]).reason
    except NotFoundError:
        return None
    except (IntegrityError, FormatError):
        return ""


def is_evicted(storage: Storage, id: CheckpointId) -> bool:
    """Whether ``id``, which has or had a tombstone, was let go because every backup has it, and not deleted.

    Raises:
        StorageError: its tombstone can't be read.
    """
    # Gone meanwhile: all has been let go, or it was brought back.
    return tombstone_reason(storage, id) in (None, EVICTED)


def bury(storage: Storage, id: CheckpointId, store_id: str, reason: str) -> None:
    """Put a tombstone beside the commit record.

    Raises:
        ExistsError: there is one already.
    """
    record = TombstoneRecord(store_id=store_id, id=str(id), created=now(), reason=reason[:1000])
    storage.create(layout.tombstone_key(id), seal(record))
