"""Read everything again, slowly, while nothing else is to be done: damage is found before the bytes are needed."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing

from ckptstore.engine.catalogue import Catalogue, Checkpoint
from ckptstore.engine.contents import Contents, read_contents
from ckptstore.engine.finder import Finder
from ckptstore.engine.reader import BlockTask, open_file, read_stored
from ckptstore.engine.rescue import Rescuer
from ckptstore.errors import CheckpointError, FormatError, IntegrityError
from ckptstore.format.tensorfile import BLOCK_BYTES
from ckptstore.maintenance.keep import is_buried
from ckptstore.maintenance.repair import Repairer, is_there
from ckptstore.maintenance.verifications import Tally, remember

_log = logging.getLogger("ckptstore")

_BUSY_S = 0.2


class Scrubber:
    """Reads each block of a store once in ``period_s`` seconds, the newest checkpoint first, and repairs what is bad.

    Args:
        finder: of the store.
        repairer: of its storage.
        busy: while it says so, nothing is read.
    """

    def __init__(self, finder: Finder, repairer: Repairer, period_s: float, busy: Callable[[], bool]) -> None:
        self.read_blocks = 0
        self._finder, self._repairer, self._period_s, self._busy = finder, repairer, period_s, busy
        self._ending = threading.Event()
        self._told: set[str] = set()
        self._tally = Tally("scrub", None, 0)
        self._thread = threading.Thread(target=self._run, name="ckptstore-scrub", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def end(self) -> None:
        """Stop, after the block that is being read."""
        self._ending.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._ending.is_set():
            try:
                self._pass(self._finder.scan())
            except CheckpointError as error:
                # Not reachable now, or deleted meanwhile: the next time will tell.
                _log.debug("scrubbing was broken off: %s", error)
                self._ending.wait(self._period_s / 100)
            if not self._ending.is_set():
                self._ending.wait(self._period_s / 1000)

    def _pass(self, catalogue: Catalogue) -> None:
        """Read all once, and put down what came of it."""
        checkpoints, began = catalogue.checkpoints, time.monotonic()
        if not checkpoints:
            return
        blocks = sum(-(-c.stored_bytes // BLOCK_BYTES) + c.files for c in checkpoints)
        self._tally = Tally("scrub", checkpoints[-1], len(checkpoints), damages=len(catalogue.damaged))
        self._scrub(checkpoints, self._period_s / max(1, blocks))
        if not self._ending.is_set():
            self._tally.seconds = time.monotonic() - began
            remember(self._repairer.storage, self._tally)

    def _scrub(self, checkpoints: Sequence[Checkpoint], pause_s: float) -> None:
        proven: set[str] = set()
        for checkpoint in reversed(checkpoints):
            if self._ending.is_set():
                return
            with closing(Rescuer(self._repairer.others)) as rescuer:
                try:
                    self._checkpoint(checkpoint, rescuer, proven, pause_s)
                except (IntegrityError, FormatError) as error:
                    self._found(checkpoint, error)
            if rescuer.met and is_there(self._repairer.storage, checkpoint):
                self._repair(rescuer)

    def _checkpoint(self, checkpoint: Checkpoint, rescuer: Rescuer, proven: set[str], pause_s: float) -> None:
        storage = self._repairer.storage
        contents = read_contents(storage, checkpoint.record, rescuer)
        for file in contents.files:
            if file.key in proven:
                continue
            proven.add(file.key)
            with closing(open_file(storage, file, checkpoint.id, rescuer)) as reader:
                for task in self._paced(BlockTask(file, reader, n, []) for n in range(len(file.entry.blocks))):
                    self._block(checkpoint, contents, task, rescuer)
                    self._ending.wait(pause_s)

    def _paced(self, tasks: Iterator[BlockTask]) -> Iterator[BlockTask]:
        for task in tasks:
            while self._busy() and not self._ending.is_set():
                self._ending.wait(_BUSY_S)
            if self._ending.is_set():
                return
            yield task

    def _block(self, checkpoint: Checkpoint, contents: Contents, task: BlockTask, rescuer: Rescuer) -> None:
        with self._repairer.carrier.pool.lease() as buffers:
            try:
                read_stored(contents, task, buffers[0], rescuer).release()
            except IntegrityError as error:
                self._found(checkpoint, error)
        self.read_blocks += 1
        self._tally.read_bytes += task.file.entry.blocks[task.number].length

    def _found(self, checkpoint: Checkpoint, error: CheckpointError) -> None:
        if is_buried(self._repairer.storage, checkpoint):
            return
        self._tally.damages += 1
        key = f"{error.key} {getattr(error, 'block', None)}"
        if key not in self._told:
            self._told.add(key)
            _log.error("damage found while scrubbing, and no backup to repair it from: %s", error)

    def _repair(self, rescuer: Rescuer) -> None:
        failures = self._repairer.noted(rescuer)
        for damage in rescuer.met:
            _log.warning("damage found while scrubbing: %s", damage.problem)
        self._tally.damages += len(rescuer.met) if failures else 0
        self._tally.repaired += 0 if failures else len(rescuer.met)
        if failures:
            _log.error("repairing it failed: %s", failures[0])
        else:
            _log.warning("it is repaired, from a backup")
