"""Checkpoints of other programs, taken into a store."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ckptstore.engine.catalogue import Checkpoint
from ckptstore.engine.workers import Progress
from ckptstore.errors import CheckpointError, FormatError, NotFoundError, StateError
from ckptstore.store import Store
from ckptstore.tools.importing.found import Found
from ckptstore.tools.importing.opened import Opened
from ckptstore.tools.importing.sandbox import Sandbox
from ckptstore.tools.importing.single import find

_REASON_LENGTH = 1000


@dataclass(frozen=True)
class Imported:
    """What became of one checkpoint of another program.

    Attributes:
        kind: what it was found as, as "torch" or "huggingface".
        path: its file or folder.
        step, epoch, metrics: as given, recorded or told by its content; a step of None is told nowhere.
        checkpoint: what it is in the store; None where it isn't there.
        was_there: it had been imported before.
        left_out: path in the state, or file → why it wasn't taken.
        problem: why it couldn't be imported.
    """

    kind: str
    path: Path
    step: int | None
    epoch: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    checkpoint: Checkpoint | None = None
    was_there: bool = False
    left_out: Mapping[str, str] = field(default_factory=dict)
    problem: CheckpointError | None = None


@dataclass(frozen=True)
class ImportReport:
    """What ``import_from`` did.

    Attributes:
        items: all checkpoints that were found, oldest first.
        seconds: how long it took.
    """

    items: Sequence[Imported]
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether all are in the store, or would be."""
        return not any(item.problem for item in self.items)

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """Those that were imported now."""
        return [item.checkpoint for item in self.items if item.checkpoint is not None and not item.was_there]


