"""Finding checkpoints: what the register says, and which of them a selector means."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import NoReturn

from ckptstore.engine.backups import Backups
from ckptstore.engine.catalogue import Cache, Catalogue, Checkpoint, read_holds, scan
from ckptstore.engine.commit import is_evicted, read_store
from ckptstore.engine.damage import DamageWarning, all_damaged, as_error, warn_damaged
from ckptstore.engine.select import no_selector, select
from ckptstore.errors import IntegrityError, NotFoundError
from ckptstore.format import layout
from ckptstore.format.layout import CheckpointId
from ckptstore.format.records import StoreRecord
from ckptstore.storage.base import Storage


class Finder:
    """Looks into one store, and remembers the records it has read: they never change."""

    def __init__(self, storage: Storage, backups: Backups | None = None, *, read_only: bool) -> None:
        self.backups = backups or Backups()
        self._storage = storage
        self._read_only = read_only
        self._fates: Cache = {}
        self._store: StoreRecord | None = None
        self._warned = False
        self._elsewhere: Mapping[str, Storage] = {}
        self._deleted: set[CheckpointId] = set()

    def view(self) -> Catalogue:
        """All that there is: what the register says, and what only the backups have.

        Raises:
            NotFoundError: opened read-only, and there is no store.
            StorageError: the storage can't be read completely, or a backup can't where there is nothing else.
        """
        if not self.backups:
            return self.scan()
        record = self.store_record()
        own, store_id = self._scan(afresh=False), record.store_id if record else None
        found = self.backups.merged_into(own, store_id, self.is_evicted)
        if self._read_only and record is None and found.highest is None:
            self.require_store()
        self._elsewhere = found.elsewhere
        return found

    def is_evicted(self, id: CheckpointId) -> bool:
        """Whether ``id``, which has a tombstone here, was let go because every backup has it, and not deleted.

        Raises:
            StorageError: its tombstone can't be read.
        """
        if id not in self._deleted and not is_evicted(self._storage, id):
            # Remembered, as deleted ones are many; the others are few, and soon no more.
            self._deleted.add(id)
        return id not in self._deleted

    def home(self, checkpoint: Checkpoint) -> Storage:
        """Where ``checkpoint`` lies, by the last view."""
        return self._elsewhere.get(checkpoint.id, self._storage)

    def scan(self, *, afresh: bool = False) -> Catalogue:
        """All that the register says of what lies here; ``afresh`` reads every record again.

        Raises:
            NotFoundError: opened read-only, and there is no store.
            StorageError: the storage can't be read completely; never taken for "empty".
        """
        catalogue = self._scan(afresh=afresh)
        empty = not catalogue.checkpoints and not catalogue.damaged
        if self._read_only and empty and self.store_record() is None:
            self.require_store()
        return catalogue

    def _scan(self, *, afresh: bool) -> Catalogue:
        record = self.store_record()
        return scan(self._storage, record.store_id if record else None, {} if afresh else self._fates)

    def select(self, catalogue: Catalogue, selector: str) -> Checkpoint:
        """The checkpoint that ``selector`` means. Damage is warned of, as it may have hidden another.

        Raises:
            NoCheckpointError, NotFoundError, FormatError: as ``select.select``.
            IntegrityError: the one that is meant has a damaged record, or all have.
        """
        if not isinstance(selector, str):
            raise no_selector(selector)
        newest = catalogue.checkpoints[-1] if selector == "latest" and catalogue.checkpoints else None
        warn_damaged(catalogue.damaged, newest)
        plain = ":" not in selector and selector != "latest"
        holds = read_holds(self._storage)[0] if plain else {}
        try:
            return select(catalogue.checkpoints, holds, selector, self._storage.url)
        except NotFoundError:
            wanted = holds.get(selector, selector)
            for damage in catalogue.damaged:
                id = layout.try_id(damage.id or "")
                if id and ((plain and str(id).startswith(wanted)) or selector == f"step:{id.step}"):
                    raise as_error(damage) from None
            if catalogue.damaged and not catalogue.checkpoints:
                raise all_damaged(self._storage.url, {d.key: d.problem for d in catalogue.damaged}) from None
            raise

    def store_record(self) -> StoreRecord | None:
        """``store.json``, or None where it is missing or damaged: the commits carry the store's id too."""
        if self._store is None:
            try:
                self._store = read_store(self._storage)
            except NotFoundError:
                return None
            except IntegrityError as error:
                if not self._warned:
                    warnings.warn(f"{error}; the checkpoints are read without it", DamageWarning, stacklevel=4)
                self._warned = True
                return None
        return self._store

    def require_store(self) -> NoReturn:
        """Say that there is none.

        Raises:
            NotFoundError: always.
        """
        raise NotFoundError(
            f"there is no ckptstore at {self._storage.url}: no store.json and no commits/. Check the path"
        )
