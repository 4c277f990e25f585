"""Have only what the rules keep stay, after each save."""

from __future__ import annotations

import logging
import threading
import time

from ckptstore.engine.claim import Claim
from ckptstore.engine.finder import Finder
from ckptstore.errors import CheckpointError, UnavailableError
from ckptstore.format import layout
from ckptstore.maintenance.evict import LOCK_S, evict
from ckptstore.maintenance.lent import recorded_ids
from ckptstore.maintenance.retire import crowded, judged, reclaim, refuse_many, retire, retired
from ckptstore.policy.retention import Keep
from ckptstore.storage.base import Storage

_log = logging.getLogger("ckptstore")

_TOMBSTONE_S = 24 * 3600.0
"""How long tombstones of what this process saved, and gave up, stay: longer than any request of its own is under way.
Those of others stay until ``prune`` takes them."""


class Retainer:
    """Applies ``keep`` to the store of one process.

    Args:
        lock: keeps this process's saves away while something is removed.
        trash_s: for how many seconds what went can be brought back, and takes up space, as far as there is room.
    """

    def __init__(
        self, storage: Storage, finder: Finder, claim: Claim, lock: threading.RLock, keep: Keep, trash_s: float
    ) -> None:
        self._storage, self._finder, self._claim, self._lock = storage, finder, claim, lock
        self._keep, self._trash_s = keep, trash_s
        self._told = ""

    def saved(self) -> None:
        """Let go of what isn't kept, now that a checkpoint was committed. Never fails: what it was called for is done.

        Where a save of this process goes on for long, nothing is removed this time.
        """
        if not self._lock.acquire(timeout=LOCK_S):
            return
        try:
            self._claim.check_fence()
            self._retire()
        except CheckpointError as error:
            self._tell(error)
        else:
            self._told = ""
        finally:
            self._lock.release()

    def copied(self) -> None:
        """Make room here, after a backup has got all there is.

        Raises:
            StaleWriterError: whoever was replaced has nothing to say here any more.
            StorageError: the primary failed.
        """
        # Where one is away, not every backup has it; and one that never answers would keep the others waiting.
        if not all(backup.reachable for backup in self._finder.backups.all):
            return
        self._claim.check_fence()
        try:
            evict(self._storage, self._finder, self._keep, self._lock)
        except UnavailableError:
            pass
        except CheckpointError as error:
            self._tell(error)

    def _retire(self) -> None:
        catalogue = self._finder.scan()
        judgement = judged(self._storage, catalogue, self._keep)
        refuse_many(judgement, self._storage.url, self._keep)
        if not retire(self._storage, catalogue, judgement, self._keep) and not catalogue.graves:
            return
        # Listed after burying: what is reclaimed at once is in it.
        entries, catalogue = list(self._storage.list(layout.TRASH)), self._finder.scan()
        now = time.time()
        due = retired(self._storage, catalogue, entries, now - self._trash_s if self._trash_s else float("inf"))
        if self._keep.limit_bytes is not None:
            due |= crowded(self._storage, catalogue, entries, self._keep.limit_bytes)
        if due:
            reclaim(self._storage, catalogue, due)
        old = {layout.record_id(entry.key) for entry in entries if entry.modified < now - _TOMBSTONE_S}
        own = {id for id in old if id is not None and id.writer == self._claim.number}
        self._storage.delete([layout.tombstone_key(id) for id in sorted(own - recorded_ids(catalogue) - due)])

    def _tell(self, error: CheckpointError) -> None:
        if str(error) != self._told:
            self._told = str(error)
            _log.warning(
                "nothing was let go under keep=%s, which is tried again after the next save: %s", self._keep, error
            )
