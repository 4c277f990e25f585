"""The other places that a store is copied to, as saving and looking need them: what they hold, and who may save."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

from ckptstore.engine.bounded import within
from ckptstore.engine.catalogue import Cache, Catalogue, scan
from ckptstore.engine.commit import (
    check_fence,
    claim_number,
    ensure_store,
    read_store,
    try_out,
    writer_record,
    writers,
)
from ckptstore.errors import IntegrityError, NotFoundError, StaleWriterError, StorageError, UnavailableError
from ckptstore.format.layout import CheckpointId
from ckptstore.format.records import StoreRecord
from ckptstore.storage.base import Storage

T = TypeVar("T")

_log = logging.getLogger("ckptstore")

GLANCE_S = 10.0
"""How long a save or a look waits for a backup, in seconds. Copying itself has more patience."""


class ForeignStoreError(StorageError):
    """The place holds another store: waiting won't help."""


@dataclass
class Backup:
    """One of them.

    Attributes:
        reachable: whether it answered when it was asked last. Saves don't wait for one that didn't, until it was
            reached in the background.
    """

    storage: Storage
    reachable: bool = True
    _fates: Cache = field(default_factory=dict)
    _store: StoreRecord | None = None
    _claims: dict[int, bytes] = field(default_factory=dict)
    _claimed: int | None = None
    _rival: tuple[int, StaleWriterError] | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def url(self) -> str:
        return self.storage.url

    def store_record(self) -> StoreRecord | None:
        """Its ``store.json``; None where there is none that can be read."""
        if self._store is None:
            try:
                self._store = read_store(self.storage)
            except (NotFoundError, IntegrityError):
                return None
        return self._store

    def scan(self, store_id: str | None) -> Catalogue:
        """What it holds.

        Raises:
            StorageError: it holds another store's checkpoints, or can't be read.
        """
        record = self.store_record()
        if record is not None and store_id is not None and record.store_id != store_id:
            raise self._foreign(record.store_id, store_id)
        return scan(self.storage, store_id or (record.store_id if record else None), self._fates)

    def admit(self, store: StoreRecord) -> None:
        """Have it be a copy of ``store``.

        Raises:
            StorageError: it holds another store, or failed.
        """
        found = ensure_store(self.storage, like=store)
        if found.store_id != store.store_id:
            raise self._foreign(found.store_id, store.store_id)
        try_out(self.storage)

    def claim(self, store: StoreRecord, number: int) -> None:
        """Be writer ``number`` there, too, and the newest.

        Raises:
            StaleWriterError: another run is it, or a newer one.
            StorageError: it holds another store, or failed.
        """
        self.check_rival(number)
        if self._claimed != number:
            self.admit(store)
            check_fence(self.storage, number)
            # The same bytes at every try: one that nobody waited for any more may have succeeded.
            data = self._claims.setdefault(number, writer_record(store.store_id, number))
            if not claim_number(self.storage, number, data):
                error = StaleWriterError(f"{self.url}: writer {number} there is another run than this one")
                self._rival = number, error
                raise error
            self._claimed = number
        check_fence(self.storage, number)

    def check_rival(self, number: int) -> None:
        """Nothing, unless another run was found to be writer ``number`` there (StaleWriterError)."""
        if self._rival is not None and self._rival[0] == number:
            raise self._rival[1]

    def check_fence(self, number: int) -> None:
        """Nothing, as long as ``number`` is the newest writer there (StaleWriterError)."""
        check_fence(self.storage, number)

    def lose(self) -> bool:
        """It doesn't answer; whether that is news."""
        with self._lock:
            news, self.reachable = self.reachable, False
        return news

    def _foreign(self, found: str, wanted: str) -> StorageError:
        return ForeignStoreError(
            f"{self.url} holds another store ({found}) than the one that is to be copied there ({wanted}): "
            "give each run's copy a place of its own"
        )


