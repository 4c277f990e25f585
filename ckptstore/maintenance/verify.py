"""Prove a store: read every byte, name each damaged block and the tensors in it, report leftovers."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial

from ckptstore.engine.buffers import BufferPool
from ckptstore.engine.catalogue import Catalogue, Checkpoint, Damage, read_holds
from ckptstore.engine.commit import read_record, read_store
from ckptstore.engine.contents import Contents, DataFile, Rescue, read_contents
from ckptstore.engine.reader import BlockTask, check_blocks, open_file
from ckptstore.engine.workers import Meter, Progress
from ckptstore.errors import CheckpointError, FormatError, IntegrityError, NotFoundError
from ckptstore.format import layout
from ckptstore.format.records import FileEntry, Record, TombstoneRecord, VerificationRecord, WriterRecord, unseal
from ckptstore.maintenance.leftovers import Leftover, find_leftovers
from ckptstore.maintenance.lent import Lent
from ckptstore.maintenance.verifications import Tally
from ckptstore.storage.base import Entry, Storage


@dataclass(frozen=True)
class CheckpointReport:
    """One checkpoint's result: ``damages`` is empty where every byte read was good.

    What it borrows counts as its own, in ``read_bytes`` too, where it was read for another one already.
    """

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
        records: damage outside checkpoints: store.json, commit records, holds, tombstones, earlier verifications.
        leftovers: what killed saves left; no damage, ``prune`` collects it.
        foreign: objects that ckptstore did not put there; they are never touched.
        sample: share of the blocks that was read.
        read_bytes: stored bytes read.
        seconds: time it took.
        repaired: damage that was found, and is no more.
    """

    checkpoints: Sequence[CheckpointReport]
    records: Sequence[Damage]
    leftovers: Sequence[Leftover]
    foreign: Sequence[str]
    sample: float
    read_bytes: int
    seconds: float
    repaired: Sequence[Damage] = ()

    def with_checkpoints(self, proven: Iterable[CheckpointReport]) -> VerifyReport:
        """This report, with newer results for some checkpoints."""
        newer = {one.checkpoint.id: one for one in proven}
        return replace(self, checkpoints=[newer.get(one.checkpoint.id, one) for one in self.checkpoints])

    def after(self, found: Iterable[Damage]) -> VerifyReport:
        """This report, with all that was ``found`` before and is no more as repaired."""
        left = {(damage.key, damage.block) for damage in self.damages}
        gone = {(damage.key, damage.block): damage for damage in found if (damage.key, damage.block) not in left}
        return replace(self, repaired=list(gone.values()))

    def tally(self, *, whole: bool) -> Tally:
        """What of it is put down; ``whole``: all that lies there was read."""
        newest = self.checkpoints[-1].checkpoint if self.checkpoints else None
        tally = Tally("verify", newest, len(self.checkpoints), whole, self.sample, self.read_bytes, self.seconds)
        tally.damages, tally.repaired = len(self.damages), len(self.repaired)
        return tally

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
    prover = _Prover(storage, sample, pool, threads, meter, {id for c in chosen for id in c.record.lenders})
    reports = [prover.checkpoint(c) for c in chosen]
    records: list[Damage] = []
    leftovers: list[Leftover] = []
    foreign: list[str] = []
    if entries is not None:
        records = [*_records(storage, entries), *catalogue.damaged, *read_holds(storage)[1]]
        found, foreign = find_leftovers(entries, catalogue, Lent(storage, catalogue))
        leftovers = [leftover for leftover in found if _is_left(storage, leftover)]
    read_bytes = meter.done - prover.repeated_bytes
    return VerifyReport(reports, records, leftovers, foreign, sample, read_bytes, time.perf_counter() - begin)


def prove(
    storage: Storage, chosen: Sequence[Checkpoint], rescue: Rescue | None, *, pool: BufferPool, threads: int
) -> list[CheckpointReport]:
    """Read every byte of ``chosen``; ``rescue`` is asked for what is damaged, which is no damage then.

    Raises:
        StorageError: the storage can't be read; that is no damage.
    """
    lenders = {id for c in chosen for id in c.record.lenders}
    prover = _Prover(storage, 1.0, pool, threads, Meter(0, None), lenders, rescue)
    return [prover.checkpoint(c) for c in chosen]


def proven(
    storage: Storage,
    catalogue: Catalogue,
    checkpoint: Checkpoint,
    pool: BufferPool,
    threads: int,
    progress: Progress | None,
) -> Contents:
    """What ``checkpoint`` holds, after every byte of it was read.

    Raises:
        IntegrityError: it is damaged.
        StorageError: the storage can't be read; that is no damage.
    """
    report = verify(
        storage, catalogue, [checkpoint], entries=None, sample=1.0, pool=pool, threads=threads, progress=progress
    )
    if damages := report.damages:
        first, more = damages[0], f", and {len(damages) - 1} more" if len(damages) > 1 else ""
        raise IntegrityError(
            f"{checkpoint.id} is damaged: {first.problem}{more}. Choose another one, or repair it from a backup: "
            "verify(repair=True)",
            id=checkpoint.id,
            step=checkpoint.step,
            key=first.key,
            block=first.block,
        )
    return read_contents(storage, checkpoint.record)


