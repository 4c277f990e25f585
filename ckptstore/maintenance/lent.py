"""Which files of one checkpoint others borrow: those must outlive it."""

from __future__ import annotations

from collections.abc import Iterable

from ckptstore.engine.catalogue import Catalogue, Checkpoint
from ckptstore.engine.contents import read_contents
from ckptstore.errors import FormatError, IntegrityError
from ckptstore.format import layout
from ckptstore.format.layout import CheckpointId, parse_id
from ckptstore.format.records import CommitRecord
from ckptstore.storage.base import Storage


class Lent:
    """What the commits in ``catalogue`` borrow; the buried ones too, which can be brought back.

    Only a catalogue that was scanned after an id's commit record was gone tells what of that id may be removed: who
    committed before is in it, and who commits after sees that the record is gone, and gives way.
    """

    def __init__(self, storage: Storage, catalogue: Catalogue) -> None:
        self._storage = storage
        self._newest_damaged = max(damaged_ids(catalogue), default=None)
        self._borrowers: dict[CheckpointId, list[Checkpoint]] = {}
        for checkpoint in sorted((*catalogue.checkpoints, *catalogue.buried), key=lambda c: c.order, reverse=True):
            for lender in checkpoint.record.lenders:
                self._borrowers.setdefault(parse_id(lender), []).append(checkpoint)
        self._borrowed: dict[str, frozenset[str] | None] = {}

    def is_unknown(self, id: CheckpointId) -> bool:
        """Whether a damaged commit record may list ``id``.

        Nobody borrows from what was saved after it, so only ids before the newest damaged one may be in it. They are
        left alone, whatever they are, until somebody has put that record back or moved it away.
        """
        return self._newest_damaged is not None and id < self._newest_damaged

    def among(self, id: CheckpointId, keys: Iterable[str]) -> set[str]:
        """Those of ``keys``, which lie in the folder of ``id``, that must stay for others.

        Raises:
            StorageError: a borrower can't be read; that is no damage, and nothing may be removed.
        """
        keys = set(keys)
        if self.is_unknown(id):
            return keys
        data = {key for key in keys if layout.is_data_file(key)}
        lent: set[str] = set()
        for borrower in self._borrowers.get(id, ()):
            # The newest of a long run needs all that is left of the first: no other one's parts are read then.
            if lent == data:
                break
            borrowed = self._of(borrower)
            if borrowed is None:
                return keys
            lent |= borrowed & data
        return lent

    def _of(self, borrower: Checkpoint) -> frozenset[str] | None:
        """The keys that it borrows; None where its damage hides them."""
        if borrower.id not in self._borrowed:
            try:
                self._borrowed[borrower.id] = frozenset(borrowed_keys(self._storage, borrower.record))
            except (IntegrityError, FormatError):
                self._borrowed[borrower.id] = None
        return self._borrowed[borrower.id]


def borrowed_keys(storage: Storage, commit: CommitRecord) -> list[str]:
    """The data files that a checkpoint needs from the folders of others.

    Raises:
        IntegrityError, FormatError: its manifest or a part is damaged or malformed.
    """
    files = [file for part in read_contents(storage, commit).parts for file in part.files]
    return [file.key for file in files if file.owner != commit.id]


def damaged_ids(catalogue: Catalogue) -> set[CheckpointId]:
    """The ids whose records in commits/ can't be read."""
    return {id for damage in catalogue.damaged if damage.id and (id := layout.try_id(damage.id))}


def recorded_ids(catalogue: Catalogue) -> set[CheckpointId]:
    """Every id that has a record in commits/, of whatever kind."""
    committed = {checkpoint.order for checkpoint in (*catalogue.checkpoints, *catalogue.buried)}
    return committed | catalogue.condemned | damaged_ids(catalogue)
