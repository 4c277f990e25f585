"""Stores to break, and what must hold of them afterwards, whatever happened."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path

import ckptstore
from ckptstore.engine.buffers import BufferPool
from ckptstore.engine.catalogue import Checkpoint
from ckptstore.engine.reader import read_tensors
from ckptstore.store import Store
from tests.integrity.borrowing import borrow, component
from tests.integrity.stores import FolderRaw

from .worker import Tensors, save, save_tuned, tensors, tuned

OLD, NEW, NEXT = 1, 2, 9
"""Steps: of the checkpoint that must survive, of the one that is made or deleted, of the save that comes after."""

_POOL = BufferPool(48 << 20)


def opened(path: Path) -> Store:
    """A store opened anew, with one thread and buffers that all tests share."""
    store = ckptstore.open(path, threads=1)
    store._tools.pool = _POOL
    return store


@dataclass(frozen=True)
class Base:
    """A store as it was before the fault: ``old`` must survive, ``new`` is the one to delete, if any.

    ``borrowed`` names the tensors that ``old`` has from ``new``; with ``tuned``, saves borrow from ``old``.
    """

    path: Path
    old: str | None
    new: str | None = None
    borrowed: Set[str] = frozenset()
    tuned: bool = False

    @property
    def lent(self) -> Set[str]:
        """Names of the files that ``old`` borrows."""
        return set(map(component, self.borrowed))

    @property
    def operation(self) -> str:
        """What is done to it."""
        return "delete" if self.new is not None else "save tuned" if self.tuned else "save"

    def copy(self, path: Path) -> Path:
        """A copy of it, in a folder of the same name below ``path``, replacing the last one."""
        target = path / "store"
        if target.exists():
            shutil.rmtree(target)
        if self.path.exists():
            shutil.copytree(self.path, target)
        return target


def nothing(path: Path) -> Base:
    """No store at all."""
    return Base(path, None)


def one_checkpoint(path: Path) -> Base:
    """A store with one good checkpoint."""
    with opened(path) as store:
        return Base(path, save(store, OLD).id)


def something_tuned(path: Path) -> Base:
    """A store with one good checkpoint, whose frozen file the next one will borrow."""
    with opened(path) as store:
        return Base(path, save_tuned(store, OLD).id, tuned=True)


def something_to_delete(path: Path) -> Base:
    """A store with one good checkpoint, a newer one to delete, and what a save left that died before its commit."""
    with opened(path) as store:
        old, new, dead = (save(store, step) for step in (OLD, NEW, 3))
    (path / "commits" / f"{dead.id}.json").unlink()
    return Base(path, old.id, new.id)


def something_lent(path: Path) -> Base:
    """A store with a checkpoint to delete, and one that borrows all but the smallest of its files."""
    with opened(path) as store:
        new = save(store, NEW)
        own, borrowed = {"b/y": tensors(OLD)["b/y"]}, {"a/x", "c/z"}
        old = borrow(store, FolderRaw(path), new, own, OLD, map(component, borrowed))
    return Base(path, old.id, new.id, borrowed)


def expected(base: Base, checkpoint: Checkpoint, *, large: bool) -> Tensors:
    """What ``checkpoint`` holds."""
    own = (tuned if base.tuned else tensors)(checkpoint.step, large=large and checkpoint.step == NEW)
    return {**own, **{name: tensors(NEW)[name] for name in base.borrowed}} if checkpoint.id == base.old else own


class _Sink:
    def __init__(self, length: int) -> None:
        self.data = bytearray(length)
        self.region = None

    def host(self) -> memoryview:
        return memoryview(self.data)


def read(store: Store, checkpoint: Checkpoint) -> Tensors:
    """Every tensor of ``checkpoint``, through the library's own reader, without torch."""
    contents = store.contents(checkpoint)
    lengths = {file.entry.prefix + row.name: row.nbytes for file in contents.files for row in file.stream.rows}
    sinks = {name: _Sink(length) for name, length in lengths.items()}
    read_tensors(store._storage, contents, sinks, pool=_POOL, threads=1)
    return {name: bytes(sink.data) for name, sink in sinks.items()}


def check(path: Path, base: Base, *, large: bool = False, there: str | None = None, gone: str | None = None) -> bool:
    """What was acknowledged is there, all that is there is whole, and the store goes on working.

    Args:
        path: the store, after the fault.
        base: as it was before.
        large: whether the checkpoint of step ``NEW``, if it was made after ``base``, is the large one.
        there: id of an acknowledged checkpoint.
        gone: id of a checkpoint whose deletion was acknowledged.

    Returns:
        Whether a checkpoint of step ``NEW`` exists.
    """
    with opened(path) as store:
        found = _check_contents(store, base, large and base.new is None, there, gone)
        _check_goes_on(store, found)
        _check_reclaimed(store, base, found)
    return any(checkpoint.step == NEW for checkpoint in found.values())


def _check_contents(
    store: Store, base: Base, large: bool, there: str | None, gone: str | None
) -> Mapping[str, Checkpoint]:
    found = {checkpoint.id: checkpoint for checkpoint in store.checkpoints()}
    assert base.old in found or base.old is None, "the old checkpoint is gone"
    assert there in found or there is None, "an acknowledged checkpoint is gone"
    assert gone not in found, "a deleted checkpoint is back"
    for checkpoint in [*found.values(), *store.deleted()]:
        assert checkpoint.step in (OLD, NEW)
        assert read(store, checkpoint) == expected(base, checkpoint, large=large)
    if found:
        report = store.verify()
        assert report.ok, report.damages
        assert not report.foreign
    return found


def _check_goes_on(store: Store, found: Mapping[str, Checkpoint]) -> None:
    saved = save(store, NEXT)
    assert read(store, saved) == tensors(NEXT)
    store.prune()
    # Only a temporary object outside the checkpoints' folders doesn't tell whose it is, and has to grow old.
    assert not [leftover for leftover in store.verify().leftovers if leftover.id is not None]
    store.prune(grace_s=0)
    report = store.verify()
    assert report.ok, report.damages
    assert not report.leftovers
    assert not report.foreign
    assert [report.checkpoint.id for report in report.checkpoints] == [*sorted(found), saved.id]


def _check_reclaimed(store: Store, base: Base, found: Mapping[str, Checkpoint]) -> None:
    """Of a lender that was deleted, what is lent is there, and nothing else."""
    if base.borrowed and base.new not in found:
        left = {entry.key.rpartition("/")[2] for entry in store._storage.list(f"checkpoints/{base.new}/")}
        assert left == base.lent
