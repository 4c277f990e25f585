"""Saves that others plan, as ``torch.distributed.checkpoint`` does, whose ranks have a way of their own to talk.

The first rank begins a save; each writes what it was told to; the first one commits what it has read back of all.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from ckptstore.engine.catalogue import Checkpoint
from ckptstore.engine.claim import Claim
from ckptstore.engine.commit import condemn
from ckptstore.engine.committer import RANK_REQUESTS, Committer, Told
from ckptstore.engine.contents import Contents, read_part
from ckptstore.engine.crew import ranks_text
from ckptstore.engine.facts import Facts
from ckptstore.engine.finder import Finder
from ckptstore.engine.plan import Plan, Source
from ckptstore.engine.saver import Durable, Tools
from ckptstore.engine.workers import Meter, Progress, run
from ckptstore.engine.writer import write_files
from ckptstore.errors import (
    CheckpointError,
    CommitUnknownError,
    FormatError,
    IntegrityError,
    SaveFailedError,
    StorageError,
)
from ckptstore.format.layout import CheckpointId
from ckptstore.format.records import CommitRecord, FileEntry, PartEntry, PartRecord, Sealed256, StoreRecord


@dataclass(frozen=True)
class Place:
    """One rank's place in a save.

    Attributes:
        size: how many ranks there are.
        plan: digest of who writes what.
    """

    store: StoreRecord
    id: CheckpointId
    rank: int
    size: int
    plan: str

    def part(self, files: Sequence[FileEntry], tree: object) -> PartRecord:
        """This rank's part; the tree of all stands in the first one's."""
        joint = {"world_size": self.size, "plan": self.plan} if self.size > 1 else {}
        return PartRecord(id=str(self.id), rank=self.rank, files=list(files), tree=tree, **joint)  # type: ignore[arg-type]


class PlannedSaves:
    """Saves into one store that others plan.

    Attributes:
        durable: when they are done, unless said otherwise.
    """

    def __init__(
        self,
        tools: Tools,
        finder: Finder,
        claim: Claim,
        lock: threading.RLock,
        check_writable: Callable[[], None],
        committed: Callable[[Checkpoint, Durable], None],
        durable: Durable,
    ) -> None:
        self.durable = durable
        self._tools, self._finder, self._claim, self._lock = tools, finder, claim, lock
        self._check_writable, self._committed = check_writable, committed

    @property
    def has_backup(self) -> bool:
        """Whether there is one to wait for."""
        return bool(self._finder.backups)

    def begin(self, facts: Facts, size: int) -> tuple[StoreRecord, CheckpointId]:
        """On the first rank: the store's record, and the id of what ``size`` ranks are going to save.

        Raises:
            SaveFailedError: the storage failed; nothing was written.
            StaleWriterError: a newer writer owns the store.
        """
        with self._lock:
            self._check_writable()
            try:
                store, id = self._claim.next_id(facts.step, self._finder.view)
            except StorageError as error:
                message = f"step {facts.step} was not saved: {error}. Older checkpoints are untouched"
                raise SaveFailedError(message, step=facts.step) from error
        self._committer(store).check_size(id, Told(facts, 0, 0, size))
        return store, id

    def write(self, place: Place, sources: Sequence[Source], progress: Progress | None = None) -> list[FileEntry]:
        """Write a rank's tensors; durable on return.

        Raises:
            SaveFailedError: it isn't possible; the save is condemned.
        """
        label = f"-r{place.rank:05d}" if place.size > 1 else ""
        with self._lock, self.condemning(place):
            self._check_writable()
            plan = Plan(sources, encoded=self._tools.compressor.encodes, label=label)
            return write_files(
                self._tools.storage,
                place.id,
                self._tools.stage(plan),
                plan.files,
                digest=place.store.digest,
                compressor=self._tools.compressor,
                threads=self._tools.threads,
                meter=Meter(plan.raw_bytes, progress),
            )

    def put_part(self, place: Place, files: Sequence[FileEntry]) -> PartEntry:
        """Write the part of a rank that isn't the first.

        Raises:
            SaveFailedError: as ``write``.
        """
        with self.condemning(place):
            return self._committer(place.store).put_part(place.id, place.part(files, None))

    @contextmanager
    def condemning(self, place: Place) -> Iterator[None]:
        """Around what a rank does for a save: where it fails, nobody may commit that any more."""
        try:
            yield
        except BaseException as error:
            self.condemn(place, f"rank {place.rank}: {error}")
            if place.size == 1:
                # Of several ranks others may be writing still: what they leave, prune collects.
                self._committer(place.store).discard(place.id)
            if isinstance(error, StorageError):
                raise SaveFailedError(
                    f"{place.id} was not saved, because of rank {place.rank}: {error}. Older checkpoints are untouched",
                    id=str(place.id),
                    step=place.id.step,
                ) from error
            raise

    def condemn(self, place: Place, reason: str) -> None:
        """See that a save is never committed, as far as possible."""
        with suppress(CheckpointError):
            condemn(self._tools.storage, place.id, place.store.store_id, reason)

    # -- on the first rank, when all have written --------------------------------------------------------

    def commit(
        self,
        place: Place,
        told: Told,
        own: PartRecord,
        others: Sequence[PartEntry],
        *,
        check: Callable[[Contents], None],
        durable: Durable,
    ) -> Checkpoint:
        """Read back what the others have written, and commit it all.

        Args:
            own: the part of this rank, which is written here.
            others: those of the others, in their order.
            check: is asked whether that is what was planned.
            durable: see ``Store.save``.

        Raises:
            SaveFailedError: certainly not committed: a part is missing or another one than was reported.
            CommitUnknownError, StaleWriterError, UnavailableError: as ``Store.save``.
        """
        committer = self._committer(place.store)
        parts: list[PartRecord] = []
        files: list[FileEntry] = []

        def write() -> Sealed256:
            parts.extend([own, *self._read_parts(place, others)])
            files.extend(file for part in parts for file in part.files)
            return committer.put_manifest(place.id, place.store.digest, [committer.put_part(place.id, own), *others])

        def last_look(record: CommitRecord) -> None:
            check(Contents(record, place.store.digest, parts))

        with self._lock:
            self._check_writable()
            record = committer.commit(
                place.id,
                told,
                files,
                write,
                last_look=last_look,
                requests=RANK_REQUESTS,
                give_up=lambda error: self._give_up(place, error),
            )
        checkpoint = Checkpoint.of(record)
        self._committed(checkpoint, durable)
        return checkpoint

    def _give_up(self, place: Place, error: BaseException) -> None:
        if not isinstance(error, CommitUnknownError):
            self.condemn(place, str(error))

    def _read_parts(self, place: Place, entries: Sequence[PartEntry]) -> list[PartRecord]:
        found: dict[int, PartRecord] = {}

        def read(entry: PartEntry) -> None:
            try:
                part = read_part(self._tools.storage, place.id, entry)
            except (IntegrityError, FormatError) as error:
                raise self._failed(
                    place, entry, f"its part is not where rank 0 looks ({error}): do all have the same storage?"
                ) from error
            if (part.world_size, part.plan) != (place.size, place.plan):
                raise self._failed(place, entry, "it took part in another save")
            found[entry.rank] = part

        run(iter(entries), read, threads=min(RANK_REQUESTS, max(len(entries), 1)))
        return [found[entry.rank] for entry in entries]

    def _failed(self, place: Place, entry: PartEntry, why: str) -> SaveFailedError:
        message = f"{place.id} was not saved, because of {ranks_text([entry.rank])}: {why}"
        return SaveFailedError(f"{message}. Older checkpoints are untouched", id=str(place.id), step=place.id.step)

    def _committer(self, store: StoreRecord) -> Committer:
        return Committer(self._tools.storage, store, self._claim.check_fence)
