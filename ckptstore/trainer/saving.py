"""One save after the other of a run: what is under way, what came of it, and what all of them cost."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Literal, TypedDict

from ckptstore.engine.background import SaveHandle
from ckptstore.engine.catalogue import Checkpoint
from ckptstore.engine.saver import Durable
from ckptstore.errors import CheckpointError, CommitUnknownError, SaveFailedError, StaleWriterError, StateError
from ckptstore.policy.progress import Costs
from ckptstore.store import SaveMode, Store
from ckptstore.trainer.events import Failed, Saved, Stats


class Facts(TypedDict):
    """What a commit record says of a checkpoint."""

    step: int
    epoch: int
    metrics: Mapping[str, float]
    modes: Mapping[str, Literal["min", "max"]]
    reasons: Sequence[str]


class Saving:
    """The saves of one run into one store; at most one is under way.

    Attributes:
        stats: what they cost so far.
        costs: what the last one that succeeded cost, None before it.
    """

    def __init__(self, store: Store, mode: SaveMode, max_failures: int) -> None:
        self.stats = Stats()
        self.costs: Costs | None = None
        self._store, self._mode, self._max_failures = store, mode, max_failures
        self._handle: SaveHandle | None = None
        self._outcome: Saved | Failed | None = None
        self._waited_s = 0.0
        self._failures = 0

    def busy(self) -> bool:
        """Whether one is under way."""
        return self._handle is not None and not self._handle.done()

    def begin(self, state: object, facts: Facts, *, durable: Durable | None = None) -> SaveHandle | None:
        """Save ``state`` in the background; what comes of it, ``collect`` tells.

        Returns:
            None where it is over already.

        Raises:
            StateError: something in the state can't be stored.
            StaleWriterError: a newer run owns the store.
        """
        if self._mode == "sync":
            self._outcome = self.run(state, facts, durable=durable)
            return None
        began = time.perf_counter()
        try:
            self._handle = self._store.save(state, **facts, mode=self._mode, durable=durable)
        except (StateError, StaleWriterError):
            raise
        except CheckpointError as error:
            took = time.perf_counter() - began
            self._outcome = self._not_saved(facts["step"], error, took, took)
        return self._handle

    def run(self, state: object, facts: Facts, *, durable: Durable | None = None) -> Saved | Failed:
        """Save ``state`` and wait until it is durable.

        Raises:
            StateError: something in the state can't be stored.
            StaleWriterError: a newer run owns the store.
        """
        began = time.perf_counter()
        try:
            checkpoint = self._store.save(state, **facts, durable=durable)
        except (StateError, StaleWriterError):
            raise
        except CheckpointError as error:
            took = time.perf_counter() - began
            return self._not_saved(facts["step"], error, took, took)
        took = time.perf_counter() - began
        return self._saved(checkpoint, took, took)

    def collect(self, *, wait: bool = False) -> Saved | Failed | None:
        """What came of the save that was under way; None where none was, or where it isn't over.

        Raises:
            StaleWriterError: a newer run owns the store.
        """
        handle = self._handle
        if handle is not None:
            if not handle.done():
                if not wait:
                    return None
                self._wait(handle)
            self._handle = None
            self._outcome = self._result(handle)
        outcome, self._outcome = self._outcome, None
        return outcome

    def _wait(self, handle: SaveHandle) -> None:
        began = time.perf_counter()
        handle.join()
        self._waited_s = time.perf_counter() - began

    def _result(self, handle: SaveHandle) -> Saved | Failed:
        stall_s, self._waited_s = handle.stall_s + self._waited_s, 0.0
        try:
            return self._saved(handle.result(), stall_s, handle.seconds)
        except StaleWriterError:
            raise
        except CheckpointError as error:
            return self._not_saved(handle.step, error, stall_s, handle.seconds)

    def _saved(self, checkpoint: Checkpoint, stall_s: float, seconds: float) -> Saved:
        self._failures = 0
        self.costs = Costs(0.0, stall_s, seconds)
        written = checkpoint.stored_bytes - checkpoint.borrowed_bytes
        stats = self.stats
        self.stats = replace(
            stats,
            saves=stats.saves + 1,
            stall_s=stats.stall_s + stall_s,
            written_bytes=stats.written_bytes + written,
        )
        return Saved(checkpoint, self._store.url, stall_s, seconds)

    def _not_saved(self, step: int, error: CheckpointError, stall_s: float, seconds: float) -> Saved | Failed:
        if error.id is not None and not isinstance(error, SaveFailedError | CommitUnknownError):
            # It is here, and didn't reach a backup.
            with suppress(CheckpointError):
                checkpoint = self._store.resolve(error.id)
                warnings.warn(str(error), RuntimeWarning, stacklevel=2)
                return self._saved(checkpoint, stall_s, seconds)
        self._failures += 1
        self.stats = replace(self.stats, failed=self.stats.failed + 1, stall_s=self.stats.stall_s + stall_s)
        return Failed(step, error, self._failures, fatal=self._failures >= self._max_failures)
