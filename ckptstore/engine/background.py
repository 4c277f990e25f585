"""A save behind the training step: a thread that runs the pipeline, and the handle that its caller holds."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Literal, Protocol

from ckptstore.engine.bounded import apart
from ckptstore.engine.catalogue import Checkpoint
from ckptstore.engine.plan import Change, Plan
from ckptstore.engine.saver import Job, Tools
from ckptstore.engine.stage import Stage, StateMoved
from ckptstore.engine.stopwatch import Stopwatch
from ckptstore.engine.workers import cores
from ckptstore.errors import CheckpointError, SaveFailedError, StorageError

_log = logging.getLogger("ckptstore")
_HEAD_START_S = 0.02
"""How long at most a save waits for its caller to go on; needed only where a signal handler keeps the caller."""
_TRIES = 5
"""How often a save is begun of a state that is written to while it is read."""


class TornReadWarning(UserWarning):
    """Something else than an optimizer's step wrote to a tensor while an overlapped save read it in place."""


class SaveHandle:
    """One save in the background. Its error is raised by ``wait`` and ``result``, or else by the store's next call.

    Attributes:
        mode: "async" or "overlapped"; an overlapped save of a state that no optimizer owns is "async".
        step: of the checkpoint.
        call_s: seconds that the call of ``save`` took.
        fence_s: seconds that training was stopped later, before a step or a load.
        seconds: from the call until the checkpoint was durable, or until now.
        copied_bytes: of the state, copied while the caller waited. The rest was read in place.
        raw_bytes: of the state; 0 until the files are planned.
    """

    def __init__(
        self,
        tools: Tools,
        job: Job,
        save: Callable[[Job, Stage], Checkpoint],
        *,
        mode: Literal["async", "overlapped"],
        began: float,
        warned: set[str],
    ) -> None:
        """``warned`` is shared by the handles of a store: of what its user was warned already."""
        self.mode = mode
        self.step = job.facts.step
        self.call_s = self.fence_s = 0.0
        self.copied_bytes = self.raw_bytes = 0
        self._warning: str | None = None
        self._warned = warned
        self._tools, self._save = tools, save
        self._job = replace(job, watch=Stopwatch(began, self._stalled))
        self._began, self._ended = began, 0.0
        self._pid = os.getpid()
        # Held until the end. No condition: a signal handler that waits, too, would take the notice from its own thread.
        self._running = threading.Lock()
        self._running.acquire()
        self._changed = threading.Condition()
        self._holder: int | None = None
        self._stage: Stage | None = None
        self._checkpoint: Checkpoint | None = None
        self._error: BaseException | None = None
        self._told = self._begun = False
        self._given_up: BaseException | None = None
        self._on_end: Callable[[], None] = lambda: None
        self._caller = threading.Lock()
        self._caller.acquire()
        # Never a daemon, which Python drops at its end, also where the caller is one.
        self._thread = threading.Thread(target=self._run_behind, name="ckptstore-save", daemon=False)

    def __repr__(self) -> str:
        how = "running" if not self._ended else "failed" if self._error else "done"
        return f"<ckptstore.SaveHandle step {self.step} {self.mode} {how}>"

    # -- what its caller asks ----------------------------------------------------------------------------

    @property
    def stall_s(self) -> float:
        """Seconds that the caller was kept from training so far."""
        return self.call_s + self.fence_s

    @property
    def seconds(self) -> float:
        return (self._ended or time.perf_counter()) - self._began

    @property
    def bytes_per_second(self) -> float:
        """Raw bytes of the state a second, from the call until it was durable, or until now."""
        return self.raw_bytes / self.seconds

    def done(self) -> bool:
        """Whether the save has ended, well or not."""
        return bool(self._ended)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the checkpoint is durable; False after ``timeout`` seconds.

        Raises:
            SaveFailedError, CommitUnknownError, StaleWriterError: as ``Store.save``.
        """
        self._check_process()
        self.join(timeout)
        self.tell()
        if self._error is not None and self._ended:
            raise self._error
        return self.done()

    def result(self, timeout: float | None = None) -> Checkpoint:
        """The checkpoint, once it is durable.

        Raises:
            TimeoutError: it isn't after ``timeout`` seconds; the save goes on.
            SaveFailedError, CommitUnknownError, StaleWriterError: as ``Store.save``.
        """
        if not self.wait(timeout):
            raise TimeoutError(f"the save of step {self.step} is still running after {timeout} s")
        assert self._checkpoint is not None
        return self._checkpoint

    def wait_staged(self) -> None:
        """Return as soon as the state may be changed by any means: all of it is copied, or read already."""
        self._check_process()
        self.finish_reading(Change.ALL)

    # -- what the store asks -----------------------------------------------------------------------------

    def start(self, on_end: Callable[[], None], *, here: bool) -> None:
        """Begin; ``here``: in the caller's thread. ``on_end`` is called in the save's thread when it has ended."""
        self._on_end = on_end
        # No room for a thread, or the interpreter is ending: then the caller waits.
        if here or _at_exit() or not self._start_thread():
            self._run()

    def let_go(self) -> None:
        """The caller goes on now; to be called once."""
        self._caller.release()

    def running(self) -> bool:
        """Whether it was begun and has not ended."""
        return self._begun and not self.done()

    def give_up(self, error: BaseException) -> None:
        """Fail with ``error``, unless it has ended: the state may change, and is not copied."""
        with self._changed:
            self._given_up = error
            if self._stage is not None:
                self._stage.break_off(error)

    def join(self, timeout: float | None = None) -> None:
        """Wait for the end, whatever it is, at most ``timeout`` seconds."""
        if self._running.acquire(timeout=-1 if timeout is None else max(0, timeout)):
            self._running.release()

    def tell(self) -> BaseException | None:
        """The error, if the save has failed and nobody has been told. A tear is warned of, once for each store."""
        if self._warning is not None and not self._warned:
            self._warned.add("torn")
            warnings.warn(self._warning, TornReadWarning, stacklevel=4)
        if not self._ended or self._told:
            return None
        self._told = True
        _untold.discard(self)
        return self._error

    def finish_reading(self, change: Change) -> None:
        """Return when ``change`` may happen: what it changes was read by then, or copied."""
        reading = self._stage
        if self.done() or (reading is not None and reading.safe >= change):
            # Without a lock, which a thread that gives way to all others might hold.
            return
        began = time.perf_counter()
        try:
            # A signal handler that interrupts the caller may wait for this save: it finds no lock held below it.
            apart(lambda: self._finish_reading(change))
        finally:
            self.fence_s += time.perf_counter() - began

    def _finish_reading(self, change: Change) -> None:
        with self._turn():
            stage = self._planned_stage()
            if stage is not None:
                self._copy_rest(stage, change)

    def _copy_rest(self, stage: Stage, change: Change) -> None:
        try:
            self.copied_bytes += stage.copy_rest(change, cores())
        except StateMoved:
            # Its thread waits; where another one writes, the pipeline will see it. What fails here fails the save, not
            # training.
            with contextlib.suppress(SaveFailedError, StateMoved):
                self.copied_bytes += self._begin_again(stage).copy_rest(Change.ALL, cores())

    # -- the save's own thread ---------------------------------------------------------------------------

    def _start_thread(self) -> bool:
        try:
            self._thread.start()
        except RuntimeError:
            return False
        self._begun = True
        return True

    def _run_behind(self) -> None:
        # Planning holds the interpreter lock for milliseconds, which the caller would wait for.
        self._caller.acquire(timeout=_HEAD_START_S)
        self._run()

    def _run(self) -> None:
        self._begun = True
        try:
            self._checkpoint = self._attempts(self._first_stage())
        except BaseException as error:
            self._error = error if isinstance(error, CheckpointError) else _failed(self.step, error)
            _untold.add(self)
        finally:
            last, self._stage = self._stage, None
            if last is not None:
                last.end()
                last.plan.release()
            if self.mode == "overlapped":
                # Async needs the state's size every time, give or take what the pipeline was faster to read.
                self._tools.area.trim()
            self._on_end()
            del self._job, self._save
            self._ended = time.perf_counter()
            self._running.release()
            with self._changed:
                self._changed.notify_all()

    def _stalled(self) -> float:
        """Seconds that the caller has waited so far; until its call has returned, all of them."""
        return self.stall_s if self.call_s else time.perf_counter() - self._began

    def _first_stage(self) -> Stage:
        plan = self._tools.plan(self._job.state, self._job.share)
        self.raw_bytes = plan.raw_bytes
        return self._next_stage(plan)

    def _next_stage(self, plan: Plan) -> Stage:
        with self._changed:
            stage = self._stage = self._tools.stage(plan, safe=Change.NOTHING)
            if self._given_up is not None:
                stage.break_off(self._given_up)
            self._changed.notify_all()
        return stage

    def _attempts(self, stage: Stage) -> Checkpoint:
        for _ in range(_TRIES):
            try:
                return self._save(self._job, stage)
            except StateMoved as moved:
                name = moved.name
                stage = self._successor(stage)
        raise SaveFailedError(
            f"step {self.step} was not saved: {name!r} is written to all the time by something else than an "
            "optimizer's step. Save where nothing writes, with mode='async'",
            step=self.step,
        )

    def _successor(self, stage: Stage) -> Stage:
        """The stage that takes the place of a torn one: begun here, or at the fence by the training thread."""
        with self._changed:
            # Who holds the turn may be about to replace it, and then waits for what is read of the new one.
            self._changed.wait_for(lambda: self._stage is not stage or self._holder is None)
            if self._stage is stage:
                self._begin_again(stage)
            assert self._stage is not None
            return self._stage

    def _begin_again(self, torn: Stage) -> Stage:
        """Have the save begin anew with the state as it is now.

        Raises:
            SaveFailedError: there was a step meanwhile, so that the state now is another step's.
        """
        if torn.safe >= Change.TRAINED:
            raise SaveFailedError(
                f"step {self.step} was not saved: the frozen {torn.moved!r} was written to after the next step, while "
                "it was read in place. Call wait_staged() of the handle before you write to it, or save with "
                "mode='async'",
                step=self.step,
            )
        self._warning = (
            f"step {self.step}: {torn.moved!r} was written to, by something else than an optimizer's step, while it "
            "was read in place. The save was begun again, and holds the state after that writing. Call wait_staged() "
            "of the handle before you write by hand, save after it, or save with mode='async'"
        )
        torn.end()
        torn.plan.rebase()
        return self._next_stage(torn.plan)

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """Held by the thread that is about to change the state. Reentrant, for the sake of signal handlers."""
        me = threading.get_ident()
        with self._changed:
            self._changed.wait_for(lambda: self._holder in (None, me))
            before, self._holder = self._holder, me
        try:
            yield
        finally:
            with self._changed:
                self._holder = before
                self._changed.notify_all()

    def _planned_stage(self) -> Stage | None:
        """The stage, as soon as the files are planned; None where the save has ended."""
        with self._changed:
            self._changed.wait_for(lambda: self._stage is not None or self.done())
            return self._stage

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise StorageError(
                f"the save of step {self.step} runs in process {self._pid}; in its fork {os.getpid()} it can't be "
                "waited for"
            )


class Window(Protocol):
    """The time in which a save reads in place; see ``state.staging``."""

    def open(self, close: Callable[[bool], None]) -> None: ...
    def shut(self) -> None: ...


class Background:
    """The saves of one store in the background: several where threads or a signal handler begin them at once."""

    def __init__(self) -> None:
        self.warned: set[str] = set()
        self._handles: list[SaveHandle] = []

    def busy(self) -> bool:
        """Whether one is running."""
        return any(handle.running() for handle in list(self._handles))

    def settle(self) -> None:
        """Wait for the end of all that are running.

        Raises:
            SaveFailedError, CommitUnknownError, StaleWriterError: one failed, and nobody has been told.
        """
        while self.busy():
            for handle in list(self._handles):
                if handle.running():
                    handle.join()
        for handle in list(self._handles):
            if handle.done():
                error = handle.tell()
                # Another thread may be doing the same.
                with contextlib.suppress(ValueError):
                    self._handles.remove(handle)
                if error is not None:
                    raise error

    def start(self, handle: SaveHandle, window: Window | None, first: Change, *, here: bool) -> None:
        """Start a save, ``here`` in the caller's thread; return as soon as ``first`` may change."""
        self._handles.append(handle)
        try:
            if window is not None:
                window.open(lambda frozen: handle.finish_reading(Change.ALL if frozen else Change.TRAINED))
            handle.start(on_end=window.shut if window is not None else lambda: None, here=here)
            handle.let_go()
            if first is not Change.NOTHING:
                handle.finish_reading(first)
        except BaseException as error:
            # Interrupted: its caller may go on and change what is not copied.
            handle.give_up(error)
            raise


def _at_exit() -> bool:
    """Whether a function runs that was registered with ``atexit``: no thread begun now would be waited for."""
    main = threading.main_thread()
    return threading.current_thread() is main and not main.is_alive()


def _failed(step: int, error: BaseException) -> SaveFailedError:
    failed = SaveFailedError(f"step {step} was not saved: {error!r}. Older checkpoints are untouched", step=step)
    failed.__cause__ = error
    return failed


_untold: set[SaveHandle] = set()


def _tell_at_exit() -> None:
    for handle in list(_untold):
        _log.error("a save in the background failed, and nobody asked for its result: %s", handle.tell())


# Runs after the threads of all saves have ended.
atexit.register(_tell_at_exit)
os.register_at_fork(after_in_child=_untold.clear)
