"""The catalogue of checkpoints under one URL: save, load, resolve, verify, delete, hold."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeAlias, overload

from ckptstore.engine import control
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
from ckptstore.engine.workers import Progress, cores
from ckptstore.errors import (
    CheckpointError,
    ExistsError,
    FormatError,
    IntegrityError,
    NotFoundError,
    StaleWriterError,
    StateError,
    StorageError,
)
from ckptstore.format import layout
from ckptstore.format.codecs import parse_compression
from ckptstore.maintenance import keep as keeping
from ckptstore.maintenance import retire as retiring
from ckptstore.maintenance.prune import PruneReport, preview, prune
from ckptstore.maintenance.repair import Repairer
from ckptstore.maintenance.replicate import Replicator
from ckptstore.maintenance.retainer import Retainer
from ckptstore.maintenance.retire import judged, refuse_many, retire
from ckptstore.maintenance.scrub import Scrubber
from ckptstore.maintenance.verify import proven
from ckptstore.policy.retention import Keep
from ckptstore.storage.base import Storage
from ckptstore.units import duration_s
from ckptstore.view import View

if TYPE_CHECKING:
    from ckptstore.state.capture import Snapshot

SaveMode: TypeAlias = Literal["sync", "async", "overlapped"]


class Store(View):
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
        job = Job(captured, facts, durable, progress, share)
        if mode == "sync":
            return self._dispatcher.save(job)
        return self._dispatcher.save_behind(captured, job, mode=mode, began=began)

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
        )

    def _begin_change(self) -> None:
        self._check_writable()
        # A process that only prunes never saved, and must know whether what it creates may take another's place.
        self._dispatcher.claim.try_out()

    def _check_writable(self) -> None:
        if self._closed:
            raise StorageError(f"{self.url} was closed; open it again")
        if self._read_only:
            raise StorageError(f"{self.url} was opened read-only; open it without read_only=True to change it")
        if os.getpid() != self._pid:
            raise StaleWriterError(
                f"{self.url} was opened in process {self._pid} and carried into its fork {os.getpid()}; "
                "two processes can't save as one writer: open the store anew in the process that saves"
            )

    # -- the run that saves here -------------------------------------------------------------------------

    def signal(self, action: control.Action, *, wait: float | str | None = None) -> bool:
        """Ask the run that saves here to "save" at once, or to "stop": to save and end.

        The run that owns the store goes on owning it. Only one that looks for requests heeds them: a ``Checkpointer``
        does, a bare ``Store`` doesn't. What was asked for before a run began is not heeded by it.

        Args:
            action: "save" or "stop".
            wait: wait so long until it is taken up, as "30s" or in seconds; then the request is taken back.

        Returns:
            Whether a run has taken it up; False without ``wait``, as nobody knows yet.

        Raises:
            FormatError: no such action, or no duration.
            ExistsError: it was asked already, and no run has answered.
            NotFoundError: there is no store here.
            StorageError: opened read-only, or the storage failed.
        """
        if action not in control.ACTIONS:
            raise FormatError(f"{action!r} can't be asked for; a run heeds {' and '.join(map(repr, control.ACTIONS))}")
        wait_s = None if wait is None else duration_s(wait, "wait")
        self._begin_change()
        record = self._finder.store_record()
        store_id = record.store_id if record is not None else self._finder.scan().store_id
        if store_id is None:
            self._finder.require_store()
        if wait_s is None:
            control.ask(self._storage, store_id, action)
            return False
        return control.ask_and_wait(self._storage, store_id, action, wait_s)

    def requests(self) -> list[control.Action]:
        """Take up what was asked for by ``signal``: what is returned is for the caller to do, and asked for no more.

        Raises:
            StorageError: the storage failed.
        """
        asked = control.poll(self._storage)
        return [one.action for one in asked if control.answer(self._storage, one) and one.problem is None]

    # -- keeping -----------------------------------------------------------------------------------------

    def delete(self, selector: str, *, reason: str = "deleted by hand", reclaim: bool = False) -> Checkpoint:
        """Bury a checkpoint: it no longer exists, ``undelete`` brings it back until ``prune`` reclaims it.

        Args:
            selector: see ``resolve``.
            reason: for people, see ``undelete``.
            reclaim: remove its files at once, but for what others borrow: nothing brings it back.

        Raises:
            ExistsError: a hold stands in the way.
            NotFoundError: no such checkpoint.
        """
        self._begin_change()
        checkpoint = self._own(selector)
        keeping.bury(self._storage, checkpoint, reason)
        if reclaim:
            with self._dispatcher.lock:
                retiring.reclaim(self._storage, self._finder.scan(), {checkpoint.order})
        return checkpoint

    def _own(self, selector: str) -> Checkpoint:
        checkpoint = self._finder.select(self._finder.view(), selector)
        home = self._finder.home(checkpoint)
        if home is not self._storage:
            raise NotFoundError(f"{checkpoint.id} lies only in the backup {home.url}: open that to change it")
        return checkpoint

    def undelete(self, id: str) -> Checkpoint:
        """Bring back a deleted checkpoint, named by its id or the beginning of it.

        Raises:
            NotFoundError: it is not in the trash, or was reclaimed already.
        """
        self._check_writable()
        return keeping.bring_back(self._storage, self._finder.scan().buried, id)

    def hold(self, selector: str, name: str) -> Checkpoint:
        """Pin a checkpoint under ``name``: it can't be deleted until ``release(name)``, and ``name`` selects it.

        Raises:
            ExistsError: the name is taken.
            FormatError: the name could be taken for a selector.
        """
        self._begin_change()
        layout.check_hold_name(name)
        checkpoint = self._own(selector)
        keeping.hold(self._storage, checkpoint, name)
        return checkpoint

    def release(self, name: str) -> None:
        """Remove the hold ``name``; the checkpoint stays.

        Raises:
            NotFoundError: there is no such hold.
        """
        self._check_writable()
        keeping.release(self._storage, name)

    def prune(
        self, *, grace_s: float = 24 * 3600.0, keep: Keep | None = None, force: bool = False, dry_run: bool = False
    ) -> PruneReport:
        """Collect what killed saves left, and reclaim what was deleted more than ``grace_s`` seconds ago.

        Leftovers of older writers go at once: they can't commit any more. Those of the newest writer go only
        when they are older than ``grace_s``, because its save may be running.

        Args:
            grace_s: what is younger can still be brought back, or may still be written.
            keep: first delete what these rules don't keep, see ``judge``; it can be brought back as if by hand.
            force: also where ``keep`` gives up more than 20 at once, or more than 3 that are over half of all.
            dry_run: only tell what would be done.

        Raises:
            FormatError: so many would go that somebody should look first; nothing was changed.
            StaleWriterError: this run was replaced by a newer one, which prunes now.
            StorageError: nothing is deleted on an incomplete listing.
        """
        own = self._dispatcher.claim.number if not self._shared else None
        if dry_run:
            going = [] if keep is None else [verdict.id for verdict in self.judge(keep).going]
            return preview(self._storage, self._finder.scan(), grace_s=grace_s, own_writer=own).after(going)
        self._begin_change()
        with self._dispatcher.lock:
            self._dispatcher.claim.check_fence()
            gone = self._retire(keep, force=force) if keep is not None else []
            return prune(self._storage, self._finder.scan(), grace_s=grace_s, own_writer=own).after(gone)

    def _retire(self, keep: Keep, *, force: bool) -> list[str]:
        if self._replicators:
            raise FormatError("prune(keep=…) deletes, in this place only; open the store without its backups for that")
        catalogue = self._finder.scan()
        judgement = judged(self._storage, catalogue, keep)
        if not force:
            refuse_many(judgement, self.url, keep)
        return retire(self._storage, catalogue, judgement, keep)


def check_durable(durable: str, has_backup: bool) -> None:
    """Nothing, if ``durable`` is what a store with or without a backup can promise (FormatError)."""
    if durable not in ("primary", "backup"):
        raise FormatError(f"durable={durable!r} must be 'primary' or 'backup'")
    if durable == "backup" and not has_backup:
        raise FormatError("durable='backup' needs a store that was opened with backup=URL")
