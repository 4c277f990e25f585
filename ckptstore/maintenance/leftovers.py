"""What lies in a store and belongs to no checkpoint: what killed saves and deletions left, and what is not ours."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ckptstore.engine.catalogue import Catalogue
from ckptstore.format import layout
from ckptstore.format.layout import CheckpointId
from ckptstore.maintenance.lent import Lent, damaged_ids
from ckptstore.storage.base import Entry, is_key


@dataclass(frozen=True)
class Leftover:
    """Files of an id that no commit record stands for, and that nobody borrows.

    Attributes:
        id: the id, or None for temporary objects outside checkpoint folders.
        files, stored_bytes: how much lies there.
        modified: the newest file's time, seconds since 1970 by the storage's clock.
    """

    id: str | None
    keys: Sequence[str]
    stored_bytes: int
    modified: float

    @property
    def order(self) -> CheckpointId | None:
        """The id, taken apart."""
        return layout.try_id(self.id) if self.id else None

    @property
    def name(self) -> str:
        """The id, or else the first of the keys."""
        return self.id or self.keys[0]


def find_leftovers(entries: Iterable[Entry], catalogue: Catalogue, lent: Lent) -> tuple[list[Leftover], list[str]]:
    """What can be collected, by id, and what is not ckptstore's at all.

    Raises:
        StorageError: who borrows what can't be read.
    """
    unclaimed, foreign = _sort(entries, catalogue)
    leftovers = []
    for id, found in unclaimed.items():
        kept = lent.among(id, (entry.key for entry in found)) if id else ()
        left = [entry for entry in found if entry.key not in kept]
        if left:
            size, modified = sum(entry.size for entry in left), max(entry.modified for entry in left)
            leftovers.append(Leftover(str(id) if id else None, [entry.key for entry in left], size, modified))
    return leftovers, foreign


def _sort(entries: Iterable[Entry], catalogue: Catalogue) -> tuple[dict[CheckpointId | None, list[Entry]], list[str]]:
    known = {c.order for c in (*catalogue.checkpoints, *catalogue.buried)} | damaged_ids(catalogue)
    unclaimed: dict[CheckpointId | None, list[Entry]] = {}
    foreign = []
    for entry in entries:
        id = layout.folder_id(entry.key)
        if not is_key(entry.key.removesuffix("/")):
            # A file server's .nfs0001, a desktop's .DS_Store: no storage could be asked to delete it.
            foreign.append(entry.key)
        elif entry.key.rstrip("/").rpartition("/")[2].startswith(layout.TEMPORARY):
            unclaimed.setdefault(None if id in known else id, []).append(entry)
        elif id is not None and id not in known:
            unclaimed.setdefault(id, []).append(entry)
        elif not _ours(entry.key, id):
            foreign.append(entry.key)
    return unclaimed, foreign


def _ours(key: str, id: CheckpointId | None) -> bool:
    if id is not None:
        name = key.removeprefix(layout.folder(id))
        return name == "manifest.json" or name.startswith("part-") or layout.is_data_file(key)
    top = key.partition("/")[0] + "/"
    if key == layout.STORE or (key.endswith("/") and top in _FOLDERS):
        return True
    named = layout.record_id(key) or layout.receipt_id(key) or layout.copying_id(key)
    named_otherwise = layout.writer_number(key) or layout.hold_name(key) or layout.is_verification(key)
    return bool(named or named_otherwise) or top == layout.CONTROL


_FOLDERS = {
    *(layout.WRITERS, layout.COMMITS, layout.CHECKPOINTS, layout.HOLDS, layout.TRASH, layout.CONTROL),
    *(layout.RECEIPTS, layout.COPYING, layout.VERIFICATIONS),
}
