"""Prove a store: read every byte, name each damaged block and the tensors in it, report leftovers."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field

from ckptstore.engine.buffers import BufferPool
from ckptstore.engine.catalogue import Catalogue, Checkpoint, Damage, read_holds
from ckptstore.engine.commit import read_store
from ckptstore.engine.reader import BlockTask, check_blocks, open_file, read_contents
from ckptstore.engine.workers import Meter, Progress
from ckptstore.errors import CheckpointError, FormatError, IntegrityError, NotFoundError
from ckptstore.format import layout
from ckptstore.format.layout import CheckpointId
from ckptstore.format.records import SMALL_LIMIT, Record, TombstoneRecord, WriterRecord, unseal
from ckptstore.storage.base import Entry, Storage, is_key


@dataclass(frozen=True)
class Leftover:
    """What a killed save left: files of an id that was never committed.

    Attributes:
        id: the id, or None for temporary objects outside checkpoint folders.
        files, stored_bytes: how much lies there.
        modified: the newest file's time, seconds since 1970 by the storage's clock.
    """

    id: str | None
    keys: Sequence[str]
    stored_bytes: int
    modified: float


@dataclass(frozen=True)
class CheckpointReport:
    """One checkpoint's result: ``damages`` is empty where every byte read was good."""

    checkpoint: Checkpoint
    damages: Sequence[Damage]
    read_bytes: int

    @property
    def ok(self) -> bool:
        return not self.damages


@dataclass(frozen=True)
class VerifyReport:
    """The result of ``verify``.

    Attributes:
        checkpoints: one result each, oldest first.
        records: damage outside checkpoints: store.json, commit records, holds, tombstones.
        leftovers: what killed saves left; no damage, ``prune`` collects it.
        foreign: objects that ckptstore did not put there; they are never touched.
        sample: share of the blocks that was read.
        read_bytes: stored bytes read.
        seconds: time it took.
    """

    checkpoints: Sequence[CheckpointReport]
    records: Sequence[Damage]
    leftovers: Sequence[Leftover]
    foreign: Sequence[str]
    sample: float
    read_bytes: int
    seconds: float

    @property
    def damages(self) -> list[Damage]:
        """All damage found."""
        return [*self.records, *(damage for report in self.checkpoints for damage in report.damages)]

    @property
    def ok(self) -> bool:
        return not self.damages


def verify(
    storage: Storage,
    catalogue: Catalogue,
    chosen: Sequence[Checkpoint],
    *,
    entries: Sequence[Entry] | None,
    sample: float,
    pool: BufferPool,
    threads: int,
    progress: Progress | None,
) -> VerifyReport:
    """Verify ``chosen``; with ``entries``, all that was listed before ``catalogue``, also what else lies there.

    Raises:
        StorageError: the storage can't be read; that is no damage.
    """
    begin = time.perf_counter()
    meter = Meter(sum(round(c.stored_bytes * sample) for c in chosen), progress)
    reports = [_checkpoint(storage, c, sample, pool, threads, meter) for c in chosen]
    records: list[Damage] = []
    leftovers: list[Leftover] = []
    foreign: list[str] = []
    if entries is not None:
        records = [*_records(storage, entries), *catalogue.damaged, *read_holds(storage)[1]]
        found, foreign = sort_leftovers(entries, catalogue)
        leftovers = [leftover for leftover in found if _is_left(storage, leftover)]
    return VerifyReport(reports, records, leftovers, foreign, sample, meter.done, time.perf_counter() - begin)


def _is_left(storage: Storage, leftover: Leftover) -> bool:
    """Whether it still lies there: it may have been reclaimed while the store was listed and read."""
    id = layout.try_id(leftover.id) if leftover.id else None
    return id is None or bool(storage.list(layout.folder(id)))


@dataclass
class _Findings:
    checkpoint: Checkpoint
    damages: list[Damage] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, error: CheckpointError, tensors: Sequence[str] = ()) -> None:
        block = error.block if isinstance(error, IntegrityError) else None
        damage = Damage(error.key or "", str(error), self.checkpoint.id, block, tuple(tensors))
        with self.lock:
            self.damages.append(damage)


