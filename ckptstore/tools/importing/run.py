"""Checkpoints of other programs, taken into a store."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ckptstore.engine.catalogue import Checkpoint
from ckptstore.engine.workers import Progress
from ckptstore.errors import CheckpointError, FormatError, StateError
from ckptstore.store import Store
from ckptstore.tools.importing.facts import may_tell
from ckptstore.tools.importing.found import Found
from ckptstore.tools.importing.layouts import find
from ckptstore.tools.importing.opened import Opened
from ckptstore.tools.importing.sandbox import Sandbox
from ckptstore.tools.importing.told import Told, settled

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
        report = import_found(_found(source), store, wishes, sandbox, only_latest=only_latest, progress=progress)
    if report.checkpoints:
        _warn_of_order(store)
    return report


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
    return find(Path(os.path.abspath(source)))


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
    if len(found) > 1 and not only_latest and (wishes.step is not None or wishes.epoch is not None):
        raise StateError(f"step= and epoch= are for one checkpoint, and {len(found)} were found: name one", path="step")
    broken: dict[Path, CheckpointError] = {}
    if len(found) > 1:
        found = _surveyed(found, wishes, sandbox, broken)
    if only_latest:
        # One that can't be read may be newer: it is told.
        found = [*(one for one in found if one.path in broken), *[one for one in found if one.path not in broken][-1:]]
    importer = _Importer(store, wishes, sandbox, progress)
    done = []
    for one in found:
        item = importer.run(one, broken.get(one.path), alone=len(found) == 1)
        if item.problem is not None and len(found) == 1:
            raise item.problem
        done.append(item)
    return ImportReport(done, time.perf_counter() - began)


def _warn_of_order(store: Store) -> None:
    """Say so where the latest is now one of fewer steps, as where older ones were imported after newer ones."""
    *others, latest = store.checkpoints()
    ahead = max(others, key=lambda one: one.step, default=latest)
    if ahead.step > latest.step:
        warnings.warn(
            f"the latest in {store.url} is now step {latest.step}, and {ahead.id} of step {ahead.step} is there, too: "
            f"if a run shall go on from that, ckptstore rollback {store.url} {ahead.id}",
            UserWarning,
            stacklevel=3,
        )


def _surveyed(
    found: Sequence[Found], wishes: Wishes, sandbox: Sandbox, broken: dict[Path, CheckpointError]
) -> list[Found]:
    """Each save once, oldest first, as their content tells; what can't be read stands in ``broken``."""
    read = []
    for one in found:
        says = Told()
        if may_tell(one):
            try:
                with _opened(one, wishes, sandbox, check=False) as opened:
                    says = opened.told
            except CheckpointError as error:
                broken[one.path] = error
        read.append((one, says))
    return settled(read)


def _opened(
    found: Found, wishes: Wishes, sandbox: Sandbox, *, check: bool, pulse: Callable[[int], None] = lambda done: None
) -> Opened:
    return Opened(
        found,
        sandbox,
        only=wishes.only,
        skip=wishes.skip,
        without_refused=wishes.without_refused,
        check=check,
        pulse=pulse,
    )


class _Importer:
    """Imports one after the other into a store."""

    def __init__(self, store: Store, wishes: Wishes, sandbox: Sandbox, progress: Progress | None) -> None:
        self._store, self._wishes, self._sandbox, self._progress = store, wishes, sandbox, progress
        known = [] if wishes.again else store.checkpoints()
        self._there = {(one.step, reason): one for one in known for reason in one.reasons}

    def run(self, found: Found, problem: CheckpointError | None, *, alone: bool) -> Imported:
        """Import it, if it isn't there yet; ``alone``: what its content tells hasn't been asked for."""
        wishes, meter = self._wishes, _Meter(self._progress)
        result = self._described(found)
        if problem is not None:
            return replace(result, problem=problem)
        if known := self._known(result, found):
            return known
        try:
            opened = _opened(found, wishes, self._sandbox, check=not wishes.dry_run, pulse=meter.proven)
        except CheckpointError as error:
            return replace(result, problem=error)
        with opened:
            (found,) = settled([(found, opened.told)]) if alone else (found,)
            result = replace(self._described(found), left_out={**found.left_out, **opened.left_out})
            if result.step is None:
                return replace(result, problem=_stepless(found))
            if known := self._known(result, found):
                return known
            return result if wishes.dry_run else self._saved(result, found, opened, meter)

    def _described(self, found: Found) -> Imported:
        wishes = self._wishes
        return Imported(
            found.kind,
            found.path,
            wishes.step if wishes.step is not None else found.step,
            wishes.epoch if wishes.epoch is not None else found.epoch,
            {**found.metrics, **wishes.metrics},
            left_out=found.left_out,
        )

    def _known(self, result: Imported, found: Found) -> Imported | None:
        """What it is in the store, where it was imported before."""
        there = None if result.step is None else self._there.get((result.step, _reason(found)))
        return None if there is None else _of(result, there, was_there=True)

    def _saved(self, result: Imported, found: Found, opened: Opened, meter: _Meter) -> Imported:
        assert result.step is not None
        try:
            saved = self._store.save_streamed(
                opened.state,
                step=result.step,
                epoch=result.epoch,
                metrics=result.metrics,
                modes=self._wishes.modes,
                reasons=[_reason(found), *found.reasons, *self._wishes.reasons],
                progress=meter.saved,
            )
        except CheckpointError:
            if opened.failure is not None:
                return replace(result, problem=opened.failure)
            raise
        return _of(result, saved, was_there=False)


def _reason(found: Found) -> str:
    """Why it is in the store, which tells a second time from the first."""
    saved = f", saved {found.created.isoformat(timespec='seconds')}" if found.created is not None else ""
    # Of a long path the end tells more. A name may be of any bytes; a reason is text.
    name = os.fsencode(os.path.realpath(found.path)).decode(errors="replace")[-_REASON_LENGTH:]
    return f"imported from {name}{saved}"


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
    return StateError(f"{found.path} doesn't tell its step: give it with step= (--step for the command)", path="step")
