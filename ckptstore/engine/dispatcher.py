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
from ckptstore.engine.facts import Facts
from ckptstore.engine.finder import Finder
from ckptstore.engine.plan import Change
from ckptstore.engine.reader import Contents, DataFile
from ckptstore.engine.saver import Captured, Durable, Job, Saver, Tools
from ckptstore.engine.stage import Stage
from ckptstore.engine.workers import Progress
from ckptstore.errors import SaveFailedError, StorageError
from ckptstore.format.records import StoreRecord

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

    def save(
        self, state: Captured, facts: Facts, durable: Durable = "primary", progress: Progress | None = None
    ) -> Checkpoint:
        """Save now.

        Raises:
            SaveFailedError, CommitUnknownError, StaleWriterError: as ``Saver.save``.
        """
        job = Job(state, facts, durable, progress)
        return self._save(job, self._tools.stage(self._tools.plan(state)))

    def save_behind(
        self,
        state: Snapshot,
        facts: Facts,
        durable: Durable,
        progress: Progress | None,
        *,
        mode: Literal["async", "overlapped"],
        began: float,
    ) -> SaveHandle:
        """Save in the background; return as soon as the state may change by what ``mode`` lets change it.

        Args:
            began: when the caller was called, by ``time.perf_counter``.
        """
        from ckptstore.state.staging import settle

        window = settle(state.sources, state.modules, state.optimizers) if mode == "overlapped" else None
        first = Change.FICKLE if any(source.fickle for source in state.sources) else Change.NOTHING
        if window is None:
            mode, first = "async", Change.ALL
        job = Job(state, facts, durable, progress)
        handle = SaveHandle(self._tools, job, self._save, mode=mode, began=began, warned=self.background.warned)
        # A signal handler in the midst of its own thread's save: another thread would wait for that one's end.
        here = self.lock._is_owned()  # type: ignore[attr-defined]
        self.background.start(handle, window, first, here=here)
        handle.call_s, handle.fence_s = time.perf_counter() - began, 0.0
        return handle

    def _save(self, job: Job, stage: Stage) -> Checkpoint:
        checkpoint = self._save_here(job, stage)
        # Without the lock: another thread may save while this one waits for a backup.
        self._committed(checkpoint, job.durable)
        return checkpoint

    def _save_here(self, job: Job, stage: Stage) -> Checkpoint:
        step = job.facts.step
        with self.lock:
            # Again: capturing takes time, in which another thread may have closed the store.
            self._check_writable()
            with _nothing_written(step):
                # Looked at once, for both.
                view = cache(self._finder.view)
                store, id = self.claim.next_id(step, view)
                if self._lender is None and not self._shared:
                    # Only from what lies here can anything be borrowed.
                    own = self._finder.scan if self._finder.backups else view
                    self._lender = self._earlier_lender(stage, step, own)
            self._lender = self._saver(store, self._lender, step).save(id, job, stage)
            return Checkpoint.of(self._lender.record)

    def repeat(
        self,
        past: Contents,
        facts: Facts,
        carry: Callable[[DataFile, str], None],
        *,
        lies_here: bool,
        durable: Durable,
    ) -> Checkpoint:
        """Save anew, as the newest checkpoint, what ``past`` holds, which was proven.

        Args:
            carry: as ``Saver.repeat``.
            lies_here: it can be borrowed from.

        Raises:
            SaveFailedError, CommitUnknownError, StaleWriterError: as ``Saver.save``.
        """
        with self.lock:
            self._check_writable()
            with _nothing_written(facts.step):
                store, id = self.claim.next_id(facts.step, self._finder.view)
            files = [file.entry for file in past.files]
            lender = Lender.of(past.commit, past.digest, files) if lies_here else None
            self._lender = self._saver(store, lender, facts.step).repeat(id, past, facts, carry)
            checkpoint = Checkpoint.of(self._lender.record)
        self._committed(checkpoint, durable)
        return checkpoint

    def _saver(self, store: StoreRecord, lender: Lender | None, step: int) -> Saver:
        another_id = lambda: self.claim.next_id(step, self._finder.view)[1]  # noqa: E731
        return Saver(self._tools, store, lender, self.claim.check_fence, another_id)

    def _earlier_lender(self, stage: Stage, step: int, scan: Callable[[], Catalogue]) -> Lender | None:
        """The newest checkpoint of an earlier process, if its files may be of use."""
        checkpoints = scan().checkpoints
        latest = checkpoints[-1] if checkpoints else None
        if latest is None:
            return None
        wanted = {file.name for file in stage.plan.files if file.frozen or latest.step == step}
        if not wanted:
            return None
        tools = self._tools
        return Lender.read(tools.storage, latest.record, wanted, pool=tools.pool, threads=tools.threads)
