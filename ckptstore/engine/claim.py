"""The right to save: a writer's number, its fence, and the ids that follow from them."""

from __future__ import annotations

import logging
from collections.abc import Callable

from ckptstore.engine.catalogue import Catalogue
from ckptstore.engine.commit import check_fence, claim_writer, ensure_store, writers
from ckptstore.errors import FormatError, IntegrityError, NotFoundError
from ckptstore.format import layout
from ckptstore.format.layout import CheckpointId
from ckptstore.format.records import SMALL_LIMIT, StoreRecord
from ckptstore.storage.base import Storage

_log = logging.getLogger("ckptstore")


class Claim:
    """One process's claim on a store. Taken at the first save: opening and looking disturb nobody.

    Attributes:
        number: the writer's number, or None before the first save.
    """

    def __init__(self, storage: Storage, *, shared: bool) -> None:
        self.number: int | None = None
        self._storage = storage
        self._shared = shared
        self._sequence = 0
        self._store: StoreRecord | None = None

    def next_id(self, step: int, scan: Callable[[], Catalogue]) -> tuple[StoreRecord, CheckpointId]:
        """The store and the id of the next save; ``scan`` tells what is there already.

        Raises:
            StaleWriterError: a newer writer owns the store.
        """
        if self._store is None or self.number is None or self._shared:
            self._store, self.number = self._take(scan())
        self.check_fence()
        self._sequence += 1
        return self._store, layout.new_id(self.number, self._sequence, step)

    def check_fence(self) -> None:
        """Nothing, as long as no newer writer has claimed the store (StaleWriterError)."""
        if not self._shared and self.number is not None:
            check_fence(self._storage, self.number)

    def _take(self, catalogue: Catalogue) -> tuple[StoreRecord, int]:
        store = ensure_store(self._storage, known_id=catalogue.store_id)
        highest = catalogue.highest
        self._sequence = max(self._sequence, highest.seq if highest else 0)
        numbers = writers(self._storage) if self._shared else []
        if numbers:
            # At every save: of several that began at once each may have claimed a number, and the newest counts.
            return store, numbers[-1]
        if self.number is not None:
            return store, self.number
        self._try_out()
        return store, claim_writer(self._storage, store.store_id, above=highest.writer if highest else 0)

    def _try_out(self) -> None:
        """Learn what the storage can do. By each process that saves, as another server may answer now."""
        try:
            data = self._storage.read(layout.STORE, limit=SMALL_LIMIT)
        except (NotFoundError, FormatError, IntegrityError):
            return
        self._storage.probe(layout.STORE, data)
        if not self._storage.capabilities.exclusive_create:
            _log.warning(
                "%s doesn't refuse to create what exists (If-None-Match). Checkpoints there are whole and checked all "
                "the same; but a run that was replaced may notice late, and prune leaves unfinished saves alone for "
                "7 days. 'ckptstore doctor' tells what holds",
                self._storage.url,
            )