def _is_left(storage: Storage, leftover: Leftover) -> bool:
    """Whether some of it still lies there: it may have been reclaimed while the store was listed and read."""
    id = leftover.order
    return id is None or not {entry.key for entry in storage.list(layout.folder(id))}.isdisjoint(leftover.keys)


@dataclass
class _Findings:
    """What is wrong with one data file, or with a checkpoint's records."""

    found: list[tuple[CheckpointError, Sequence[str]]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, error: CheckpointError, tensors: Sequence[str] = ()) -> None:
        with self.lock:
            self.found.append((error, tensors))

    def damages(self, checkpoint: Checkpoint) -> list[Damage]:
        """The same as damage to ``checkpoint``."""
        return [
            Damage(e.key or "", str(e), checkpoint.id, e.block if isinstance(e, IntegrityError) else None, tuple(names))
            for e, names in self.found
        ]


@dataclass
class _Prover:
    """Reads checkpoints; a file that several need is read once, and its damage is damage to each of them."""

    storage: Storage
    sample: float
    pool: BufferPool
    threads: int
    meter: Meter
    lenders: set[str]
    rescue: Rescue | None = None
    proofs: dict[tuple[str, str], tuple[FileEntry, _Findings, int]] = field(default_factory=dict)
    """By digest and key of a file that may be lent: what it was checked against, what was found, and bytes read."""
    repeated_bytes: int = 0

    def checkpoint(self, checkpoint: Checkpoint) -> CheckpointReport:
        before = self.meter.done
        damages: list[Damage] = []
        try:
            contents = read_contents(self.storage, checkpoint.record, self.rescue)
            files = contents.files
            _ = contents.tensors
        except (IntegrityError, FormatError) as error:
            found = _Findings()
            found.add(error)
            return CheckpointReport(checkpoint, found.damages(checkpoint), 0)
        for file in files:
            damages += self._once(file, contents).damages(checkpoint)
        damages.sort(key=lambda d: (d.key, d.block if d.block is not None else -1))
        return CheckpointReport(checkpoint, damages, self.meter.done - before)

    def _once(self, file: DataFile, contents: Contents) -> _Findings:
        if file.entry.owner not in self.lenders:
            return self._read(file, contents)
        key = contents.digest, file.key
        entry, found, read_bytes = self.proofs.get(key, (None, None, 0))
        # Another entry for the same key is a lie or damage, and has to be proven by itself.
        if found is not None and entry == file.entry:
            self.repeated_bytes += read_bytes
            self.meter.add(read_bytes)
            return found
        before = self.meter.done
        found = self._read(file, contents)
        self.proofs[key] = file.entry, found, self.meter.done - before
        return found

    def _read(self, file: DataFile, contents: Contents) -> _Findings:
        found = _Findings()

        def damaged(task: BlockTask, error: CheckpointError) -> None:
            found.add(error, file.names_in(task.number))
            self.meter.add(file.entry.blocks[task.number].length)

        def good(task: BlockTask, raw: memoryview) -> None:
            self.meter.add(file.entry.blocks[task.number].length)

        try:
            reader = open_file(self.storage, file, contents.commit.id, self.rescue)
        except IntegrityError as error:
            found.add(error, [file.name(index) for index in range(len(file.stream.rows))])
            return found
        # One file open at a time: a checkpoint may have more of them than a process may open.
        with closing(reader):
            numbers = _sampled(len(file.entry.blocks), self.sample)
            tasks = (BlockTask(file, reader, number, []) for number in numbers)
            check_blocks(
                contents, tasks, good, pool=self.pool, threads=self.threads, damaged=damaged, rescue=self.rescue
            )
        return found


def _sampled(blocks: int, sample: float) -> Sequence[int]:
    """Numbers of the blocks to read. The generator is its own: the run's random numbers must not depend on it."""
    if sample >= 1:
        return range(blocks)
    return sorted(random.Random().sample(range(blocks), max(1, round(blocks * sample))))


def _records(storage: Storage, entries: Iterable[Entry]) -> Iterator[Damage]:
    """Damage of store.json, writers, tombstones and verifications; commits and holds are read elsewhere."""
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
        elif layout.is_verification(entry.key):
            model = VerificationRecord
        else:
            continue
        try:
            read_record(storage, entry.key, partial(_unsealed, entry.key, model))
        except NotFoundError:
            continue
        except (IntegrityError, FormatError) as error:
            way_out = "; remove it, nothing depends on it" if model is VerificationRecord else ""
            yield Damage(entry.key, f"{error}{way_out}")


def _unsealed(key: str, model: type[Record], data: bytes) -> Record:
    return unseal(data, key, [model])
