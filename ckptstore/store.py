"""The catalogue of checkpoints under one URL: save, load, resolve, verify, delete, hold."""

from __future__ import annotations

import operator
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, overload

from ckptstore.engine.buffers import POOL_BYTES, BufferPool
from ckptstore.engine.catalogue import Cache, Catalogue, Checkpoint, Damage, read_holds, scan
from ckptstore.engine.commit import check_fence, claim_writer, ensure_store, read_fate, read_store
from ckptstore.engine.reader import Contents, Progress, read_contents, read_tensors
from ckptstore.engine.saver import Captured, Facts, Saver
from ckptstore.engine.select import default_mode, select
from ckptstore.engine.workers import default_threads
from ckptstore.errors import (
    CheckpointError,
    ExistsError,
    FormatError,
    IntegrityError,
    NoCheckpointError,
    NotFoundError,
    StaleWriterError,
    StateError,
    StorageError,
)
from ckptstore.format import layout
from ckptstore.format.codecs import parse_compression
from ckptstore.format.layout import CheckpointId, parse_id
from ckptstore.format.records import CondemnedRecord, HoldRecord, StoreRecord, TombstoneRecord, now, seal
from ckptstore.maintenance.prune import PruneReport, prune
from ckptstore.maintenance.verify import VerifyReport, verify
from ckptstore.storage import open_storage
from ckptstore.storage.base import Storage

if TYPE_CHECKING:
    from ckptstore.state.restore import Restoration

T = TypeVar("T")


class DamageWarning(UserWarning):
    """Something on storage is damaged; the message names it."""


class FallbackWarning(DamageWarning):
    """``latest`` was damaged, and an older checkpoint was loaded in its place."""


