"""The catalogue of checkpoints under one URL: save, load, resolve, verify, delete, hold."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Self, overload

from ckptstore.engine.buffers import POOL_BYTES, BufferPool
from ckptstore.engine.catalogue import Catalogue, Checkpoint, read_holds
from ckptstore.engine.claim import Claim
from ckptstore.engine.collector import collector_paused
from ckptstore.engine.damage import FallbackWarning, all_damaged, as_error, is_newer, warn_damaged
from ckptstore.engine.finder import Finder
from ckptstore.engine.loader import Loaded, Loader
from ckptstore.engine.reader import Contents, read_contents
from ckptstore.engine.saver import Captured, Facts, Saver
from ckptstore.engine.workers import Progress, default_threads
from ckptstore.errors import (
    CheckpointError,
    FormatError,
    IntegrityError,
    SaveFailedError,
    StaleWriterError,
    StateError,
    StorageError,
)
from ckptstore.format import layout
from ckptstore.format.codecs import parse_compression
from ckptstore.maintenance import keep
from ckptstore.maintenance.prune import PruneReport, prune
from ckptstore.maintenance.verify import VerifyReport, verify
from ckptstore.storage import open_storage
from ckptstore.storage.base import Storage


class Store:
    """Made by ``ckptstore.open``; don't instantiate. Use as a context manager or call ``close``."""

    def __init__(
        self,
        storage: Storage,
        *,
        read_only: bool,
        shared: bool,
        compression: str,
        pool_bytes: int,
        threads: int,
    ) -> None:
        self._storage = storage
        self._read_only = read_only
        self._shared = shared
        self._compression = parse_compression(compression)
        self._pool = BufferPool(pool_bytes)
        self._threads = threads
        # Reentrant: a signal handler that saves may run in the midst of a save of its own thread.
        self._saving = threading.RLock()
        self._finder = Finder(storage, read_only=read_only)
        self._claim = Claim(storage, shared=shared)
        self._pid = os.getpid()
        self._closed = False

    @property
    def url(self) -> str:
        """Where it lies, without credentials."""
        return self._storage.url

    def __repr__(self) -> str:
        return f"<ckptstore.Store {self.url}{' (read-only)' if self._read_only else ''}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release what the store holds open. Safe to call twice."""
        self._closed = True
        self._storage.close()

    # -- saving ------------------------------------------------------------------------------------------

    def save(
        self,
        state: object,
        *,
        step: int,
        epoch: int | None = None,
        metrics: Mapping[str, Any] | None = None,
        modes: Mapping[str, Literal["min", "max"]] | None = None,
        reasons: Iterable[str] = (),
        progress: Progress | None = None,
    ) -> Checkpoint:
        """Save ``state`` as a new checkpoint; on return it is durable, read back and the ``latest``.

        Args:
            state: any nesting of dicts, lists, tensors, modules, optimizers, objects with ``state_dict``,
                numbers and text. Each top-level entry becomes a file of its own.
            step: completed optimizer steps; 0 is before any update.
            epoch: completed epochs.
            metrics: numbers by name, for ``best:NAME`` and for people.
            modes: for metrics whose name doesn't tell, whether "min" or "max" is best.
            reasons: why it is saved.
            progress: called with (bytes done, bytes in all), from any thread.

        Raises:
            StateError: something in ``state`` can't be stored; nothing was written.
            SaveFailedError: certainly not saved; ``__cause__`` says why. Older checkpoints are untouched.
            CommitUnknownError: may be saved; ``resolve(error.id)`` settles it.
            StaleWriterError: a newer run has opened this store for writing.
        """
        facts = Facts.of(step, epoch, metrics or {}, modes or {}, reasons)
        self._check_writable()
        from ckptstore.state.capture import capture

        with collector_paused():
            captured = capture(state)
        return self._save_captured(captured, facts, progress)

    def _save_captured(self, captured: Captured, facts: Facts, progress: Progress | None = None) -> Checkpoint:
        with self._saving:
            # Again: capturing takes time, in which another thread may have closed the store.
            self._check_writable()
            try:
                store, id = self._claim.next_id(facts.step, self._finder.scan)
            except StorageError as error:
                message = f"step {facts.step} was not saved: {error}. Older checkpoints are untouched"
                raise SaveFailedError(message, step=facts.step) from error
            fence = self._claim.check_fence
            saver = Saver(self._storage, store, self._pool, self._threads, self._compression, fence)
            record = saver.save(id, captured, facts, progress)
        return Checkpoint.of(record)

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

    # -- finding -----------------------------------------------------------------------------------------

    def checkpoints(self) -> list[Checkpoint]:
        """All checkpoints, oldest first. Damaged commit records are left out with a ``DamageWarning``.

        Raises:
            NotFoundError: opened read-only, and there is no store.
            StorageError: the storage can't be read completely; never taken for "empty".
        """
        catalogue = self._finder.scan()
        warn_damaged(catalogue.damaged)
        return list(catalogue.checkpoints)

    def resolve(self, selector: str = "latest") -> Checkpoint:
        """The checkpoint that ``selector`` names: ``latest``, ``best:METRIC``, ``step:N``, ``epoch:N``,
        ``milestone:NAME``, a hold's name, or the beginning of an id.

        Raises:
            NoCheckpointError: the store is there and empty.
            NotFoundError: no store, or no such checkpoint.
            FormatError: no selector, or an ambiguous one.
        """
        return self._finder.select(self._finder.scan(), selector)

    # -- loading -----------------------------------------------------------------------------------------

    @overload
    def load(
        self, selector: str = ..., *, only: Sequence[str] | None = ..., progress: Progress | None = ...
    ) -> Any: ...

    @overload
    def load(
        self,
        selector: str = ...,
        *,
        into: object,
        only: Sequence[str] | None = ...,
        strict: bool = ...,
        progress: Progress | None = ...,
    ) -> Loaded: ...

    def load(
        self,
        selector: str = "latest",
        *,
        into: object = None,
        only: Sequence[str] | None = None,
        strict: bool = True,
        progress: Progress | None = None,
    ) -> Any:
        """Load a checkpoint, every block checked before its bytes reach a tensor.

        ``latest`` means the newest *good* one: a damaged checkpoint is skipped with a ``FallbackWarning``
        that names it. Every other selector means just the one it names.

        Args:
            selector: see ``resolve``.
            into: live objects of the shape that was saved, restored in place: same storages, dtypes and
                devices. Without it the state is returned as plain data.
            only: patterns of names, as ``["model/*"]``; only matching blocks are read.
            strict: False reports missing, unexpected and mismatched names instead of raising.
            progress: called with (bytes done, bytes in all), from any thread.

        Returns:
            The state as plain data, or with ``into=`` a ``Loaded``.

        Raises:
            NoCheckpointError: the store is there and empty; the only error that means a fresh start.
            IntegrityError: damaged (for ``latest``: all of them). With ``into=`` the target may hold a part.
            StateError: the target doesn't fit; all misfits are listed, nothing was changed.
        """
        if isinstance(only, str):
            raise StateError(f"only={only!r} must be a list of patterns: only=[{only!r}]", path="only")
        catalogue = self._finder.scan()
        first = self._finder.select(catalogue, selector)
        skipped: dict[str, CheckpointError] = {}
        if selector == "latest":
            skipped |= {d.id: as_error(d) for d in catalogue.damaged if d.id and is_newer(d, first)}
        candidates = reversed(catalogue.checkpoints) if selector == "latest" else [first]
        loader = Loader(self._storage, self._pool, self._threads, progress)
        for checkpoint in candidates:
            try:
                if into is None:
                    return loader.plain(checkpoint, only)
                return loader.into(checkpoint, into, only, strict, skipped)
            except (IntegrityError, FormatError) as error:
                if keep.is_buried(self._storage, checkpoint):
                    # No damage: it was deleted while it was read, and the selector may mean another one now.
                    return self.load(selector, into=into, only=only, strict=strict, progress=progress)
                if selector != "latest":
                    error.add_note("load('latest') goes back to the newest good checkpoint; verify() finds all damage")
                    raise
                skipped[checkpoint.id] = error
                message = f"{checkpoint.id} is damaged, trying the one before: {error}"
                warnings.warn(message, FallbackWarning, stacklevel=2)
        raise all_damaged(self.url, {id: str(error) for id, error in skipped.items()})

    def contents(self, checkpoint: Checkpoint) -> Contents:
        """What ``checkpoint`` holds: its files, tensors and tree, proven against its commit record.

        Raises:
            IntegrityError, FormatError: manifest or part is damaged or malformed.
        """
        return read_contents(self._storage, checkpoint.record)

    # -- keeping -----------------------------------------------------------------------------------------

    def verify(
        self,
        selector: str | None = None,
        *,
        sample: float = 1.0,
        progress: Progress | None = None,
    ) -> VerifyReport:
        """Read every byte of every checkpoint (or of the one selected) and report all damage.

        Args:
            selector: one checkpoint only.
            sample: share of the blocks to read, 0 to 1, chosen at random; records are always read.

        Raises:
            StorageError: the storage can't be read; that is no damage.
        """
        if type(sample) not in (int, float) or not 0 < sample <= 1:
            raise FormatError(f"sample={sample!r} must be a number over 0 and at most 1 (1 = every block)")
        # Listed before the commits are: a save that ends in between is committed, not unfinished.
        entries = self._storage.list("") if selector is None else None
        catalogue = self._finder.scan(afresh=True)
        if selector is None and self._finder.store_record() is None and catalogue.highest is None:
            self._finder.require_store()
        chosen = [self._finder.select(catalogue, selector)] if selector is not None else list(catalogue.checkpoints)
        return verify(
            self._storage,
            catalogue,
            chosen,
            entries=entries,
            sample=sample,
            pool=self._pool,
            threads=self._threads,
            progress=progress,
        )

    def delete(self, selector: str, *, reason: str = "deleted by hand") -> Checkpoint:
        """Bury a checkpoint: it no longer exists, ``undelete`` brings it back until ``prune`` reclaims it.

        Raises:
            ExistsError: a hold stands in the way.
            NotFoundError: no such checkpoint.
        """
        self._check_writable()
        checkpoint = self._finder.select(self._finder.scan(), selector)
        keep.bury(self._storage, checkpoint, reason)
        return checkpoint

    def undelete(self, id: str) -> Checkpoint:
        """Bring back a deleted checkpoint, named by its id or the beginning of it.

        Raises:
            NotFoundError: it is not in the trash, or was reclaimed already.
        """
        self._check_writable()
        return keep.bring_back(self._storage, self._finder.scan().buried, id)

    def catalogue(self) -> Catalogue:
        """All that the register says: existing, deleted, condemned and damaged, without warnings."""
        return self._finder.scan()

    def deleted(self) -> list[Checkpoint]:
        """Checkpoints in the trash that ``undelete`` can bring back, oldest first."""
        return list(self._finder.scan().buried)

    def hold(self, selector: str, name: str) -> Checkpoint:
        """Pin a checkpoint under ``name``: it can't be deleted until ``release(name)``, and ``name`` selects it.

        Raises:
            ExistsError: the name is taken.
            FormatError: the name could be taken for a selector.
        """
        self._check_writable()
        layout.check_hold_name(name)
        checkpoint = self._finder.select(self._finder.scan(), selector)
        keep.hold(self._storage, checkpoint, name)
        return checkpoint

    def release(self, name: str) -> None:
        """Remove the hold ``name``; the checkpoint stays.

        Raises:
            NotFoundError: there is no such hold.
        """
        self._check_writable()
        keep.release(self._storage, name)

    def holds(self) -> dict[str, str]:
        """The id that each hold pins, by the hold's name. Damaged holds give a ``DamageWarning``."""
        holds, damaged = read_holds(self._storage)
        warn_damaged(damaged)
        return holds

    def prune(self, *, grace_s: float = 24 * 3600.0) -> PruneReport:
        """Collect what killed saves left, and reclaim what was deleted more than ``grace_s`` seconds ago.

        Leftovers of older writers go at once: they can't commit any more. Those of the newest writer go only
        when they are older than ``grace_s``, because its save may be running.

        Raises:
            StorageError: nothing is deleted on an incomplete listing.
        """
        self._check_writable()
        with self._saving:
            own = self._claim.number if not self._shared else None
            return prune(self._storage, self._finder.scan(), grace_s=grace_s, own_writer=own)