def import_from(
    source: str | os.PathLike[str],
    store: Store,
    *,
    step: int | None = None,
    epoch: int | None = None,
    metrics: Mapping[str, float] | None = None,
    only: Sequence[str] | None = None,
    only_latest: bool = False,
    without_refused: bool = False,
    again: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> ImportReport:
    """Save in ``store`` what other programs have saved at ``source``, oldest first, so that ``latest`` is the newest.

    A file of ``torch.save`` or safetensors, a sharded model, a folder of ``torch.distributed.checkpoint``, or a folder
    of checkpoints in a layout that is known. Nothing in them runs: pickles are read as data only, in a process of their
    own that may do nothing but read. Tensors are streamed, so that no state has to fit into memory.

    Args:
        source: file or folder, on a local file system.
        store: where to save.
        step: completed optimizer steps, where one checkpoint is imported that doesn't tell, or tells wrong.
        epoch: completed epochs, likewise.
        metrics: more metrics, or better values.
        only: patterns over paths, as "model/*"; all else is left out.
        only_latest: of many checkpoints, only the newest.
        without_refused: leave out what only running code could make, instead of refusing the checkpoint.
        again: also what was imported before.
        dry_run: only tell what would be done.
        progress: called with (bytes done, bytes in all) for each checkpoint, from any thread.

    Returns:
        What became of each. Of several, one that can't be read doesn't keep the others away.

    Raises:
        NotFoundError: there is nothing at ``source`` that is known.
        StateError: it can't be read without running code, or its step is told nowhere.
        FormatError, IntegrityError: it is malformed, hostile or damaged.
        SaveFailedError, CommitUnknownError, StaleWriterError, StorageError: as ``Store.save``; none is tried after it.
    """
    wishes = Wishes(step, epoch, dict(metrics or {}), only, without_refused, again, dry_run)
    with Sandbox() as sandbox:
        return import_found(_found(source), store, wishes, sandbox, only_latest=only_latest, progress=progress)


@dataclass(frozen=True)
class Wishes:
    """What the caller wants, see ``import_from``."""

    step: int | None = None
    epoch: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    only: Sequence[str] | None = None
    without_refused: bool = False
    again: bool = False
    dry_run: bool = False
    skip: Sequence[str] = ()
    reasons: Sequence[str] = ()
    modes: Mapping[str, Any] | None = None


def _found(source: str | os.PathLike[str]) -> list[Found]:
    if "://" in os.fspath(source):
        raise FormatError(f"{source} can't be imported from there: copy it to a local file system")
    path = Path(os.path.abspath(source))
    found = find(path)
    if not found:
        raise NotFoundError(f"nothing in {path} is a checkpoint of a kind that is known", key=str(path))
    return found


def import_found(
    found: Sequence[Found],
    store: Store,
    wishes: Wishes,
    sandbox: Sandbox,
    *,
    only_latest: bool = False,
    progress: Progress | None = None,
) -> ImportReport:
    """As ``import_from``, of what was found."""
    began = time.perf_counter()
    items = [_Item(one, store, wishes, sandbox) for one in found]
    if len(items) > 1:
        _check_single(items, wishes)
        items = _ordered(items)
    if only_latest:
        items = items[-1:]
    there = {(c.step, reason): c for c in ([] if wishes.again else store.checkpoints()) for reason in c.reasons}
    done = []
    for item in items:
        result = item.run(there, progress)
        if result.problem is not None and len(items) == 1:
            raise result.problem
        done.append(result)
    return ImportReport(done, time.perf_counter() - began)


def _check_single(items: Sequence[_Item], wishes: Wishes) -> None:
    if wishes.step is not None or wishes.epoch is not None:
        raise StateError(f"step= and epoch= are for one checkpoint, and {len(items)} were found: name one", path="step")


def _ordered(items: list[_Item]) -> list[_Item]:
    """Oldest first: by the step, where only the content tells it."""
    if all(item.found.step is not None for item in items):
        return items
    for item in items:
        item.look()
    known = [item for item in items if item.step is not None]
    return [*(item for item in items if item.step is None), *sorted(known, key=lambda item: item.step or 0)]


class _Item:
    """One checkpoint on its way in."""

    def __init__(self, found: Found, store: Store, wishes: Wishes, sandbox: Sandbox) -> None:
        self.found, self._store, self._wishes, self._sandbox = found, store, wishes, sandbox
        self.step = found.step
        self._problem: CheckpointError | None = None

    @property
    def reason(self) -> str:
        """Why it is in the store, which tells a second time from the first."""
        created = self.found.created
        saved = f", saved {created.isoformat(timespec='seconds')}" if created is not None else ""
        path = os.path.realpath(self.found.path)
        # Of a long path the end tells more.
        return f"imported from {path[-_REASON_LENGTH:]}{saved}"

    def look(self) -> None:
        """Find out the step."""
        try:
            with self._opened(check=False) as opened:
                self.step = opened.facts.step
        except CheckpointError as error:
            self._problem = error

    def run(self, there: Mapping[tuple[int, str], Checkpoint], progress: Progress | None) -> Imported:
        """Import it, if it isn't there yet."""
        wishes, found = self._wishes, self.found
        step = wishes.step if wishes.step is not None else self.step
        result = Imported(found.kind, found.path, step, left_out=found.left_out, problem=self._problem)
        if self._problem is not None:
            return result
        if step is not None and (known := there.get((step, self.reason))) is not None:
            return _of(result, known, was_there=True)
        try:
            meter = _Meter(progress)
            opened = self._opened(check=not wishes.dry_run, pulse=meter.proven)
        except CheckpointError as error:
            return replace(result, problem=error)
        with opened:
            return self._saved(result, opened, there, meter)

    def _saved(
        self, result: Imported, opened: Opened, there: Mapping[tuple[int, str], Checkpoint], meter: _Meter
    ) -> Imported:
        wishes, facts = self._wishes, opened.facts
        step = wishes.step if wishes.step is not None else facts.step
        epoch = wishes.epoch if wishes.epoch is not None else facts.epoch
        metrics = {**facts.metrics, **wishes.metrics}
        result = replace(result, step=step, epoch=epoch, metrics=metrics, left_out=opened.left_out)
        if step is None:
            return replace(result, problem=_stepless(self.found))
        if (known := there.get((step, self.reason))) is not None:
            return _of(result, known, was_there=True)
        if wishes.dry_run:
            return result
        reasons = [self.reason, *self.found.reasons, *wishes.reasons]
        try:
            saved = self._store.save_streamed(
                opened.state,
                step=step,
                epoch=epoch,
                metrics=metrics,
                modes=wishes.modes,
                reasons=reasons,
                progress=meter.saved,
            )
        except CheckpointError:
            if opened.failure is not None:
                return replace(result, problem=opened.failure)
            raise
        return _of(result, saved, was_there=False)

    def _opened(self, *, check: bool, pulse: Callable[[int], None] = lambda done: None) -> Opened:
        wishes = self._wishes
        return Opened(
            self.found,
            self._sandbox,
            only=wishes.only,
            skip=wishes.skip,
            without_refused=wishes.without_refused,
            check=check,
            pulse=pulse,
        )


class _Meter:
    """One progress of what is proven first, and saved then."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._proven = 0

    def proven(self, done: int) -> None:
        self._proven = max(self._proven, done)
        if self._progress is not None:
            self._progress(done, 0)

    def saved(self, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress(self._proven + done, self._proven + total)


def _of(result: Imported, checkpoint: Checkpoint, *, was_there: bool) -> Imported:
    return replace(
        result,
        step=checkpoint.step,
        epoch=checkpoint.epoch,
        metrics=checkpoint.metrics,
        checkpoint=checkpoint,
        was_there=was_there,
    )


def _stepless(found: Found) -> StateError:
    return StateError(f"{found.path} doesn't tell its step: say it with step= (--step on the command line)", path="step")
