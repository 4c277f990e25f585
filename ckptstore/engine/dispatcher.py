"""The saving side of one store: who may save, from whom it borrows, and what runs in the background."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Literal

from ckptstore.engine.background import Background, SaveHandle
from ckptstore.engine.borrow import Lender
from ckptstore.engine.catalogue import Catalogue, Checkpoint
from ckptstore.engine.claim import Claim
from ckptstore.engine.commit import read_fate
from ckptstore.engine.contents import Contents, DataFile
from ckptstore.engine.crew import Crew
from ckptstore.engine.facts import Facts
from ckptstore.engine.finder import Finder
from ckptstore.engine.joint import JointSaver
from ckptstore.engine.plan import Change
from ckptstore.engine.rendezvous import Begun, Bid, Rendezvous
from ckptstore.engine.saver import Durable, Job, Saver, Tools
from ckptstore.engine.share import Share
from ckptstore.engine.sharer import SAMPLE_CHARACTERS
from ckptstore.engine.sharing import table_of
from ckptstore.engine.stage import Stage
from ckptstore.engine.stopwatch import Stopwatch
from ckptstore.errors import SaveFailedError, StorageError
from ckptstore.format.digest import block_digest
from ckptstore.format.layout import parse_id
from ckptstore.format.records import CommitRecord, StoreRecord

if TYPE_CHECKING:
    from ckptstore.state.capture import Snapshot


@contextmanager
def _nothing_written(step: int) -> Iterator[None]:
    """What fails in the block fails a save that wasn't begun."""
    try:
        yield
    except StorageError as error:
        message = f"step {step} was not saved: {error}. Older checkpoints are untouched"
        raise SaveFailedError(message, step=step) from error


