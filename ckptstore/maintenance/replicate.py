"""Copies to a backup, made in the background, in the order of the commits; and back from it, where they are missed."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator

from ckptstore.engine.backups import Backup
from ckptstore.engine.catalogue import Checkpoint
from ckptstore.engine.commit import ensure_store
from ckptstore.engine.finder import Finder
from ckptstore.errors import (
    CheckpointError,
    CommitUnknownError,
    FormatError,
    IntegrityError,
    NotFoundError,
    SaveFailedError,
    StaleWriterError,
    StorageError,
    UnavailableError,
)
from ckptstore.format.records import StoreRecord
from ckptstore.maintenance import receipts
from ckptstore.maintenance.copy import Copier, Method
from ckptstore.maintenance.keep import is_buried
from ckptstore.maintenance.lent import recorded_ids
from ckptstore.maintenance.transfer import Carrier
from ckptstore.storage.base import Storage

_log = logging.getLogger("ckptstore")

_PAUSE_S = (1.0, 60.0)
"""Between one try and the next while a backup can't be reached: at first, and at most."""

_LOOK_S = 1.0
"""How long is waited at a time: Ctrl-C, pressed just before a thread begins to wait, is noticed only after that."""

Right = Callable[[], tuple[StoreRecord, int | None] | None]
"""The store and this run's number as a writer, None in it where several runs share the store; None before a save."""


