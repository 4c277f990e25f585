"""Looking at the checkpoints under one URL: find, load, verify. What changes a store is in ``store``."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from typing import Any, Literal, overload

from ckptstore.engine.backups import Backup
from ckptstore.engine.buffers import POOL_BYTES, BufferPool
from ckptstore.engine.candidates import Candidates
from ckptstore.engine.catalogue import Catalogue, Checkpoint, read_holds
from ckptstore.engine.commit import new_store
from ckptstore.engine.contents import Contents, read_contents
from ckptstore.engine.crew import Crew, find_crew
from ckptstore.engine.damage import DamageWarning, warn_damaged
from ckptstore.engine.finder import Finder
from ckptstore.engine.joint_load import JointLoad
from ckptstore.engine.loader import Loaded, Loader
from ckptstore.engine.rescue import Rescuer
from ckptstore.engine.saver import Tools
from ckptstore.engine.tensorreader import BlockCache, TensorReader
from ckptstore.engine.workers import Progress
from ckptstore.errors import (
    CheckpointError,
    FormatError,
    IntegrityError,
    NoCheckpointError,
    NotFoundError,
    StateError,
)
from ckptstore.maintenance import keep
from ckptstore.maintenance.audit import Auditor
from ckptstore.maintenance.copy import Copier, CopyReport, copy_each
from ckptstore.maintenance.mend import Mender
from ckptstore.maintenance.receipts import Lag, lags
from ckptstore.maintenance.repair import is_there
from ckptstore.maintenance.replicate import Replicator
from ckptstore.maintenance.retire import judged
from ckptstore.maintenance.transfer import Carrier
from ckptstore.maintenance.verifications import Verification, read_verifications, remember
from ckptstore.maintenance.verify import VerifyReport
from ckptstore.policy.judge import Judgement
from ckptstore.policy.retention import Keep
from ckptstore.storage import open_storage
from ckptstore.storage.base import Storage

_CARRIERS = 4
"""Blocks that are copied to a backup at a time."""


class View:
    """The looking half of ``Store``."""

    def __init__(
        self,
        tools: Tools,
        finder: Finder,
        *,
        read_only: bool,
        ranks: Literal["all", "one"] = "all",
        rank_timeout_s: float = 600.0,
    ) -> None:
        self._tools, self._finder, self._read_only = tools, finder, read_only
        self._alone, self._rank_timeout_s = ranks == "one", rank_timeout_s
        self._crew: Crew | None = None
        self._storage = tools.storage
        # Apart from the pool of saves and loads, which never wait for copies.
        self._carrier = Carrier(BufferPool(POOL_BYTES), _CARRIERS)
        self._replicators: list[Replicator] = []
        self._keep: Keep | None = None

    @property
    def url(self) -> str:
        """Where it lies, without credentials."""
        return self._storage.url

    @property
    def storage(self) -> Storage:
        """Where it lies, for tools that look at what is there."""
        return self._storage

    @property
    def ranks(self) -> Crew | None:
        """The processes that save and load here together, under ``torch.distributed``; None for one by itself."""
        if self._crew is None and not self._alone:
            # Asked for anew as long as there is none: the group may be made after the store was opened.
            self._crew = find_crew(self._rank_timeout_s)
        return self._crew

    def __repr__(self) -> str:
        return f"<ckptstore.Store {self.url}{' (read-only)' if self._read_only else ''}>"

    # -- finding -----------------------------------------------------------------------------------------

    def checkpoints(self, select: Literal["all"] | Sequence[int | str] | None = None) -> list[Checkpoint]:
        """All checkpoints, oldest first. Damaged commit records are left out with a ``DamageWarning``.

        Args:
            select: some of them, by steps and selectors, as ``[0, 100, "best:val_loss"]``, or "all": in the order of
                their steps, each once. What isn't there is left out with a warning.

        Raises:
            NotFoundError: opened read-only, and there is no store; or nothing of ``select`` is there.
            FormatError: no selection.
            StorageError: the storage can't be read completely; never taken for "empty".
        """
        catalogue = self._finder.view()
        warn_damaged(catalogue.damaged)
        if select is None:
            return list(catalogue.checkpoints)
        return sorted(self._selected(catalogue, select), key=lambda c: (c.step, c.order))

    def _selected(self, catalogue: Catalogue, select: object) -> list[Checkpoint]:
        if select == "all":
            return list(catalogue.checkpoints)
        if not isinstance(select, list | tuple | range | set) or not all(type(one) in (int, str) for one in select):
            raise FormatError(f"{select!r:.100} selects nothing: write 'all', or a list as [0, 100, 'best:val_loss']")
        found: dict[str, Checkpoint] = {}
        missing: list[NotFoundError] = []
        for one in select:
            try:
                checkpoint = self._finder.select(catalogue, f"step:{one}" if isinstance(one, int) else one)
                found[checkpoint.id] = checkpoint
            except NotFoundError as error:
                missing.append(error)
        for problem in missing:
            if not found:
                raise problem
            warnings.warn(str(problem), UserWarning, stacklevel=3)
        return list(found.values())

    def resolve(self, selector: str = "latest") -> Checkpoint:
        """The checkpoint that ``selector`` names: ``latest``, ``best:METRIC``, ``step:N``, ``epoch:N``,
        ``milestone:NAME``, a hold's name, or the beginning of an id.

        Raises:
            NoCheckpointError: the store is there and empty.
            NotFoundError: no store, or no such checkpoint.
            FormatError: no selector, or an ambiguous one.
        """
        return self._finder.select(self._finder.view(), selector)

    # -- loading -----------------------------------------------------------------------------------------

    @overload
    def load(
        self,
        selector: str = ...,
        *,
        only: Sequence[str] | None = ...,
        rank: int | None = ...,
        progress: Progress | None = ...,
    ) -> Any: ...

    @overload
    def load(
        self,
        selector: str = ...,
        *,
        into: object,
        only: Sequence[str] | None = ...,
        strict: bool | Literal["parts"] = ...,
        progress: Progress | None = ...,
    ) -> Loaded: ...

    def load(
        self,
        selector: str = "latest",
        *,
        into: object = None,
        only: Sequence[str] | None = None,
        strict: bool | Literal["parts"] = True,
        rank: int | None = None,
        progress: Progress | None = None,
    ) -> Any:
        """Load a checkpoint, every block checked before its bytes reach a tensor.

        ``latest`` means the newest *good* one: a damaged checkpoint is skipped with a ``FallbackWarning``
        that names it. Every other selector means just the one it names.

        Under ``torch.distributed`` every rank must call it with ``into=``: rank 0 says which checkpoint, each rank gets
        its own, and all succeed or fail. They may be more or fewer than had saved, and sharded otherwise. Without
        ``into=`` each rank loads for itself.

        Args:
            selector: see ``resolve``.
            into: live objects of the shape that was saved, restored in place: same storages, dtypes and
                devices. Without it the state is returned as plain data.
            only: patterns of names, as ``["model/*"]``; only matching blocks are read.
            strict: False reports missing, unexpected and mismatched names instead of raising. "parts" restores the
                entries that checkpoint and target, both dicts, have in common, each as strictly as True does; an
                entry that only one of them has is reported as missing or unexpected, and the target's stays.
            rank: without ``into=``, what this rank had of a checkpoint that several saved; None: what all had.
            progress: called with (bytes done, bytes in all), from any thread.

        Returns:
            The state as plain data, or with ``into=`` a ``Loaded``.

        Raises:
            NoCheckpointError: the store is there and empty; the only error that means a fresh start.
            IntegrityError: damaged (for ``latest``: all of them). With ``into=`` the target may hold a part.
            StateError: the target doesn't fit; all misfits are listed, nothing was changed.
        """
        check_patterns(only)
        _check_strict(strict)
        if into is not None:
            if rank is not None:
                raise FormatError(f"rank={rank}: only for loading without into=, which gives each rank its own")
            from ckptstore.state.staging import fence_all

            # Loading writes to memory directly, unseen by hooks and version counters.
            fence_all()
            if self.ranks is not None:
                return self._load_together(self.ranks, selector, into, only, strict, progress)
        return self._load(selector, into, only, strict, rank, progress)

    def _load(
        self,
        selector: str,
        into: object,
        only: Sequence[str] | None,
        strict: bool | Literal["parts"],
        rank: int | None,
        progress: Progress | None,
    ) -> Any:
        candidates = self._candidates(selector)
        for checkpoint in candidates:
            try:
                with self.loading(checkpoint, progress) as loader:
                    if into is None:
                        return loader.plain(checkpoint, only, rank)
                    return loader.draft(checkpoint, into, only, strict).finish(candidates.skipped)
            except (IntegrityError, FormatError) as error:
                if keep.is_buried(self._finder.home(checkpoint), checkpoint):
                    # No damage: it was deleted while it was read, and the selector may mean another one now.
                    return self._load(selector, into, only, strict, rank, progress)
                candidates.give_up(checkpoint, error)
        raise candidates.none_left()

    def _candidates(self, selector: str) -> Candidates:
        catalogue = self._finder.view()
        return Candidates(selector, catalogue, self._finder.select(catalogue, selector), self.url)

    def _load_together(
        self,
        crew: Crew,
        selector: str,
        into: object,
        only: Sequence[str] | None,
        strict: bool | Literal["parts"],
        progress: Progress | None,
    ) -> Loaded:
        """Load as one of several ranks; see ``JointLoad``."""

        def open_loader(checkpoint: Checkpoint, elsewhere: bool) -> AbstractContextManager[Loader]:
            if elsewhere and not crew.leads:
                # Where it lies, the backups tell.
                self._finder.view()
            return self.loading(checkpoint, progress)

        joint = JointLoad(crew, lambda: self._candidates(selector), open_loader, self._lies_elsewhere)
        return joint.run(into, only, strict, goes_on=selector == "latest")

    def _lies_elsewhere(self, checkpoint: Checkpoint) -> bool:
        return self._finder.home(checkpoint) is not self._storage

    def compare(self, selector: str, state: object, *, only: Sequence[str] | None = None) -> list[str]:
        """The names of all tensors and values in ``state`` that are not bit for bit what a checkpoint holds.

        Nothing in it is changed, and no second copy of the state is made. ``latest`` means the newest, damaged or not.

        Equal is what ``save`` would store alike: -0.0 is not 0.0, a tensor of another type or shape differs, and so
        does what only one of the two has, which is named as a whole. Of a list of simple values the first that differs
        is named; random state is one value. The order of a dict's entries doesn't count.

        Args:
            selector: see ``resolve``.
            state: live objects, as for ``save``.
            only: patterns of names, as ``["model/*"]``; only what they match is compared, and read.

        Returns:
            Names as in ``Loaded``, in the order in which the checkpoint holds them, with what it lacks at the end of
            where it would stand; a tensor that has several names under each. Empty where all is as saved.

        Raises:
            NoCheckpointError, NotFoundError, FormatError: as ``resolve``.
            IntegrityError: what has to be read is damaged.
            StateError: ``state`` has something that can't be saved, or a pattern matches nothing.
        """
        check_patterns(only)
        checkpoint = self._finder.select(self._finder.view(), selector)
        try:
            with self.loading(checkpoint, None) as loader:
                return loader.differing(checkpoint, state, only)
        except (IntegrityError, FormatError):
            if keep.is_buried(self._finder.home(checkpoint), checkpoint):
                # No damage: it was deleted while it was read, and the selector may mean another one now.
                return self.compare(selector, state, only=only)
            raise

    @contextmanager
    def loading(self, checkpoint: Checkpoint, progress: Progress | None) -> Iterator[Loader]:
        """A loader that has the backups at hand. What it found damaged is repaired when it is done."""
        home, backups = self._finder.home(checkpoint), self._finder.backups
        if not backups:
            yield self._loader(home, progress)
            return
        others = [other for other in (self._storage, *backups.storages) if other is not home]
        with closing(Rescuer(others)) as rescuer:
            yield self._loader(home, progress, rescuer)
        # All is loaded by now: what fails from here on is no failure of the load.
        with suppress(CheckpointError):
            mender = Mender(self._storage, self._finder, self._carrier, self._keep, self._replicators, self._read_only)
            if rescuer.met and is_there(home, checkpoint):
                mender.repair(home, rescuer)
            if not self._read_only and (self.ranks is None or self.ranks.leads):
                mender.restore(checkpoint, home)

    def _loader(self, home: Storage, progress: Progress | None, rescuer: Rescuer | None = None) -> Loader:
        tools, crew = self._tools, self.ranks
        rank, size = (crew.rank, crew.size) if crew is not None else (0, 1)
        return Loader(home, tools.pool, tools.threads, progress, rescuer, rank, size)

    @contextmanager
    def reader(self, selector: str, *, cache: BlockCache | None = None) -> Iterator[TensorReader]:
        """Any bytes of any tensor of a checkpoint, in any order, without its state: for what looks at large ones.

        Args:
            selector: see ``resolve``.
            cache: the memory for it, which several readers may share; 256 MiB of its own by default.

        Raises:
            NoCheckpointError, NotFoundError, FormatError: as ``resolve``, or it was deleted while it was read.
            IntegrityError: what has to be read is damaged.
        """
        checkpoint = self._finder.select(self._finder.view(), selector)
        try:
            with (
                self.loading(checkpoint, None) as loader,
                closing(loader.reader(checkpoint, BlockCache() if cache is None else cache)) as reader,
            ):
                yield reader
        except (IntegrityError, FormatError):
            keep.check_unburied(self._finder.home(checkpoint), checkpoint)
            raise

    def contents(self, checkpoint: Checkpoint) -> Contents:
        """What ``checkpoint`` holds: its files, tensors and tree, proven against its commit record.

        Raises:
            IntegrityError, FormatError: manifest or part is damaged or malformed.
        """
        return read_contents(self._finder.home(checkpoint), checkpoint.record)

    # -- proving -----------------------------------------------------------------------------------------

    def verify(
        self,
        selector: str | None = None,
        *,
        sample: float = 1.0,
        repair: bool = False,
        record: bool = True,
        progress: Progress | None = None,
    ) -> VerifyReport:
        """Read every byte of every checkpoint (or of the one selected) and report all damage.

        Only what lies at ``url`` is read; backups are stores of their own, to be verified by themselves.

        Args:
            selector: one checkpoint only.
            sample: share of the blocks to read, 0 to 1, chosen at random; records are always read.
            repair: replace what is damaged by what the backups have, and read what was damaged once more.
            record: put down what came of it, see ``verifications``, where the store is open for writing.
            progress: called with (bytes done, bytes in all), from any thread.

        Raises:
            StorageError: the storage can't be read; that is no damage.
        """
        if type(sample) not in (int, float) or not 0 < sample <= 1:
            raise FormatError(f"sample={sample!r} must be a number over 0 and at most 1 (1 = every block)")
        if repair and (self._read_only or not self._finder.backups):
            raise FormatError("repair=True needs a store that is open for writing, with a backup=URL to repair it from")
        auditor = Auditor(self._tools, self._finder, self._carrier, selector, sample)
        report = auditor.report(progress)
        if repair and not report.ok:
            report = auditor.repaired(report)
        if record and not self._read_only:
            remember(self._storage, report.tally(whole=selector is None))
        return report

    def verifications(self) -> list[Verification]:
        """What was verified here and what came of it, the newest first: the last 20.

        Those of ``verify`` and ``ckptstore verify``, and complete passes of ``scrub=``. Damaged records give a
        ``DamageWarning``.

        Raises:
            StorageError: the storage can't be read.
        """
        found, damaged = read_verifications(self._storage)
        for damage in damaged:
            warnings.warn(f"{damage.problem}; what was verified then isn't known", DamageWarning, stacklevel=2)
        return found

    def copy(
        self,
        target: str | os.PathLike[str],
        select: Sequence[str] = (),
        *,
        target_options: Mapping[str, Any] | None = None,
        progress: Progress | None = None,
    ) -> CopyReport:
        """Copy checkpoints to another place, under the same names; what is there already isn't copied again.

        Every block is checked before it is sent, and read back where the target doesn't check it itself. A copy that
        was broken off is taken up by the next call. Nothing is ever removed there.

        Args:
            target: as ``url`` of ``open``. There must be nothing yet, or a copy of this store.
            select: selectors, as ``["latest", "best:val_loss"]``; all checkpoints by default.
            target_options: as ``storage_options`` of ``open``.
            progress: called with (bytes done, bytes in all), from any thread.

        Raises:
            NotFoundError: no such checkpoint.
            StorageError: there is another store at ``target``, or one of the two failed.
        """
        catalogue = self._finder.view()
        warn_damaged(catalogue.damaged)
        chosen = [self._finder.select(catalogue, text) for text in select] or list(catalogue.checkpoints)
        unique = sorted({c.id: c for c in chosen}.values(), key=lambda c: c.order)
        if not unique:
            raise NoCheckpointError(f"{self.url} has no checkpoints to copy")
        with closing(open_storage(target, options=target_options)) as storage:
            store = self._finder.store_record() or self._finder.backups.store_record()
            Backup(storage).admit(store or new_store(catalogue.store_id))
            return copy_each(lambda c: Copier(self._finder.home(c), storage, self._carrier), unique, progress)

    def judge(self, keep: Keep) -> Judgement:
        """What would stay of the checkpoints that lie here under ``keep``, and why; nothing is changed.

        Whatever the rules say, the newest good one stays, and what is held, what others borrow from, and what is
        damaged: only good ones count.

        Raises:
            IntegrityError: a commit record or a hold can't be read; no checkpoint is given up then.
            StorageError: the storage can't be read completely.
        """
        return judged(self._storage, self._finder.scan(), keep)

    def lags(self) -> list[Lag]:
        """How far each backup is behind, by the receipts that lie here."""
        here = [c for c in self._finder.view().checkpoints if self._finder.home(c) is self._storage]
        return lags(self._storage, here, [storage.url for storage in self._finder.backups.storages])

    def catalogue(self) -> Catalogue:
        """All that the register says: existing, deleted, condemned and damaged, without warnings."""
        return self._finder.view()

    def deleted(self) -> list[Checkpoint]:
        """Checkpoints in the trash that ``undelete`` can bring back, oldest first."""
        return list(self._finder.scan().buried)

    def holds(self) -> dict[str, str]:
        """The id that each hold pins, by the hold's name. Damaged holds give a ``DamageWarning``."""
        holds, damaged = read_holds(self._storage)
        warn_damaged(damaged)
        return holds


def check_patterns(only: object) -> None:
    """Nothing, if ``only`` is no text, whose letters would be patterns (StateError)."""
    if isinstance(only, str):
        raise StateError(f"only={only!r} must be a list of patterns: only=[{only!r}]", path="only")


def _check_strict(strict: object) -> None:
    if type(strict) is not bool and not (isinstance(strict, str) and strict == "parts"):
        raise StateError(f"strict={strict!r} must be True, False or 'parts'", path="strict")