@dataclass(frozen=True)
class Loaded:
    """What ``load(into=…)`` did.

    Attributes:
        checkpoint: the one that was loaded.
        skipped: newer checkpoints that were damaged, with the error of each.
        missing: names the target has and the checkpoint lacks (only with ``strict=False``).
        unexpected: names the checkpoint has and the target lacks.
        mismatched: names whose shapes differ; left as they were.
        cast: names that were converted to the target's dtype.
    """

    checkpoint: Checkpoint
    skipped: Mapping[str, CheckpointError]
    missing: Sequence[str]
    unexpected: Sequence[str]
    mismatched: Sequence[str]
    cast: Sequence[str]


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
        self._saving = threading.Lock()
        self._fates: Cache = {}
        self._record: StoreRecord | None = None
        self._writer: int | None = None
        self._sequence = 0
        self._pid = os.getpid()

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
        facts = _facts(step, epoch, metrics or {}, modes or {}, reasons)
        self._check_writable()
        from ckptstore.state.capture import capture

        return self._save_captured(capture(state), facts, progress)

    def _save_captured(self, captured: Captured, facts: Facts, progress: Progress | None = None) -> Checkpoint:
        with self._saving:
            saver, id = self._begin(facts.step)
            record = saver.save(id, captured, facts, progress)
        self._fates[layout.commit_key(id)] = record
        return Checkpoint.of(record)

    def _begin(self, step: int) -> tuple[Saver, CheckpointId]:
        if self._writer is None or self._shared:
            self._claim()
        store, writer = self._record, self._writer
        assert store is not None and writer is not None
        fence = (lambda: None) if self._shared else (lambda: check_fence(self._storage, writer))
        fence()
        self._sequence += 1
        saver = Saver(self._storage, store, self._pool, self._threads, self._compression, fence)
        return saver, layout.new_id(writer, self._sequence, step)

    def _claim(self) -> None:
        """Become a writer. Only the first save does: opening and looking disturb nobody."""
        catalogue = self._scan()
        self._record = ensure_store(self._storage, known_id=catalogue.store_id)
        highest = catalogue.highest
        if self._writer is None:
            from ckptstore.engine.commit import writers

            numbers = writers(self._storage)
            if self._shared and numbers:
                self._writer = numbers[-1]
            else:
                above = highest.writer if highest else 0
                self._writer = claim_writer(self._storage, self._record.store_id, above=above)
        self._sequence = max(self._sequence, highest.seq if highest else 0)

    def _check_writable(self) -> None:
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
            NotFoundError: there is no store at this URL.
            StorageError: the storage can't be read completely; never taken for "empty".
        """
        catalogue = self._scan()
        _warn_damaged(catalogue.damaged)
        return list(catalogue.checkpoints)

    def resolve(self, selector: str = "latest") -> Checkpoint:
        """The checkpoint that ``selector`` names: ``latest``, ``best:METRIC``, ``step:N``, ``epoch:N``,
        ``milestone:NAME``, a hold's name, or the beginning of an id.

        Raises:
            NoCheckpointError: the store is there and empty.
            NotFoundError: no store, or no such checkpoint.
            FormatError: no selector, or an ambiguous one.
        """
        return self._select(self._scan(), selector)

    def _scan(self) -> Catalogue:
        record = self._identity()
        catalogue = scan(self._storage, record.store_id if record else None, self._fates)
        if record is None and not catalogue.checkpoints and not catalogue.damaged and self._read_only:
            self._require_store()
        return catalogue

    def _identity(self) -> StoreRecord | None:
        """``store.json``, or None where it is missing or damaged: the commits carry the store's id too."""
        if self._record is None:
            try:
                self._record = read_store(self._storage)
            except NotFoundError:
                return None
            except IntegrityError as error:
                warnings.warn(f"{error}; the checkpoints are read without it", DamageWarning, stacklevel=4)
                return None
        return self._record

    def _require_store(self) -> None:
        raise NotFoundError(f"there is no ckptstore at {self.url}: no store.json and no commits/. Check the path")

    def _select(self, catalogue: Catalogue, selector: str) -> Checkpoint:
        _warn_damaged(catalogue.damaged)
        plain = ":" not in selector and selector != "latest"
        holds = read_holds(self._storage)[0] if plain else {}
        try:
            return select(catalogue.checkpoints, holds, selector, self.url)
        except NotFoundError:
            damaged = [d for d in catalogue.damaged if plain and d.id and d.id.startswith(selector)]
            if damaged:
                raise IntegrityError(damaged[0].problem, id=damaged[0].id, key=damaged[0].key) from None
            if catalogue.damaged and not catalogue.checkpoints:
                raise _all_damaged(self.url, {d.key: d.problem for d in catalogue.damaged}) from None
            raise

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
        catalogue = self._scan()
        skipped: dict[str, CheckpointError] = {}
        first = self._select(catalogue, selector)
        candidates = reversed(catalogue.checkpoints) if selector == "latest" else [first]
        for checkpoint in candidates:
            try:
                restored, result = self._restore(checkpoint, into, only, strict, progress)
            except (IntegrityError, FormatError) as error:
                self._check_not_deleted(checkpoint)
                if selector != "latest":
                    raise
                skipped[checkpoint.id] = error
                warnings.warn(f"{checkpoint.id} is damaged, trying the one before: {error}", FallbackWarning, stacklevel=2)
                continue
            if into is None:
                return result
            report = restored.report
            return Loaded(checkpoint, skipped, report.missing, report.unexpected, report.mismatched, report.cast)
        raise _all_damaged(self.url, {id: str(error) for id, error in skipped.items()})

    def _restore(
        self,
        checkpoint: Checkpoint,
        into: object,
        only: Sequence[str] | None,
        strict: bool,
        progress: Progress | None,
    ) -> tuple[Restoration, object]:
        from ckptstore.state import restore

        contents = self.contents(checkpoint)
        tree, specs = _single(contents), _specs(contents)
        if into is None:
            restored = restore.restore_plain(tree, specs, only=only)
        else:
            restored = restore.restore_into(tree, specs, into, only=only, strict=strict)
        read_tensors(
            self._storage, contents, restored.wanted, pool=self._pool, threads=self._threads, progress=progress
        )
        return restored, restored.finish()

    def _check_not_deleted(self, checkpoint: Checkpoint) -> None:
        """Tell damage from a checkpoint that was deleted while it was read."""
        key = layout.tombstone_key(checkpoint.order)
        if any(entry.key == key for entry in self._storage.list(layout.TRASH)):
            raise NotFoundError(f"{checkpoint.id} was deleted while it was being read; load again", id=checkpoint.id)

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
        if not 0 < sample <= 1:
            raise FormatError(f"sample={sample} must be over 0 and at most 1 (1 = every block)")
        catalogue = self._scan()
        if selector is None and self._identity() is None and catalogue.highest is None:
            self._require_store()
        chosen = [self._select(catalogue, selector)] if selector is not None else list(catalogue.checkpoints)
        return verify(
            self._storage,
            catalogue,
            chosen,
            everything=selector is None,
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
        checkpoint = self._select(self._scan(), selector)
        self._check_unheld(checkpoint)
        key = layout.tombstone_key(checkpoint.order)
        record = TombstoneRecord(
            store_id=checkpoint.record.store_id, id=checkpoint.id, created=now(), reason=reason[:1000]
        )
        self._storage.create(key, seal(record))
        try:
            # Looked at again after the tombstone stands: whoever held it meanwhile wins.
            self._check_unheld(checkpoint)
        except CheckpointError:
            self._storage.delete([key])
            raise
        return checkpoint

    def undelete(self, id: str) -> Checkpoint:
        """Bring back a deleted checkpoint, named by its id or the beginning of it.

        Raises:
            NotFoundError: it is not in the trash, or was reclaimed already.
        """
        self._check_writable()
        buried = self._scan().buried
        matches = [c for c in buried if c.id.startswith(id) or f"step:{c.step}" == id]
        if not id or not matches:
            known = ", ".join(c.id for c in buried[-5:])
            raise NotFoundError(f"{self.url} has no deleted checkpoint {id!r}; in the trash: {known or 'nothing'}")
        if len(matches) > 1:
            raise FormatError(f"{id!r} names {len(matches)} deleted checkpoints; write the id: {matches[-1].id}")
        self._storage.delete([layout.tombstone_key(matches[0].order)])
        return matches[0]

    def deleted(self) -> list[Checkpoint]:
        """Checkpoints in the trash that ``undelete`` can bring back, oldest first."""
        return list(self._scan().buried)

    def hold(self, selector: str, name: str) -> Checkpoint:
        """Pin a checkpoint under ``name``: it can't be deleted until ``release(name)``, and ``name`` selects it.

        Raises:
            ExistsError: the name is taken.
            FormatError: the name could be taken for a selector.
        """
        self._check_writable()
        layout.check_hold_name(name)
        checkpoint = self._select(self._scan(), selector)
        record = HoldRecord(store_id=checkpoint.record.store_id, name=name, id=checkpoint.id, created=now())
        try:
            self._storage.create(layout.hold_key(name), seal(record))
        except ExistsError as error:
            held = read_holds(self._storage)[0].get(name, "another checkpoint")
            raise ExistsError(f"hold {name!r} pins {held} already; release it first or choose another name") from error
        try:
            # Looked at again after the hold stands: a delete that came between wins.
            self._check_not_deleted(checkpoint)
        except NotFoundError:
            self._storage.delete([layout.hold_key(name)])
            raise
        return checkpoint

    def release(self, name: str) -> None:
        """Remove the hold ``name``; the checkpoint stays.

        Raises:
            NotFoundError: there is no such hold.
        """
        self._check_writable()
        layout.check_hold_name(name)
        keys = [entry.key for entry in self._storage.list(layout.HOLDS)]
        if layout.hold_key(name) not in keys:
            known = ", ".join(sorted(filter(None, map(layout.hold_name, keys))))
            raise NotFoundError(f"{self.url} has no hold {name!r}; holds here: {known or 'none'}")
        self._storage.delete([layout.hold_key(name)])

    def holds(self) -> dict[str, str]:
        """The id that each hold pins, by the hold's name. Damaged holds give a ``DamageWarning``."""
        holds, damaged = read_holds(self._storage)
        _warn_damaged(damaged)
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
            own = self._writer if not self._shared else None
            return prune(self._storage, self._scan(), grace_s=grace_s, own_writer=own)

    def _check_unheld(self, checkpoint: Checkpoint) -> None:
        holds, damaged = read_holds(self._storage)
        for name, id in holds.items():
            if id == checkpoint.id:
                raise ExistsError(f"{id} is held by {name!r}; release({name!r}) first", id=id, step=checkpoint.step)
        for damage in damaged:
            raise IntegrityError(f"{damage.problem}; it may hold {checkpoint.id}: release it first", key=damage.key)


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
    storage = open_storage(os.fspath(url), read_only=read_only)
    return Store(
        storage,
        read_only=read_only,
        shared=shared,
        compression=compression,
        pool_bytes=pool_bytes,
        threads=threads or default_threads(),
    )


def _facts(
    step: int,
    epoch: int | None,
    metrics: Mapping[str, Any],
    modes: Mapping[str, str],
    reasons: Iterable[str],
) -> Facts:
    step, epoch = _whole(step, "step"), None if epoch is None else _whole(epoch, "epoch")
    values: dict[str, float] = {}
    for name, value in metrics.items():
        try:
            values[name] = float(value)
        except (TypeError, ValueError) as error:
            raise StateError(f"metric {name!r} is {value!r:.100}, no number", path=f"metrics/{name}") from error
    for name, mode in modes.items():
        if mode not in ("min", "max") or name not in values:
            raise StateError(f"modes: {name!r}: {mode!r} must be 'min' or 'max' for a metric that is given", path="modes")
    if isinstance(reasons, str):
        raise StateError("reasons must be a list of texts, not one text", path="reasons")
    return Facts(step, epoch, values, {name: modes.get(name) or default_mode(name) for name in values}, list(reasons))


def _whole(value: int, name: str) -> int:
    try:
        number = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = -1
    if not 0 <= number < 10**15:
        raise StateError(f"{name}={value!r} must be an int from 0 to 10**15 - 1", path=name)
    return number


def _single(contents: Contents) -> Any:
    if len(contents.parts) != 1:
        raise FormatError(
            f"{contents.commit.id} was written by {len(contents.parts)} ranks; this version loads those of one rank",
            id=contents.commit.id,
        )
    return contents.parts[0].tree


def _specs(contents: Contents) -> list[Any]:
    from ckptstore.state.capture import TensorSpec

    return [TensorSpec(name, t.dtype, tuple(t.shape), t.logical) for name, t in contents.tensors.items()]


def _warn_damaged(damaged: Iterable[Damage]) -> None:
    for damage in damaged:
        warnings.warn(f"{damage.problem}; its checkpoint is left out", DamageWarning, stacklevel=4)


def _all_damaged(url: str, problems: Mapping[str, str]) -> IntegrityError:
    listed = "; ".join(problems.values())
    return IntegrityError(f"{url}: all {len(problems)} checkpoints are damaged, none was loaded: {listed[:2000]}")
