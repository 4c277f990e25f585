"""Where the blocks of a save are taken from: live memory, or a copy that was made in time."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from ckptstore.engine.buffers import Buffer, BufferPool, StagingArea
from ckptstore.engine.plan import Block, Change, Plan, PlannedFile
from ckptstore.engine.workers import run


class StateMoved(Exception):  # noqa: N818 - an event that is dealt with, never seen by a user
    """A tensor was written to while it was read in place, so what was read may be torn."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class Taken(NamedTuple):
    """A block to be written, and a buffer: ``staged``, with its bytes, or empty, to be filled from live memory."""

    block: Block
    buffer: Buffer
    staged: bool


class Stage:
    """The blocks of one save: which lie in live memory only, and copies of the others.

    The pipeline takes blocks from the front and writes them. Whoever is about to change the state copies what would
    change with it, or sees it taken (``copy_rest``). A block that is being copied is waited for by the pipeline, and
    has its buffer already, so that neither side ever waits for the other in a circle.
    """

    def __init__(self, plan: Plan, pool: BufferPool, area: StagingArea, *, safe: Change) -> None:
        """``safe``: all that may change from the beginning: ``ALL`` where nothing can change while this save runs."""
        self.plan = plan
        self.moved: str | None = None
        """The tensor whose writing made what was read worthless."""
        self._pool, self._area = pool, area
        self.safe = safe
        """What may change already."""
        # One condition for both, as whoever waits for a buffer also waits for there being nothing left to copy.
        self._changed = area.changed
        self._pending = deque(plan.blocks())
        self._live = set(self._pending)
        self._copies: dict[Block, Buffer] = {}
        self._dropped: set[PlannedFile] = set()
        # By what changes them: a step needn't wait for frozen blocks, of which one is being read all the time.
        self._reading = dict.fromkeys(Change, 0)
        self._copied_now: Change | None = None
        """What is being copied: all that changes with it. The pipeline leaves it to the copiers, who are faster."""
        self._starved = False
        """The copiers have no buffer, so that the pipeline must help."""
        self._over = False
        self._broken: BaseException | None = None

    # -- the pipeline's side -----------------------------------------------------------------------------

    def blocks(self) -> Iterator[Taken]:
        """Every block once; from any thread, one at a time. Each must be given back.

        Raises:
            StateMoved: they are worthless.
        """
        while (taken := self._next()) is not None:
            yield taken

    def _next(self) -> Taken | None:
        empty: Buffer | None = None
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(self._can_take)
                    self._check_usable()
                    if not self._pending:
                        return None
                    block = self._pending[0]
                    if block in self._copies:
                        self._pending.popleft()
                        return Taken(block, self._copies.pop(block), staged=True)
                    if empty is not None:
                        self._pending.popleft()
                        self._live.discard(block)
                        self._reading[block.changes_with] += 1
                        taken, empty = Taken(block, empty, staged=False), None
                        return taken
                # Before the block: whoever is about to change the state waits for those that are being read.
                empty = self._pool.take()
        finally:
            if empty is not None:
                self._pool.give_back(empty)

    def _can_take(self) -> bool:
        front = self._pending[0] if self._pending else None
        if front is None or front in self._copies or self._unusable:
            return True
        left_alone = self._copied_now is not None and front.changes_with <= self._copied_now and not self._starved
        return front in self._live and not left_alone

    @contextmanager
    def reading(self, block: Block) -> Iterator[None]:
        """Around reading a block from live memory; nobody changes the state before this ends.

        Raises:
            StateMoved: the bytes may be torn.
        """
        try:
            yield
            if self.safe < block.changes_with:
                self._check(block.file.moved(block.number))
        finally:
            self._stop_reading(block.changes_with)

    @contextmanager
    def peek(self, block: Block) -> Iterator[Buffer | None]:
        """The copy of a block that ``blocks`` hasn't given out yet, or None: then it may be read from live memory.

        Raises:
            StateMoved: as ``reading``.
        """
        with self._changed:
            self._check_usable()
            copy = self._copies.get(block)
            self._reading[block.changes_with] += copy is None
        if copy is not None:
            yield copy
            return
        with self.reading(block):
            yield None

    def drop(self, file: PlannedFile) -> None:
        """Forget the blocks of a file that needn't be written."""
        with self._changed:
            self._dropped.add(file)
            self._pending = deque(block for block in self._pending if block.file is not file)
            self._live = {block for block in self._live if block.file is not file}
            for block in [block for block in self._copies if block.file is file]:
                self._area.give_back(self._copies.pop(block))
            self._changed.notify_all()

    def give_back(self, taken: Taken) -> None:
        """The buffer is needed no longer."""
        (self._area if taken.staged else self._pool).give_back(taken.buffer)

    def check(self) -> None:
        """Nothing, if all that was read in place is what it was when the save was asked for.

        Raises:
            StateMoved: it isn't.
        """
        with self._changed:
            self._check_usable()
            self._reading[Change.NOTHING] += 1
        try:
            self._check(self._find_moved())
        finally:
            self._stop_reading(Change.NOTHING)

    def end(self) -> None:
        """The save has ended, well or not: nothing is taken any more, copies are given back."""
        with self._changed:
            self._over = True
            self._pending.clear()
            self._live.clear()
            for copy in self._copies.values():
                self._area.give_back(copy)
            self._copies.clear()
            self._changed.notify_all()

    def break_off(self, error: BaseException) -> None:
        """Have the pipeline fail with ``error``."""
        with self._changed:
            self._broken = self._broken or error
            self._changed.notify_all()

    @property
    def _unusable(self) -> bool:
        return self._over or self.moved is not None or self._broken is not None

    def _check_usable(self) -> None:
        if self._broken is not None:
            raise self._broken
        if self.moved is not None:
            raise StateMoved(self.moved)

    def _find_moved(self) -> str | None:
        if self.safe >= Change.ALL:
            return None
        return self.plan.moved(frozen_only=self.safe >= Change.TRAINED)

    def _check(self, name: str | None) -> None:
        if name is not None:
            self.moved = self.moved or name
            raise StateMoved(name)

    def _stop_reading(self, changes_with: Change) -> None:
        with self._changed:
            self._reading[changes_with] -= 1
            self._changed.notify_all()

    # -- the side of whoever is about to change the state ------------------------------------------------

    def copy_rest(self, change: Change, threads: int) -> int:
        """Copy what would change and lies in live memory only, or see it read by the pipeline; then it may change.

        Args:
            change: what is about to change.
            threads: that copy; the caller is blocked anyway.

        Returns:
            The bytes copied here.

        Raises:
            StateMoved: the state has changed already, and what was read of it may be torn.
        """
        copied = self._copy_live(change, threads)
        with self._changed:
            self._changed.wait_for(lambda: self._over or not self._is_read(change))
            if not self._over:
                self._check(self.moved or self._find_moved())
            # In the same breath: a check that came between would take what now happens for a tear.
            self.safe = max(self.safe, change)
        return copied

    def _copy_live(self, change: Change, threads: int) -> int:
        copied: list[int] = []
        with self._changed:
            rest = deque(b for b in self._pending if b in self._live and b.changes_with <= change)
            before, self._copied_now = self._copied_now, change
        try:
            if rest:
                run(self._to_copy(rest), lambda work: copied.append(self._copy(*work)), threads=threads)
        finally:
            with self._changed:
                self._copied_now = before
                self._changed.notify_all()
        return sum(copied)

    def _to_copy(self, rest: deque[Block]) -> Iterator[tuple[Block, Buffer]]:
        while True:
            with self._changed:
                # The buffer first: a block that is claimed and has none would be waited for by those who give back.
                while (buffer := self._area.try_take()) is None and self._drop_taken(rest) and not self._unusable:
                    self._starved = True
                    self._changed.notify_all()
                    self._changed.wait()
                self._starved = False
                if not self._drop_taken(rest) or self._unusable:
                    if buffer is not None:
                        self._area.give_back(buffer)
                    return
                assert buffer is not None
                block = rest.popleft()
                self._live.discard(block)
            yield block, buffer

    def _is_read(self, change: Change) -> bool:
        """Whether something that would change is being read."""
        return any(count for kind, count in self._reading.items() if kind <= change)

    def _drop_taken(self, rest: deque[Block]) -> bool:
        """Whether one of ``rest`` still lies in live memory only, and then its first one does."""
        while rest and rest[0] not in self._live:
            rest.popleft()
        return bool(rest)

    def _copy(self, block: Block, buffer: Buffer) -> int:
        try:
            with memoryview(buffer) as view, view[: block.length] as raw:
                block.file.fill(block.number, raw)
        except BaseException as error:
            # The pipeline meets it, and fails with it: whoever is about to change the state is not stopped by it.
            self._broken = error
            if not isinstance(error, Exception):
                raise
            return 0
        finally:
            with self._changed:
                if self._unusable or block.file in self._dropped:
                    self._area.give_back(buffer)
                else:
                    self._copies[block] = buffer
                self._changed.notify_all()
        return block.length
