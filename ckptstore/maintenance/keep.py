"""Bury and bring back, hold and release.

A hold and a burial of the same checkpoint may race. Each side first writes its own record and then looks for
the other's, so at least one of them sees the other and gives way; no lock and no clock is needed.
"""

from __future__ import annotations

from collections.abc import Sequence

from ckptstore.engine import commit
from ckptstore.engine.catalogue import Checkpoint, read_holds
from ckptstore.engine.commit import read_fate
from ckptstore.engine.select import listed
from ckptstore.errors import CheckpointError, ExistsError, FormatError, IntegrityError, NotFoundError
from ckptstore.format import layout
from ckptstore.format.records import HoldRecord, now, seal
from ckptstore.maintenance.lent import borrowed_keys
from ckptstore.near import meant
from ckptstore.storage.base import Storage


def bury(storage: Storage, checkpoint: Checkpoint, reason: str) -> None:
    """Put a tombstone beside the commit record; the inverse of ``bring_back``.

    Raises:
        ExistsError: a hold stands in the way, or it is buried already.
    """
    check_unheld(storage, checkpoint)
    commit.bury(storage, checkpoint.order, checkpoint.record.store_id, reason)
    try:
        check_unheld(storage, checkpoint)
    except CheckpointError:
        storage.delete([layout.tombstone_key(checkpoint.order)])
        raise


def bring_back(storage: Storage, buried: Sequence[Checkpoint], selector: str) -> Checkpoint:
    """Remove the tombstone of the buried checkpoint that ``selector`` names by id, its beginning, or step:N.

    Where ``prune`` takes the commit record away at the same time, one look at it afterwards tells: without a record it
    is gone. Only a ``prune`` that saw the tombstone before, and removes the record after that look, undoes this.

    Raises:
        NotFoundError: it is not in the trash, was reclaimed already, or borrowed files that are gone.
        FormatError: several match.
    """
    matches = [c for c in buried if c.id.startswith(selector) or selector == f"step:{c.step}"]
    if not selector or not matches:
        known = ", ".join(c.id for c in buried[-5:])
        raise NotFoundError(f"{storage.url} has no deleted checkpoint {selector!r}; in the trash: {known or 'nothing'}")
    if len(matches) > 1:
        raise FormatError(f"{selector!r} names {len(matches)} deleted checkpoints; write the id: {matches[-1].id}")
    id = matches[0].order
    _check_borrowed(storage, matches[0])
    storage.delete([layout.tombstone_key(id)])
    try:
        read_fate(storage, id)
    except NotFoundError as error:
        raise NotFoundError(f"{id} was reclaimed meanwhile and can't be brought back", id=str(id)) from error
    return matches[0]


def _check_borrowed(storage: Storage, checkpoint: Checkpoint) -> None:
    """Nothing, unless a file that ``checkpoint`` borrows is gone (NotFoundError).

    A save that lost its lender before it was acknowledged buries itself: it may have lost files, or be about to.
    Every other one's files are kept for it, also while it is buried.
    """
    try:
        keys = borrowed_keys(storage, checkpoint.record) if checkpoint.record.lenders else []
    except (IntegrityError, FormatError):
        # Damage is not absence: it comes back as it is, and verify names what is wrong.
        return
    for key in keys:
        try:
            storage.size(key)
        except NotFoundError as error:
            raise NotFoundError(
                f"{checkpoint.id} can't be brought back: it borrowed {key}, which was removed with its owner",
                id=checkpoint.id,
                step=checkpoint.step,
                key=key,
            ) from error


def hold(storage: Storage, checkpoint: Checkpoint, name: str) -> None:
    """Pin ``checkpoint`` under ``name``; the inverse of ``release``.

    Raises:
        ExistsError: the name is taken.
        FormatError: it could be taken for a selector.
        NotFoundError: the checkpoint was deleted meanwhile.
    """
    key = layout.hold_key(layout.check_hold_name(name))
    record = HoldRecord(store_id=checkpoint.record.store_id, name=name, id=checkpoint.id, created=now())
    try:
        storage.create(key, seal(record))
    except ExistsError as error:
        held = read_holds(storage)[0].get(name, "another checkpoint")
        raise ExistsError(f"hold {name!r} pins {held} already; release it first or choose another name") from error
    try:
        check_unburied(storage, checkpoint)
    except NotFoundError:
        storage.delete([key])
        raise


def release(storage: Storage, name: str) -> None:
    """Remove the hold ``name``.

    Raises:
        NotFoundError: there is none.
    """
    key = layout.hold_key(layout.check_hold_name(name))
    keys = [entry.key for entry in storage.list(layout.HOLDS)]
    if key not in keys:
        known = sorted(filter(None, map(layout.hold_name, keys)))
        raise NotFoundError(f"{storage.url} has no hold {name!r}; holds here: {listed(known)}{meant(name, known)}")
    storage.delete([key])


def check_unheld(storage: Storage, checkpoint: Checkpoint) -> None:
    """Nothing, unless a hold pins ``checkpoint`` (ExistsError) or one that may can't be read (IntegrityError)."""
    holds, damaged = read_holds(storage)
    for name, id in holds.items():
        if id == checkpoint.id:
            raise ExistsError(f"{id} is held by {name!r}; release that hold first", id=id, step=checkpoint.step)
    for damage in damaged:
        raise IntegrityError(f"{damage.problem}; it may hold {checkpoint.id}: release it first", key=damage.key)


def check_unburied(storage: Storage, checkpoint: Checkpoint) -> None:
    """Nothing, unless ``checkpoint`` was deleted (NotFoundError)."""
    if is_buried(storage, checkpoint):
        raise NotFoundError(f"{checkpoint.id} was deleted meanwhile", id=checkpoint.id, step=checkpoint.step)


def is_buried(storage: Storage, checkpoint: Checkpoint) -> bool:
    """Whether a tombstone stands beside it: tells damage from deletion during a read."""
    key = layout.tombstone_key(checkpoint.order)
    return any(entry.key == key for entry in storage.list(layout.TRASH))
