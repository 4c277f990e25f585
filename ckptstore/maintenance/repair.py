"""Make a storage whole again with what its backups have."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass

from ckptstore.engine.catalogue import Checkpoint, Damage
from ckptstore.engine.commit import parse_fate, read_fate
from ckptstore.engine.rescue import Rescuer
from ckptstore.errors import CheckpointError, FormatError, IntegrityError, NotFoundError, StorageError
from ckptstore.format import layout
from ckptstore.format.records import SMALL_LIMIT, CommitRecord, StoreRecord, unseal
from ckptstore.maintenance.heal import Healer
from ckptstore.maintenance.transfer import Carrier
from ckptstore.storage.base import Storage


def is_there(storage: Storage, checkpoint: Checkpoint) -> bool:
    """Whether it is committed in ``storage`` even now: what was taken away while it was read is no damage.

    Raises:
        StorageError: the storage failed.
    """
    try:
        return isinstance(read_fate(storage, checkpoint.order), CommitRecord)
    except NotFoundError:
        return False
    except (IntegrityError, FormatError):
        return True


@dataclass(frozen=True)
class Repairer:
    """Repairs ``storage`` from ``others``, which are asked in order."""

    storage: Storage
    others: Sequence[Storage]
    carrier: Carrier

    @property
    def _healer(self) -> Healer:
        return Healer(self.storage, self.carrier)

    def noted(self, rescuer: Rescuer) -> list[CheckpointError]:
        """Repair all that ``rescuer`` met; what can't be repaired, as errors."""
        failures: list[CheckpointError] = []
        for key, data in rescuer.records.items():
            try:
                self._healer.record(key, data)
            except CheckpointError as error:
                failures.append(error)
        with closing(Rescuer(self.others)) as fresh:
            for patient in rescuer.files.values():
                try:
                    self._healer.file(patient.contents, patient.file, self.storage, fresh)
                except CheckpointError as error:
                    failures.append(error)
        return failures

    def records(self, damaged: Iterable[Damage], store_id: str | None) -> list[Damage]:
        """Repair what of ``damaged`` is a commit record, or store.json, that is good elsewhere; which were."""
        repaired = []
        for damage in damaged:
            data = self._good(damage.key, store_id)
            if data is not None:
                self._healer.record(damage.key, data)
                repaired.append(damage)
        return repaired

    def _good(self, key: str, store_id: str | None) -> bytes | None:
        for other in self.others:
            with suppress(NotFoundError, IntegrityError, FormatError, StorageError):
                data = other.read(key, limit=SMALL_LIMIT)
                if _store_of(key, data) == store_id or (store_id is None and key == layout.STORE):
                    return data
        return None


def _store_of(key: str, data: bytes) -> str | None:
    """The store that a sealed commit record or store.json belongs to; None for what is something else.

    Raises:
        IntegrityError, FormatError: it is damaged.
    """
    if key == layout.STORE:
        return unseal(data, key, [StoreRecord]).store_id
    if key.startswith(layout.COMMITS):
        fate = parse_fate(data, key)
        # One that was condemned there may have been committed here.
        return fate.store_id if isinstance(fate, CommitRecord) else None
    return None