def open(
    url: str | os.PathLike[str],
    *,
    read_only: bool = False,
    shared: bool = False,
    compression: str = "none",
    pool_bytes: int = POOL_BYTES,
    threads: int | None = None,
) -> Store:
    """Open the store at ``url``; nothing is created before the first save.

    Args:
        url: a path, ``file:///path`` or ``memory://name``.
        read_only: for people who only look: every change is refused, and a missing store is an error.
        shared: let several processes save side by side; without it the newest to save owns the store.
        compression: "none", "zstd" or "zstd:LEVEL".
        pool_bytes: memory for blocks in flight, in bytes.
        threads: blocks worked on at a time; by default one more than there are cores.

    Raises:
        StorageError: the place can't be used, or no such scheme.
        NotFoundError: ``read_only`` and nothing there.
    """
    if threads is not None and threads < 1:
        raise FormatError(f"threads={threads} must be at least 1")
    if pool_bytes < 1:
        raise FormatError(
            f"pool_bytes={pool_bytes} must be at least 1; two blocks of 16 MiB are the least that is used"
        )
    storage = open_storage(os.fspath(url), read_only=read_only)
    return Store(
        storage,
        read_only=read_only,
        shared=shared,
        compression=compression,
        pool_bytes=pool_bytes,
        threads=threads or default_threads(),
    )
