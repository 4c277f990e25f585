"""Apply the rules that say which checkpoints stay: bury the others, and reclaim their space."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from datetime import UTC, datetime

from ckptstore.engine.catalogue import Catalogue, Checkpoint, read_holds
from ckptstore.engine.commit import EVICTED, RETIRED, tombstone_reason
from ckptstore.errors import ExistsError, FormatError, IntegrityError
from ckptstore.format import layout
from ckptstore.format.layout import CheckpointId
from ckptstore.maintenance.keep import bury
from ckptstore.maintenance.leftovers import find_leftovers
from ckptstore.maintenance.lent import Lent
from ckptstore.maintenance.prune import settled
from ckptstore.policy.judge import Judgement, judge
from ckptstore.policy.retention import Keep
from ckptstore.policy.thin import own_bytes
from ckptstore.storage.base import Entry, Storage


def judged(storage: Storage, catalogue: Catalogue, keep: Keep) -> Judgement:
    """What becomes of each checkpoint that lies in ``storage`` under ``keep``; nothing is changed.

    Raises:
        IntegrityError: a commit record or a hold can't be read: who knows what it keeps.
        StorageError: something can't be listed or read.
    """
    held, trash = holders(storage, catalogue), trash_bytes(storage, catalogue, keep)

    def look(bad: dict[str, str]) -> Judgement:
        now = datetime.now(UTC)
        return judge(keep, catalogue.checkpoints, now=now, held=held, bad=bad, other_bytes=trash)

    first = look({})
    # Whether they are whole is worth a listing of all files only where something would go.
    return look(incomplete(storage.list(layout.CHECKPOINTS), catalogue.checkpoints)) if first.going else first


def holders(storage: Storage, catalogue: Catalogue) -> dict[str, list[str]]:
    """The names of the holds that pin each id.

    Raises:
        IntegrityError: a commit record or a hold can't be read: who knows what it keeps.
        StorageError: something can't be listed or read.
    """
    names, unreadable = read_holds(storage)
    for damage in (*catalogue.damaged, *unreadable):
        raise IntegrityError(
            f"no checkpoint is given up as long as one can't be read: {damage.problem}", key=damage.key
        )
    held: dict[str, list[str]] = {}
    for name, id in names.items():
        held.setdefault(id, []).append(name)
    return held


def trash_bytes(storage: Storage, catalogue: Catalogue, keep: Keep) -> int:
    """What lies in the trash and makes no room by itself under ``keep``: what a person deleted.

    Raises:
        StorageError: a tombstone can't be read.
    """
    # What the rules let go of does, see ``crowded``.
    return sum(map(own_bytes, _by_hand(storage, catalogue.buried))) if keep.limit_bytes is not None else 0


def _by_hand(storage: Storage, buried: Iterable[Checkpoint]) -> list[Checkpoint]:
    return [c for c in buried if not (tombstone_reason(storage, c.order) or "").startswith((RETIRED, EVICTED))]


def given_up(keep: Keep, checkpoints: Sequence[Checkpoint]) -> set[str]:
    """The ids of those that ``keep`` would let go of, were they all good, and none of them held."""
    return {verdict.id for verdict in judge(keep, checkpoints, now=datetime.now(UTC)).going}


def incomplete(entries: Iterable[Entry], checkpoints: Sequence[Checkpoint]) -> dict[str, str]:
    """Of which of ``checkpoints`` files are missing or cut short, as a listing tells, and what is wrong."""
    manifests: dict[CheckpointId | None, int] = {}
    data: dict[CheckpointId | None, int] = {}
    for entry in entries:
        id = layout.folder_id(entry.key)
        if id is not None and entry.key == layout.manifest_key(id):
            manifests[id] = entry.size
        elif layout.is_data_file(entry.key):
            data[id] = data.get(id, 0) + entry.size
    found = {}
    for c in checkpoints:
        own = own_bytes(c)
        if manifests.get(c.order) != c.record.manifest.size:
            found[c.id] = "its manifest is missing or incomplete"
        elif data.get(c.order, 0) != own:
            found[c.id] = f"its files have {data.get(c.order, 0)} bytes instead of {own}"
        elif missing := [lender for lender in c.lenders if layout.parse_id(lender) not in data]:
            found[c.id] = f"the files it borrows from {missing[0]} are missing"
    return found


def retire(storage: Storage, catalogue: Catalogue, judgement: Judgement, keep: Keep) -> list[str]:
    """Bury what doesn't stay by ``judgement`` of ``catalogue``. It can be brought back until it is reclaimed.

    Returns:
        The ids; one that is held by now, or was deleted by somebody else, is not among them.

    Raises:
        StorageError: the storage failed; what is buried by then stays so.
    """
    there = {c.id: c for c in catalogue.checkpoints}
    buried = []
    for verdict in judgement.going:
        try:
            bury(storage, there[verdict.id], f"{RETIRED}{keep}")
        except ExistsError:
            continue
        buried.append(verdict.id)
    return buried


def retired(storage: Storage, catalogue: Catalogue, entries: Iterable[Entry], before: float) -> set[CheckpointId]:
    """The buried ones that the rules gave up ``before``, in seconds since 1970, and not a person by hand.

    Raises:
        StorageError: a tombstone can't be read.
    """
    buried_at = {layout.record_id(entry.key): entry.modified for entry in entries}
    old = [c.order for c in catalogue.buried if buried_at.get(c.order, before) <= before]
    return {id for id in old if (tombstone_reason(storage, id) or "").startswith(RETIRED)}


def crowded(storage: Storage, catalogue: Catalogue, entries: Iterable[Entry], limit: int) -> set[CheckpointId]:
    """The buried ones for which there is no room within ``limit`` bytes: those that the rules gave up, oldest first.

    Raises:
        StorageError: a tombstone can't be read.
    """
    over = sum(map(own_bytes, (*catalogue.checkpoints, *catalogue.buried))) - limit
    if over <= 0:
        return set()
    entries = list(entries)
    buried_at = {layout.record_id(entry.key): entry.modified for entry in entries}
    own = {c.order: own_bytes(c) for c in catalogue.buried}
    going: set[CheckpointId] = set()
    for id in sorted(retired(storage, catalogue, entries, float("inf")), key=lambda id: (buried_at.get(id, 0.0), id)):
        if over > 0:
            going.add(id)
            over -= own[id]
    return going


def reclaim(storage: Storage, before: Catalogue, ids: Collection[CheckpointId]) -> None:
    """Remove the commit records of ``ids``, which are buried, and then their files, but for what others borrow.

    The record goes first: a crash then leaves files without a record, never half a checkpoint. Who borrows is as the
    commits tell once the records are gone.

    Raises:
        StorageError: something can't be listed or removed; what was begun is finished by ``prune``.
    """
    graves = {layout.record_id(entry.key) for entry in storage.list(layout.TRASH)}
    # One that was brought back since is nobody's to remove.
    ids = [id for id in sorted(ids) if id in graves]
    storage.delete([layout.commit_key(id) for id in ids])
    entries = [entry for id in ids for entry in storage.list(layout.folder(id))]
    now = settled(storage, before)
    for leftover in find_leftovers(entries, now, Lent(storage, now))[0]:
        if leftover.order in ids:
            storage.delete(leftover.keys)


def refuse_many(judgement: Judgement, url: str, keep: Keep) -> None:
    """Nothing, where few would go.

    Raises:
        FormatError: they are many: a wrong rule, or the wrong store.
    """
    if (why := judgement.needs_force) is not None:
        raise FormatError(
            f'{url}: {why} under {keep}, and so none does. Look at `ckptstore prune {url} --dry-run --keep "{keep}"`; '
            "if that is what you want, run it with --force instead of --dry-run"
        )