class Backups:
    """All of one store.

    Attributes:
        all: in the order in which they are asked.
    """

    def __init__(self, storages: Sequence[Storage] = ()) -> None:
        self.all = [Backup(storage) for storage in storages]

    def __bool__(self) -> bool:
        return bool(self.all)

    @property
    def storages(self) -> list[Storage]:
        return [backup.storage for backup in self.all]

    def merged_into(
        self, own: Catalogue, store_id: str | None, is_evicted: Callable[[CheckpointId], bool]
    ) -> Catalogue:
        """``own``, and with it what is only in a backup: the primary was lost, or has let it go.

        Args:
            store_id: the store's, where it is known.
            is_evicted: whether a tombstone is of one that was let go, and not deleted.

        Raises:
            UnavailableError: one can't be reached, and ``own`` has nothing: that must not be taken for "empty".
            StorageError: one holds another store.
        """
        lost_all = not own.checkpoints
        for backup in self.all:
            look = partial(Backup.scan, store_id=store_id or own.store_id)
            try:
                theirs = _ask(backup, look, "listing")
            except StorageError as error:
                if lost_all or isinstance(error, ForeignStoreError):
                    raise
                _missed(backup, error)
                continue
            backup.reachable = True
            own = merge(own, theirs, backup.storage, is_evicted)
        return own

    def store_record(self) -> StoreRecord | None:
        """The first ``store.json`` that one of those has that answered when they were asked last.

        Raises:
            StorageError: one can't be read.
        """
        records = (_ask(backup, Backup.store_record, "reading") for backup in self.all if backup.reachable)
        return next((record for record in records if record is not None), None)

    def highest_writer(self) -> int:
        """The newest number that any of those that can be reached has seen; 0 for none."""
        return max(self._ask_all(lambda it: max(writers(it.storage), default=0)), default=0)

    def check_fence(self, number: int) -> None:
        """Nothing, unless one that can be reached knows of a newer writer (StaleWriterError)."""
        for backup in self.all:
            backup.check_rival(number)
        # Whatever is wrong there: a save has all that it needs without it.
        self._ask_all(lambda it: it.check_fence(number), missable=StorageError)

    def claim(self, store: StoreRecord, number: int) -> bool:
        """Be writer ``number`` in all that can be reached; False if another run is it, or a newer one."""
        try:
            self._ask_all(lambda it: it.claim(store, number))
        except StaleWriterError:
            return False
        return True

    def _ask_all(self, question: Callable[[Backup], T], missable: type[StorageError] = UnavailableError) -> list[T]:
        answers = []
        for backup in self.all:
            if backup.reachable:
                try:
                    answers.append(_ask(backup, question, "asking for the writers of"))
                except missable as error:
                    _missed(backup, error)
        return answers


def _ask(backup: Backup, question: Callable[[Backup], T], doing: str) -> T:
    return within(GLANCE_S, lambda: question(backup), f"{doing} {backup.url}")


def _missed(backup: Backup, error: StorageError) -> None:
    if backup.lose():
        # No Python warning: where those are errors, it would fail a save that has all it needs.
        _log.warning("the backup %s can't be reached, and is waited for in the background: %s", backup.url, error)


def merge(own: Catalogue, theirs: Catalogue, storage: Storage, is_evicted: Callable[[CheckpointId], bool]) -> Catalogue:
    """``own`` with the checkpoints that only ``theirs`` has, which lie in ``storage``.

    One that was deleted here stays so; not one that is being let go, or was when the process was killed. One whose
    record is damaged here is taken from there.
    """
    known = {c.order for c in own.checkpoints}
    others = [c for c in theirs.checkpoints if c.order not in known]
    more = [c for c in others if c.order not in own.graves or is_evicted(c.order)]
    if not more:
        return own
    found = {c.id for c in more}
    return replace(
        own,
        checkpoints=sorted((*own.checkpoints, *more), key=lambda c: c.order),
        buried=[c for c in own.buried if c.id not in found],
        damaged=[damage for damage in own.damaged if damage.id not in found],
        highest=max(filter(None, (own.highest, theirs.highest)), default=None),
        elsewhere={**own.elsewhere, **{c.id: storage for c in more}},
    )