def _checkpoint(
    storage: Storage, checkpoint: Checkpoint, sample: float, pool: BufferPool, threads: int, meter: Meter
) -> CheckpointReport:
    before = meter.done
    found = _Findings(checkpoint)
    try:
        contents = read_contents(storage, checkpoint.record)
        files = contents.files
        _ = contents.tensors
    except (IntegrityError, FormatError) as error:
        found.add(error)
        return CheckpointReport(checkpoint, found.damages, 0)

    def damaged(task: BlockTask, error: CheckpointError) -> None:
        found.add(error, task.file.names_in(task.number))
        meter.add(task.file.entry.blocks[task.number].length)

    def good(task: BlockTask, raw: memoryview) -> None:
        meter.add(task.file.entry.blocks[task.number].length)

    for file in files:
        try:
            reader = open_file(storage, file, checkpoint.id)
        except IntegrityError as error:
            found.add(error, [file.name(index) for index in range(len(file.stream.rows))])
            continue
        # One file open at a time: a checkpoint may have more of them than a process may open.
        with closing(reader):
            numbers = _sampled(len(file.entry.blocks), sample)
            tasks = (BlockTask(file, reader, number, []) for number in numbers)
            check_blocks(contents, tasks, good, pool=pool, threads=threads, damaged=damaged)
    damages = sorted(found.damages, key=lambda d: (d.key, d.block if d.block is not None else -1))
    return CheckpointReport(checkpoint, damages, meter.done - before)


def _sampled(blocks: int, sample: float) -> Sequence[int]:
    """Numbers of the blocks to read. The generator is its own: the run's random numbers must not depend on it."""
    if sample >= 1:
        return range(blocks)
    return sorted(random.Random().sample(range(blocks), max(1, round(blocks * sample))))


def _records(storage: Storage, entries: Iterable[Entry]) -> Iterator[Damage]:
    """Damage of store.json, the writers and the tombstones; commits and holds are read elsewhere."""
    try:
        read_store(storage)
    except NotFoundError:
        yield Damage(layout.STORE, "store.json is missing; the next save writes it anew from the commit records")
    except (IntegrityError, FormatError) as error:
        yield Damage(layout.STORE, f"{error}; remove it, and the next save writes it anew from the commit records")
    for entry in entries:
        model: type[Record]
        if layout.writer_number(entry.key) is not None:
            model = WriterRecord
        elif entry.key.startswith(layout.TRASH) and layout.record_id(entry.key):
            model = TombstoneRecord
        else:
            continue
        try:
            unseal(storage.read(entry.key, limit=SMALL_LIMIT), entry.key, [model])
        except NotFoundError:
            continue
        except (IntegrityError, FormatError) as error:
            yield Damage(entry.key, str(error))


def sort_leftovers(entries: Iterable[Entry], catalogue: Catalogue) -> tuple[list[Leftover], list[str]]:
    """What killed saves left, by id, and what is not ckptstore's at all."""
    known = {c.order for c in (*catalogue.checkpoints, *catalogue.buried)}
    known |= {id for d in catalogue.damaged if d.id and (id := layout.try_id(d.id))}
    unfinished: dict[CheckpointId | None, list[Entry]] = {}
    foreign = []
    for entry in entries:
        id = layout.folder_id(entry.key)
        if not is_key(entry.key.removesuffix("/")):
            # A file server's .nfs0001, a desktop's .DS_Store: no storage could be asked to delete it.
            foreign.append(entry.key)
        elif entry.key.rstrip("/").rpartition("/")[2].startswith(layout.TEMPORARY):
            unfinished.setdefault(None if id in known else id, []).append(entry)
        elif id is not None and id not in known:
            unfinished.setdefault(id, []).append(entry)
        elif not _ours(entry.key, id):
            foreign.append(entry.key)
    leftovers = [
        Leftover(
            str(id) if id else None, [e.key for e in found], sum(e.size for e in found), max(e.modified for e in found)
        )
        for id, found in unfinished.items()
    ]
    return leftovers, foreign


def _ours(key: str, id: CheckpointId | None) -> bool:
    if id is not None:
        name = key.removeprefix(layout.folder(id))
        return name == "manifest.json" or name.startswith("part-") or name.endswith((".safetensors", ".blocks"))
    top = key.partition("/")[0] + "/"
    if key == layout.STORE or (key.endswith("/") and top in _FOLDERS):
        return True
    return bool(layout.record_id(key) or layout.writer_number(key) or layout.hold_name(key)) or top == layout.CONTROL


_FOLDERS = {layout.WRITERS, layout.COMMITS, layout.CHECKPOINTS, layout.HOLDS, layout.TRASH, layout.CONTROL}
