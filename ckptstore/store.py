"""The catalogue of checkpoints under one URL: save, load, resolve, verify, delete, hold."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeAlias, overload

from ckptstore.engine.background import SaveHandle
from ckptstore.engine.backups import Backups
from ckptstore.engine.buffers import BufferPool, StagingArea
from ckptstore.engine.catalogue import Checkpoint
from ckptstore.engine.collector import collector_paused
from ckptstore.engine.compressor import Compressor
from ckptstore.engine.crew import Crew
from ckptstore.engine.dispatcher import Dispatcher
from ckptstore.engine.facts import Facts
from ckptstore.engine.finder import Finder
from ckptstore.engine.planned import PlannedSaves
from ckptstore.engine.saver import Durable, Job, Tools
from ckptstore.engine.stopwatch import Stopwatch
from ckptstore.engine.streamed import Streamed
from ckptstore.engine.workers import Progress, cores
from ckptstore.errors import (
    CheckpointError,
    ExistsError,
    FormatError,
    IntegrityError,
    StateError,
)
from ckptstore.format.codecs import parse_compression
from ckptstore.maintenance import keep as keeping
from ckptstore.maintenance.repair import Repairer
from ckptstore.maintenance.replicate import Replicator
from ckptstore.maintenance.retainer import Retainer
from ckptstore.maintenance.scrub import Scrubber
from ckptstore.maintenance.verify import proven
from ckptstore.policy.retention import Keep
from ckptstore.storage.base import Storage
from ckptstore.upkeep import Upkeep

if TYPE_CHECKING:
    from ckptstore.state.capture import Snapshot

SaveMode: TypeAlias = Literal["sync", "async", "overlapped"]


class Store(Upkeep):
    """Made by ``ckptstore.open``; don't instantiate. Use as a context manager or call ``close``."""

    def __init__(
        self,
        storage: Storage,
        backups: Sequence[Storage] = (),
        *,
        durable: Durable,
        keep: Keep | None,
        trash_s: float,
        scrub_s: float | None,
        read_only: bool,
        shared: bool,
        compression: str,
        pool_bytes: int,
        threads: int,
        max_staging_bytes: int | None,
        ranks: Literal["all", "one"] = "all",
        rank_timeout_s: float = 600.0,
    ) -> None:
        tools = Tools(
            storage,
            BufferPool(pool_bytes),
            StagingArea(max_staging_bytes),
            threads,
            Compressor(parse_compression(compression), min(threads, cores())),
        )
        finder = Finder(storage, Backups(backups), read_only=read_only)
        super().__init__(tools, finder, read_only=read_only, ranks=ranks, rank_timeout_s=rank_timeout_s)
        self._shared = shared
        self._durable, self._keep = durable, keep
        self._dispatcher = Dispatcher(
            tools, self._finder, shared=shared, check_writable=self._check_writable, committed=self._committed
        )
        claim, lock = self._dispatcher.claim, self._dispatcher.lock
        self.planned = PlannedSaves(tools, finder, claim, lock, self._check_writable, self._committed, durable)
        """For integrations: saves that others plan."""
        self._retainer = None if keep is None else Retainer(storage, self._finder, claim, lock, keep, trash_s)
        copied = self._retainer.copied if self._retainer is not None else lambda: None
        self._replicators = [
            Replicator(storage, self._finder, backup, self._carrier, lambda: claim.right, copied)
            for backup in self._finder.backups.all
        ]
        self._scrubber: Scrubber | None = None
        if scrub_s is not None and not read_only and (self.ranks is None or self.ranks.leads):
            repairer = Repairer(storage, self._finder.backups.storages, self._carrier)
            self._scrubber = Scrubber(self._finder, repairer, scrub_s, self._dispatcher.background.busy)
            self._scrubber.start()
        self._pid = os.getpid()
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except CheckpointError as failed:
            if error is None:
                raise
            # What happened inside the block is the cause that its reader looks for.
            error.add_note(f"besides, a save in the background failed: {failed}")

    def close(self) -> None:
        """Wait for the save in the background and for copies to backups, and release what the store holds open.

        Copying ends where a backup can't be reached; the next run goes on with it. Safe to call twice. Where a signal
        interrupts the waiting, the save goes on, and Python waits for it at its end.

        Raises:
            SaveFailedError, CommitUnknownError, StaleWriterError: that save failed, and nobody has been told.
        """
        here = os.getpid() == self._pid
        try:
            if here:
                self._dispatcher.background.settle()
        finally:
            if here and not self._closed:
                self._end_copies()
            self._closed = True
            if not here or not self._dispatcher.background.busy():
                self._tools.area.clear()
                for storage in (self._storage, *self._finder.backups.storages):
                    storage.close()

    def _end_copies(self) -> None:
        if self._scrubber is not None:
            self._scrubber.end()
        # All at once: they wait for different servers.
        for replicator in self._replicators:
            replicator.end()
        for replicator in self._replicators:
            replicator.join()

    def _committed(self, checkpoint: Checkpoint, durable: Durable) -> None:
        """Have the backups copy ``checkpoint``, and wait for them where that is wanted; then older ones may go."""
        if self._retainer is not None and not self._replicators:
            self._retainer.saved()
        for replicator in self._replicators:
            replicator.wake()
        for replicator in self._replicators if durable == "backup" else ():
            replicator.wait_for(checkpoint.id)

    # -- saving ------------------------------------------------------------------------------------------

    @overload
    def save(
        self,
        state: object,
        *,
        step: int,
        epoch: int | None = ...,
        metrics: Mapping[str, Any] | None = ...,
        modes: Mapping[str, Literal["min", "max"]] | None = ...,
        reasons: Iterable[str] = ...,
        mode: Literal["sync"] = ...,
        durable: Durable | None = ...,
        progress: Progress | None = ...,
    ) -> Checkpoint: ...

    @overload
    def save(
        self,
        state: object,
        *,
        step: int,
        epoch: int | None = ...,
        metrics: Mapping[str, Any] | None = ...,
        modes: Mapping[str, Literal["min", "max"]] | None = ...,
        reasons: Iterable[str] = ...,
        mode: Literal["async", "overlapped"],
        when_busy: Literal["wait"] = ...,
        durable: Durable | None = ...,
        progress: Progress | None = ...,
    ) -> SaveHandle: ...

    @overload
    def save(
        self,
        state: object,
        *,
        step: int,
        epoch: int | None = ...,
        metrics: Mapping[str, Any] | None = ...,
        modes: Mapping[str, Literal["min", "max"]] | None = ...,
        reasons: Iterable[str] = ...,
        mode: SaveMode = ...,
        when_busy: Literal["wait", "skip"],
        durable: Durable | None = ...,
        progress: Progress | None = ...,
    ) -> Checkpoint | SaveHandle | None: ...

    def save(
        self,
        state: object,
        *,
        step: int,
        epoch: int | None = None,
        metrics: Mapping[str, Any] | None = None,
        modes: Mapping[str, Literal["min", "max"]] | None = None,
        reasons: Iterable[str] = (),
        mode: SaveMode = "sync",
        when_busy: Literal["wait", "skip"] = "wait",
        durable: Durable | None = None,
        progress: Progress | None = None,
    ) -> Checkpoint | SaveHandle | None:
        """Save ``state`` as a new checkpoint, the ``latest`` as soon as it is durable and read back.

        Under ``torch.distributed`` all ranks save one checkpoint together, and every rank must call it: what all have
        is written once, spread over them; of a ``DTensor`` each writes its shard; what differs is saved for each.
        Metrics and reasons are rank 0's. It succeeds on all ranks, or fails on all.

        Args:
            state: any nesting of dicts, lists, tensors, modules, optimizers, objects with ``state_dict``,
                numbers and text. Each top-level entry becomes a file of its own.
            step: completed optimizer steps; 0 is before any update.
            epoch: completed epochs.
            metrics: numbers by name, for ``best:NAME`` and for people.
            modes: for metrics whose name doesn't tell, whether "min" or "max" is best.
            reasons: why it is saved.
            mode: "sync" returns when the checkpoint is durable. "async" returns when the state is copied, and saves in
                the background. "overlapped" copies only what may change before the next step of the state's optimizers
                (see ``fence``), and reads the rest while the next forward and backward pass runs.
            when_busy: what to do while a save in the background runs: "wait" for its end, or "skip" this one.
            durable: when it is done: as soon as it is durable here ("primary"), or in every backup, too ("backup").
                None: as the store was opened.
            progress: called with (bytes done, bytes in all), from any thread.

        Returns:
            The checkpoint; in the background a ``SaveHandle``; None where this save was skipped.

        Raises:
            StateError: something in ``state`` can't be stored; nothing was written.
            SaveFailedError: certainly not saved; ``__cause__`` says why. Older checkpoints are untouched. Or the save
                in the background before this one failed, and nobody was told; this one wasn't begun then.
            CommitUnknownError: may be saved; ``resolve(error.id)`` settles it.
            StaleWriterError: a newer run has opened this store for writing.
            UnavailableError: with ``durable="backup"``: it is saved here, and a backup couldn't be reached; it will be
                copied there later.
        """
        began = time.perf_counter()
        if mode not in ("sync", "async", "overlapped") or when_busy not in ("wait", "skip"):
            raise StateError(
                f"mode={mode!r}, when_busy={when_busy!r}: mode is 'sync', 'async' or 'overlapped', when_busy 'wait' or "
                "'skip'",
                path="mode",
            )
        durable = durable or self._durable
        check_durable(durable, bool(self._replicators))
        crew = self.ranks
        if when_busy == "skip" and self._skips(crew):
            return None

        def ask() -> tuple[Snapshot, Facts]:
            from ckptstore.state.capture import capture

            facts = Facts.of(step, epoch, metrics or {}, modes or {}, reasons)
            self._check_writable()
            self._dispatcher.background.settle()
            with collector_paused():
                return capture(state), facts

        captured, facts, share = self._dispatcher.agree(crew, ask) if crew is not None else (*ask(), None)
        job = Job(captured, facts, durable, progress, share, Stopwatch(began))
        if mode == "sync":
            return self._dispatcher.save(job)
        return self._dispatcher.save_behind(captured, job, mode=mode, began=began)

    def save_streamed(
        self,
        state: Streamed,
        *,
        step: int,
        epoch: int | None = None,
        metrics: Mapping[str, Any] | None = None,
        modes: Mapping[str, Literal["min", "max"]] | None = None,
        reasons: Iterable[str] = (),
        progress: Progress | None = None,
    ) -> Checkpoint:
        """Save a state whose tensors are made block by block while they are written; by this process alone.

        Args:
            state: its tree, and what makes the bytes of its tensors.
            step, epoch, metrics, modes, reasons, progress: as ``save``.

        Raises:
            StateError, SaveFailedError, CommitUnknownError, StaleWriterError, UnavailableError: as ``save``; what the
                state's own functions raise ends the save, of which nothing is left.
        """
        facts = Facts.of(step, epoch, metrics or {}, modes or {}, reasons)
        self._check_writable()
        self._dispatcher.background.settle()
        return self._dispatcher.save(Job(state, facts, self._durable, progress))

    def _skips(self, crew: Crew | None) -> bool:
        """Whether a save is under way; where there are several ranks, on rank 0."""
        busy = self._dispatcher.background.busy()
        if crew is None:
            return busy
        return bool(crew.exchange("whether to skip a save", busy, lambda messages: messages[0]))

    def rollback(self, selector: str, *, progress: Progress | None = None) -> Checkpoint:
        """Make what an older checkpoint holds the ``latest`` again: save it anew, without its bytes.

        The new checkpoint borrows the files of the old one, with its step, epoch, metrics and modes; why that was saved
        stays with it. Nothing is deleted, and the newer ones stay. Whatever can't be borrowed, as what lies only in a
        backup, is copied. It takes over the store as any save: a run that still saves there is told so, by a
        ``StaleWriterError`` at its next save.

        Args:
            selector: see ``resolve``.
            progress: called with (bytes done, bytes in all) while the old one is read.

        Raises:
            ExistsError: it is the latest already.
            NotFoundError: no such checkpoint.
            IntegrityError: it is damaged; nothing was saved.
            SaveFailedError, CommitUnknownError, StaleWriterError, UnavailableError: as ``save``.
        """
        # No training waits for it.
        watch = Stopwatch(stalled=lambda: None)
        self._check_writable()
        self._dispatcher.background.settle()
        catalogue = self._finder.view()
        old = self._finder.select(catalogue, selector)
        if old.id == catalogue.checkpoints[-1].id:
            raise ExistsError(f"{old.id} is the latest already", id=old.id, step=old.step)
        home = self._finder.home(old)
        try:
            past = proven(home, catalogue, old, self._tools.pool, self._tools.threads, progress)
        except IntegrityError:
            # Deleted and reclaimed while it was read: that is no damage.
            keeping.check_unburied(home, old)
            raise
        reasons = [f"rollback to {old.id}"]
        return self._dispatcher.repeat(
            past,
            Facts(old.step, old.epoch, dict(old.metrics), dict(old.modes), reasons),
            lambda file, key: self._carrier.carry(past, file, home, self._storage, key),
            lies_here=home is self._storage,
            durable=self._durable,
            watch=watch,
        )


def check_durable(durable: str, has_backup: bool) -> None:
    """Nothing, if ``durable`` is what a store with or without a backup can promise (FormatError)."""
    if durable not in ("primary", "backup"):
        raise FormatError(f"durable={durable!r} must be 'primary' or 'backup'")
    if durable == "backup" and not has_backup:
        raise FormatError("durable='backup' needs a store that was opened with backup=URL")