class Dispatcher:
    """Saves one state after the other, at once or in the background.

    Attributes:
        claim: the right to save.
        lock: held while a save runs. Reentrant: a signal handler may save in the midst of a save of its own thread.
        background: the saves that their callers don't wait for.
    """

    def __init__(
        self,
        tools: Tools,
        finder: Finder,
        *,
        shared: bool,
        check_writable: Callable[[], None],
        committed: Callable[[Checkpoint, Durable], None],
    ) -> None:
        self.claim = Claim(tools.storage, finder.backups, shared=shared)
        self.lock = threading.RLock()
        self.background = Background()
        self._tools, self._finder, self._shared = tools, finder, shared
        self._check_writable, self._committed = check_writable, committed
        self._lender: Lender | None = None
        self._rendezvous: Rendezvous | None = None

    def agree(self, crew: Crew, ask: Callable[[], tuple[Snapshot, Facts]]) -> tuple[Snapshot, Facts, Share]:
        """Come together with the other ranks of ``crew`` for a save: what is this rank's share of the state.

        Args:
            ask: gives this rank's state; its errors reach all ranks.

        Raises:
            StateError, SaveFailedError: as ``Rendezvous.agree``.
        """
        from ckptstore.state.samples import samples

        asked: list[tuple[Snapshot, Facts]] = []

        def bid() -> Bid:
            state, facts = ask()
            asked.append((state, facts))
            # Where a shard lies tells already who else has it.
            whole = [source for source in state.sources if source.shard is None]
            found = dict(zip(map(id, whole), samples(whole), strict=True))
            digests = [block_digest("sha256", found.get(id(s), b""))[:SAMPLE_CHARACTERS] for s in state.sources]
            return Bid(facts, table_of(state.sources, state.elements), digests)

        if self._rendezvous is None:
            self._rendezvous = Rendezvous(crew, self._tools.storage)
        share, task = self._rendezvous.agree(bid, self._begin)
        ((state, facts),) = asked
        cut = {number: (begin, count) for number, (begin, count) in task["cut"].items()}
        return state.divided(set(task["skip"]), task["rename"], cut), facts, share

    def _begin(self, step: int) -> Begun:
        """On rank 0: the id of a save by all ranks."""
        with self.lock:
            self._check_writable()
            view = cache(self._finder.view)
            with _nothing_written(step):
                store, id = self.claim.next_id(step, view, look=False)
                first = self._lender is None and not self._shared
                latest = self._latest(view, None) if first else None
            return Begun(store, id, latest.id if latest is not None else None)

    def save(self, job: Job) -> Checkpoint:
        """Save now.

        Raises:
            SaveFailedError, CommitUnknownError, StaleWriterError: as ``Saver.save``.
        """
        return self._save(job, self._tools.stage(self._tools.plan(job.state, job.share)))

    def save_behind(
        self, state: Snapshot, job: Job, *, mode: Literal["async", "overlapped"], began: float
    ) -> SaveHandle:
        """Save in the background; return as soon as the state may change by what ``mode`` lets change it.

        Args:
            state: the job's.
            began: when the caller was called, by ``time.perf_counter``.
        """
        from ckptstore.state.staging import settle

        window = settle(state.sources, state.modules, state.optimizers) if mode == "overlapped" else None
        first = Change.FICKLE if any(source.fickle for source in state.sources) else Change.NOTHING
        if window is None:
            mode, first = "async", Change.ALL
        handle = SaveHandle(self._tools, job, self._save, mode=mode, began=began, warned=self.background.warned)
        # A signal handler in the midst of its own thread's save: another thread would wait for that one's end.
        here = self.lock._is_owned()  # type: ignore[attr-defined]
        self.background.start(handle, window, first, here=here)
        # In this order: call_s tells the save that the call is over.
        handle.fence_s, handle.call_s = 0.0, time.perf_counter() - began
        return handle

    def _save(self, job: Job, stage: Stage) -> Checkpoint:
        share = job.share
        if share is not None:
            return self._lead(job, stage, share) if share.crew.leads else self._follow(job, stage, share)
        checkpoint = self._save_here(job, stage)
        # Without the lock: another thread may save while this one waits for a backup.
        self._committed(checkpoint, job.durable)
        return checkpoint

    def _lead(self, job: Job, stage: Stage, share: Share) -> Checkpoint:
        """Save as rank 0, and tell the others what came of it."""
        try:
            checkpoint = self._save_here(job, stage)
            if job.durable == "backup":
                self._committed(checkpoint, job.durable)
        except Exception as error:
            # Not what interrupts, which may come after the effect: then the register tells them.
            share.announce(error, None)
            raise
        share.announce(None, checkpoint.record)
        if job.durable != "backup":
            self._committed(checkpoint, job.durable)
        return checkpoint

    def _follow(self, job: Job, stage: Stage, share: Share) -> Checkpoint:
        """Save as another rank; the copies in the backups are rank 0's business."""
        try:
            return self._save_here(job, stage)
        except BaseException as error:
            # Nothing, if it was told by whoever writes: this is for what fails before that.
            share.report({"error": f"rank {share.crew.rank}: {error}"})
            raise

    def _save_here(self, job: Job, stage: Stage) -> Checkpoint:
        step, share = job.facts.step, job.share
        with self.lock:
            # Again: capturing takes time, in which another thread may have closed the store.
            self._check_writable()
            with _nothing_written(step):
                # Looked at once, for both.
                view = cache(self._finder.view)
                store, id = (share.store, share.id) if share is not None else self.claim.next_id(step, view)
                if self._lender is None and not self._shared:
                    self._lender = self._earlier_lender(stage, step, lambda: self._latest(view, share))
            saver = self._saver(store, self._lender, step)
            one = saver if share is None else JointSaver(saver, share)
            self._lender = one.save(id, job, stage)
            return Checkpoint.of(self._lender.record)

    def _latest(self, view: Callable[[], Catalogue], share: Share | None) -> CommitRecord | None:
        """The newest checkpoint that lies here: only from such can anything be borrowed."""
        if share is not None:
            found = read_fate(self._tools.storage, parse_id(share.latest)) if share.latest is not None else None
            return found if isinstance(found, CommitRecord) else None
        checkpoints = (self._finder.scan if self._finder.backups else view)().checkpoints
        return checkpoints[-1].record if checkpoints else None

    def repeat(
        self,
        past: Contents,
        facts: Facts,
        carry: Callable[[DataFile, str], None],
        *,
        lies_here: bool,
        durable: Durable,
        watch: Stopwatch,
    ) -> Checkpoint:
        """Save anew, as the newest checkpoint, what ``past`` holds, which was proven.

        Args:
            carry: as ``Saver.repeat``.
            lies_here: it can be borrowed from.
            watch: began when the caller was called.

        Raises:
            SaveFailedError, CommitUnknownError, StaleWriterError: as ``Saver.save``.
        """
        with self.lock:
            self._check_writable()
            with _nothing_written(facts.step):
                store, id = self.claim.next_id(facts.step, self._finder.view)
            files = [file.entry for file in past.files]
            lender = Lender.of(past.commit, past.digest, files) if lies_here else None
            self._lender = self._saver(store, lender, facts.step).repeat(id, past, facts, carry, watch)
            checkpoint = Checkpoint.of(self._lender.record)
        self._committed(checkpoint, durable)
        return checkpoint

    def _saver(self, store: StoreRecord, lender: Lender | None, step: int) -> Saver:
        another_id = lambda: self.claim.next_id(step, self._finder.view)[1]  # noqa: E731
        return Saver(self._tools, store, lender, self.claim.check_fence, another_id)

    def _earlier_lender(self, stage: Stage, step: int, latest: Callable[[], CommitRecord | None]) -> Lender | None:
        """The newest checkpoint of an earlier process, if its files may be of use."""
        record = latest()
        if record is None:
            return None
        wanted = {file.name for file in stage.plan.files if file.frozen or record.step == step}
        if not wanted:
            return None
        tools = self._tools
        return Lender.read(tools.storage, record, wanted, pool=tools.pool, threads=tools.threads)
