"""Looking at the checkpoints under one URL: find, load, verify. What changes a store is in ``store``."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, overload

from ckptstore.engine.catalogue import Catalogue, Checkpoint, read_holds
from ckptstore.engine.damage import FallbackWarning, all_damaged, as_error, is_newer, warn_damaged
from ckptstore.engine.finder import Finder
from ckptstore.engine.loader import Loaded, Loader
from ckptstore.engine.reader import Contents, read_contents
from ckptstore.engine.saver import Tools
from ckptstore.engine.workers import Progress
from ckptstore.errors import CheckpointError, FormatError, IntegrityError, StateError
from ckptstore.maintenance import keep
from ckptstore.maintenance.verify import VerifyReport, verify


class View:
    """The looking half of ``Store``."""

    def __init__(self, tools: Tools, finder: Finder, *, read_only: bool) -> None:
        self._tools, self._finder, self._read_only = tools, finder, read_only
        self._storage = tools.storage

    @property
    def url(self) -> str:
        """Where it lies, without credentials."""
        return self._storage.url

    def __repr__(self) -> str:
        return f"<ckptstore.Store {self.url}{' (read-only)' if self._read_only else ''}>"

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
        if into is not None:
            from ckptstore.state.staging import fence_all

            # Loading writes to memory directly, unseen by hooks and version counters.
            fence_all()
        loader = Loader(self._storage, self._tools.pool, self._tools.threads, progress)
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

    # -- proving -----------------------------------------------------------------------------------------

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
            pool=self._tools.pool,
            threads=self._tools.threads,
            progress=progress,
        )

    def catalogue(self) -> Catalogue:
        """All that the register says: existing, deleted, condemned and damaged, without warnings."""
        return self._finder.scan()

    def deleted(self) -> list[Checkpoint]:
        """Checkpoints in the trash that ``undelete`` can bring back, oldest first."""
        return list(self._finder.scan().buried)

    def holds(self) -> dict[str, str]:
        """The id that each hold pins, by the hold's name. Damaged holds give a ``DamageWarning``."""
        holds, damaged = read_holds(self._storage)
        warn_damaged(damaged)
        return holds