class Replicator:
    """Brings to one backup what it lacks. Its thread begins with the first ``wake``, and is a daemon.

    Args:
        storage, finder: the primary.
        right: see ``Right``; nothing is copied to the backup before there is one.
        copied: called after each round that left nothing to copy.
    """

    def __init__(
        self,
        storage: Storage,
        finder: Finder,
        backup: Backup,
        carrier: Carrier,
        right: Right,
        copied: Callable[[], None] = lambda: None,
    ) -> None:
        self._storage, self._finder, self._backup = storage, finder, backup
        self._carrier, self._right, self._on_copied = carrier, right, copied
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._awake = self._ending = self._over = self._away = False
        self._begun = self._done = self._waiting = 0
        # No thread goes on in a fork, and the lock may have been held when it began.
        self._pid = os.getpid()
        self._error: CheckpointError | None = None
        self._there: set[str] = set()
        self._hopeless: dict[str, CheckpointError] = {}
        self._missed: list[Checkpoint] = []
        self._stale: StaleWriterError | None = None

    @property
    def url(self) -> str:
        return self._backup.url

    @property
    def storage(self) -> Storage:
        """The backup."""
        return self._backup.storage

    def wake(self) -> None:
        """Something was committed: look what is to be copied. Nothing happens in a fork."""
        if os.getpid() != self._pid:
            return
        with self._changed:
            self._awake = True
            if self._thread is None and not self._ending:
                self._thread = threading.Thread(target=self._run, name="ckptstore-backup", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def bring_back(self, checkpoints: list[Checkpoint]) -> None:
        """Copy ``checkpoints`` from the backup to the primary, which lacks them, in this order."""
        if os.getpid() != self._pid:
            return
        with self._changed:
            waiting = {c.id for c in self._missed}
            self._missed += [c for c in checkpoints if c.id not in waiting]
        self.wake()

    def wait_for(self, id: str) -> None:
        """Return when the backup has ``id``.

        Raises:
            UnavailableError: a try to copy it failed, which will be made again; on the primary it is safe.
            StaleWriterError: a newer run has claimed the backup.
            IntegrityError, SaveFailedError, StorageError: it never will be there.
        """
        with self._changed:
            # The round that goes on may have looked before ``id`` was committed; the one that was asked for will see.
            due = self._begun + (1 if self._awake else 0)
            self._waiting += 1
            self._changed.notify_all()
            try:
                while not self._changed.wait_for(lambda: self._is_settled(id, due), timeout=_LOOK_S):
                    pass
            finally:
                self._waiting -= 1
            if id not in self._there:
                raise self._why_not(id)

    def _why_not(self, id: str) -> CheckpointError:
        if known := self._stale or self._hopeless.get(id):
            return known
        if self._error is not None or self._over:
            why = self._error or "the store was closed"
            return UnavailableError(
                f"{id} is saved, but not yet in {self.url}, to which it will be copied later: {why}", id=id
            )
        return StorageError(f"{id} was saved, but isn't copied to {self.url}: it was deleted here or there", id=id)

    def end(self) -> None:
        """Copy what is left, as long as the backup takes it, and then no more. Returns at once; see ``join``."""
        with self._changed:
            self._ending = self._awake = True
            self._changed.notify_all()

    def join(self) -> None:
        """Return when all has ended."""
        while self._thread is not None and self._thread.is_alive():
            self._thread.join(_LOOK_S)
        if self._error is not None:
            _log.warning("the backup %s lacks checkpoints; the next run that saves copies them", self.url)

    def _is_settled(self, id: str, due: int) -> bool:
        known = id in self._there or id in self._hopeless or self._stale is not None
        return known or self._done >= due or self._over or self._thread is None

    # -- its thread --------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._work()
        finally:
            with self._changed:
                self._over = True
                self._changed.notify_all()

    def _work(self) -> None:
        pause = 0.0
        while self._begins(pause):
            try:
                self._round()
            except StaleWriterError as error:
                self._end_stale(error)
                return
            except Exception as error:
                pause = min(_PAUSE_S[1], max(_PAUSE_S[0], 2 * pause))
                # Of whatever kind: somebody may be waiting.
                self._failed(error if isinstance(error, CheckpointError) else StorageError(repr(error)), pause)
            else:
                pause = 0.0
                self._succeeded()

    def _begins(self, pause: float) -> bool:
        """Wait until there is something to do; False at the end."""
        with self._changed:
            if pause:
                self._changed.wait_for(lambda: self._ending or self._waiting > 0, timeout=pause)
            else:
                self._changed.wait_for(lambda: self._awake or self._ending)
            if self._ending and (pause or not self._awake):
                return False
            self._awake = False
            self._begun += 1
            return True

    def _succeeded(self) -> None:
        with self._changed:
            was_away = self._away or self._error is not None
            self._error, self._away = None, False
            self._done += 1
            self._changed.notify_all()
        if was_away:
            _log.warning("the backup %s is reached again, and has all checkpoints now", self.url)

    def _failed(self, error: CheckpointError, pause: float) -> None:
        # Nor do saves wait for it now. Where one of them noticed before, it was told already.
        news = self._backup.lose() if isinstance(error, UnavailableError) else self._backup.reachable
        with self._changed:
            first, self._error = self._error is None, error
            self._done += 1
            self._awake = True
            self._changed.notify_all()
        if first and news:
            _log.warning("copying to the backup %s failed, and is tried again every %g s: %s", self.url, pause, error)

    def _end_stale(self, error: StaleWriterError) -> None:
        _log.warning("nothing more is copied to the backup %s: %s", self.url, error)
        # So that the next save asks it, and is told the same.
        self._backup.reachable = True
        with self._changed:
            self._stale = error
            self._changed.notify_all()

    def _round(self) -> None:
        """Bring the backup, and the primary, up to date.

        Raises:
            StaleWriterError: a newer run has claimed the backup.
            CheckpointError: one of the two failed; what was copied stays.
        """
        self._refill()
        right = self._right()
        if right is None:
            return
        store, number = right
        self._admit(store, number)
        for checkpoint in self._lacking(store):
            self._copy(checkpoint, number)
        self._on_copied()

    def _admit(self, store: StoreRecord, number: int | None) -> None:
        if number is not None:
            self._backup.claim(store, number)
        else:
            self._backup.admit(store)
        self._away = self._away or not self._backup.reachable
        self._backup.reachable = True

    def _lacking(self, store: StoreRecord) -> Iterator[Checkpoint]:
        """What is to be copied, oldest first; receipts are given for what is there already."""
        own, theirs = self._finder.scan(), self._backup.scan(store.store_id)
        there = {c.order for c in theirs.checkpoints}
        with_receipt = receipts.given(self._storage, self.url)
        given_up = (recorded_ids(theirs) | theirs.graves) - there
        for checkpoint in own.checkpoints:
            if checkpoint.order in there:
                self._note(checkpoint, "found", checkpoint.order in with_receipt)
            elif checkpoint.order not in given_up and checkpoint.id not in self._hopeless:
                yield checkpoint

    def _copy(self, checkpoint: Checkpoint, number: int | None) -> None:

        def fence() -> None:
            if number is not None:
                self._backup.check_fence(number)

        try:
            done = Copier(self._storage, self._backup.storage, self._carrier, fence).copy(checkpoint)
        except StaleWriterError:
            raise
        except CheckpointError as error:
            if getattr(error, "transient", False):
                raise
            # A newer run may have copied it itself, and let it go here: that is no damage.
            fence()
            if not self._is_hopeless(checkpoint, error):
                raise
            return
        self._note(checkpoint, done.method, False)

    def _is_hopeless(self, checkpoint: Checkpoint, error: CheckpointError) -> bool:
        """Whether another try can't help, and the checkpoints after it needn't wait for it."""
        if is_buried(self._storage, checkpoint):
            # Deleted while it was copied.
            return True
        if isinstance(error, StorageError | CommitUnknownError):
            return False
        _log.error("%s can't be copied to the backup %s: %s", checkpoint.id, self.url, error)
        with self._changed:
            self._hopeless[checkpoint.id] = error
            self._changed.notify_all()
        return True

    def _note(self, checkpoint: Checkpoint, method: Method, has_receipt: bool) -> None:
        if not has_receipt:
            try:
                receipts.give(self._storage, self.url, checkpoint, method)
            except StorageError as error:
                # No room, as it may be: the next round gives it, and what was copied may make room until then.
                _log.warning("the receipt of %s for %s couldn't be written: %s", self.url, checkpoint.id, error)
        with self._changed:
            self._there.add(checkpoint.id)
            self._changed.notify_all()

    def _refill(self) -> None:
        """Bring back to the primary what was asked for."""
        while self._missed:
            checkpoint = self._missed[0]
            try:
                # Its own store.json may be damaged.
                ensure_store(self._storage, known_id=checkpoint.record.store_id, like=self._backup.store_record())
                Copier(self._backup.storage, self._storage, self._carrier).copy(checkpoint)
                receipts.give(self._storage, self.url, checkpoint, "found")
            except (IntegrityError, FormatError, SaveFailedError, NotFoundError) as error:
                _log.error("%s can't be brought back from %s: %s", checkpoint.id, self.url, error)
            with self._changed:
                self._missed.remove(checkpoint)
