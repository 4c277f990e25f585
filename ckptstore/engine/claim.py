"""The right to save: a writer's number, its fence, and the ids that follow from them."""

from __future__ import annotations

from collections.abc import Callable

from ckptstore.engine.backups import Backups
from ckptstore.engine.catalogue import Catalogue
from ckptstore.engine.commit import check_fence, claim_writer, ensure_store, try_out, writers
from ckptstore.errors import StorageError
from ckptstore.format import layout
from ckptstore.format.layout import CheckpointId
from ckptstore.format.records import StoreRecord
from ckptstore.storage.base import Storage

_ROUNDS = 100


class Claim:
    """One process's claim on a store. Taken at the first save: opening and looking disturb nobody.

    Attributes:
        number: the writer's number, or None before the first save.
    """

    def __init__(self, storage: Storage, backups: Backups, *, shared: bool) -> None:
        self.number: int | None = None
        self._storage, self._backups = storage, backups
        self._shared = shared
        self._sequence = 0
        self._store: StoreRecord | None = None
        self._tried = False

    @property
    def right(self) -> tuple[StoreRecord, int | None] | None:
        """The store and this writer's number, None in it where several processes share it; None before a save."""
        if self._store is None or self.number is None:
            return None
        return self._store, None if self._shared else self.number

    def next_id(
        self, step: int, scan: Callable[[], Catalogue], *, look: bool = True
    ) -> tuple[StoreRecord, CheckpointId]:
        """The store and the id of the next save; ``scan`` tells what is there already.

        Without ``look`` the fence is left to the commit, which spares a request.

        Raises:
            StaleWriterError: a newer writer owns the store.
        """
        just_taken = False
        if self._store is None or self.number is None or self._shared:
            just_taken = self.number is None
            self._store, self.number = self._take(scan())
        if look and not just_taken:
            # One that was just taken is the newest.
            self.check_fence()
        self._sequence += 1
        return self._store, layout.new_id(self.number, self._sequence, step)

    def check_fence(self) -> None:
        """Nothing, as long as no newer writer has claimed the store (StaleWriterError)."""
        if not self._shared and self.number is not None:
            check_fence(self._storage, self.number)
            self._backups.check_fence(self.number)

    def try_out(self) -> None:
        """Learn what the storage can do, once. By each process that changes it, as another server may answer now.

        Raises:
            StorageError: it failed, or can't do what nothing works without.
        """
        self._tried = self._tried or try_out(self._storage)

    def _known(self, catalogue: Catalogue) -> StoreRecord | None:
        try:
            return self._backups.store_record()
        except StorageError:
            if catalogue.store_id is None:
                raise
            return None

    def _take(self, catalogue: Catalogue) -> tuple[StoreRecord, int]:
        store = ensure_store(self._storage, known_id=catalogue.store_id, like=self._known(catalogue))
        highest = catalogue.highest
        self._sequence = max(self._sequence, highest.seq if highest else 0)
        numbers = writers(self._storage) if self._shared else []
        if numbers:
            # At every save: of several that began at once each may have claimed a number, and the newest counts.
            return store, numbers[-1]
        if self.number is not None:
            return store, self.number
        self.try_out()
        above = max(self._backups.highest_writer(), highest.writer if highest else 0)
        for _ in range(_ROUNDS):
            above = claim_writer(self._storage, store.store_id, above=above)
            if self._shared or self._backups.claim(store, above):
                return store, above
        raise StorageError(f"{self._storage.url}: other writers took every number tried in the backups")
