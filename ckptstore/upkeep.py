"""Changing what lies in a store, but for saving: delete, hold, prune, and ask the run that saves there."""

from __future__ import annotations

import os

from ckptstore.engine import control
from ckptstore.engine.catalogue import Checkpoint
from ckptstore.engine.dispatcher import Dispatcher
from ckptstore.errors import FormatError, NotFoundError, StaleWriterError, StorageError
from ckptstore.format import layout
from ckptstore.maintenance import keep as keeping
from ckptstore.maintenance import retire as retiring
from ckptstore.maintenance.prune import PruneReport, preview, prune
from ckptstore.maintenance.retire import judged, refuse_many, retire
from ckptstore.policy.retention import Keep
from ckptstore.units import duration_s
from ckptstore.view import View


class Upkeep(View):
    """The keeping part of ``Store``."""

    _dispatcher: Dispatcher
    _shared: bool
    _closed: bool
    _pid: int

    def _begin_change(self) -> None:
        self._check_writable()
        # A process that only prunes never saved, and must know whether what it creates may take another's place.
        self._dispatcher.claim.try_out()

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

    # -- the run that saves here -------------------------------------------------------------------------

    def signal(self, action: control.Action, *, wait: float | str | None = None) -> bool:
        """Ask the run that saves here to "save" at once, or to "stop": to save and end.

        The run that owns the store goes on owning it. Only one that looks for requests heeds them: a ``Checkpointer``
        does, a bare ``Store`` doesn't. What was asked for before a run began is not heeded by it.

        Args:
            action: "save" or "stop".
            wait: wait so long until it is taken up, as "30s" or in seconds; then the request is taken back.

        Returns:
            Whether a run has taken it up; False without ``wait``, as nobody knows yet.

        Raises:
            FormatError: no such action, or no duration.
            ExistsError: it was asked already, and no run has answered.
            NotFoundError: there is no store here.
            StorageError: opened read-only, or the storage failed.
        """
        if action not in control.ACTIONS:
            raise FormatError(f"{action!r} can't be asked for; a run heeds {' and '.join(map(repr, control.ACTIONS))}")
        wait_s = None if wait is None else duration_s(wait, "wait")
        self._begin_change()
        record = self._finder.store_record()
        store_id = record.store_id if record is not None else self._finder.scan().store_id
        if store_id is None:
            self._finder.require_store()
        if wait_s is None:
            control.ask(self._storage, store_id, action)
            return False
        return control.ask_and_wait(self._storage, store_id, action, wait_s)

    def requests(self) -> list[control.Action]:
        """Take up what was asked for by ``signal``: what is returned is for the caller to do, and asked for no more.

        Raises:
            StorageError: the storage failed.
        """
        asked = control.poll(self._storage)
        return [one.action for one in asked if control.answer(self._storage, one) and one.problem is None]

    # -- keeping -----------------------------------------------------------------------------------------

    def delete(self, selector: str, *, reason: str = "deleted by hand", reclaim: bool = False) -> Checkpoint:
        """Bury a checkpoint: it no longer exists, ``undelete`` brings it back until ``prune`` reclaims it.

        Args:
            selector: see ``resolve``.
            reason: for people, see ``undelete``.
            reclaim: remove its files at once, but for what others borrow: nothing brings it back.

        Raises:
            ExistsError: a hold stands in the way.
            NotFoundError: no such checkpoint.
        """
        self._begin_change()
        checkpoint = self._own(selector)
        keeping.bury(self._storage, checkpoint, reason)
        if reclaim:
            with self._dispatcher.lock:
                retiring.reclaim(self._storage, self._finder.scan(), {checkpoint.order})
        return checkpoint

    def _own(self, selector: str) -> Checkpoint:
        checkpoint = self._finder.select(self._finder.view(), selector)
        home = self._finder.home(checkpoint)
        if home is not self._storage:
            raise NotFoundError(f"{checkpoint.id} lies only in the backup {home.url}: open that to change it")
        return checkpoint

    def undelete(self, id: str) -> Checkpoint:
        """Bring back a deleted checkpoint, named by its id or the beginning of it.

        Raises:
            NotFoundError: it is not in the trash, or was reclaimed already.
        """
        self._check_writable()
        return keeping.bring_back(self._storage, self._finder.scan().buried, id)

    def hold(self, selector: str, name: str) -> Checkpoint:
        """Pin a checkpoint under ``name``: it can't be deleted until ``release(name)``, and ``name`` selects it.

        Raises:
            ExistsError: the name is taken.
            FormatError: the name could be taken for a selector.
        """
        self._begin_change()
        layout.check_hold_name(name)
        checkpoint = self._own(selector)
        keeping.hold(self._storage, checkpoint, name)
        return checkpoint

    def release(self, name: str) -> None:
        """Remove the hold ``name``; the checkpoint stays.

        Raises:
            NotFoundError: there is no such hold.
        """
        self._check_writable()
        keeping.release(self._storage, name)

    def prune(
        self, *, grace_s: float = 24 * 3600.0, keep: Keep | None = None, force: bool = False, dry_run: bool = False
    ) -> PruneReport:
        """Collect what killed saves left, and reclaim what was deleted more than ``grace_s`` seconds ago.

        Leftovers of older writers go at once: they can't commit any more. Those of the newest writer go only
        when they are older than ``grace_s``, because its save may be running.

        Args:
            grace_s: what is younger can still be brought back, or may still be written.
            keep: first delete what these rules don't keep, see ``judge``; it can be brought back as if by hand.
            force: also where ``keep`` gives up more than 20 at once, or more than 3 that are over half of all.
            dry_run: only tell what would be done.

        Raises:
            FormatError: so many would go that somebody should look first; nothing was changed.
            StaleWriterError: this run was replaced by a newer one, which prunes now.
            StorageError: nothing is deleted on an incomplete listing.
        """
        own = self._dispatcher.claim.number if not self._shared else None
        if dry_run:
            going = [] if keep is None else [verdict.id for verdict in self.judge(keep).going]
            return preview(self._storage, self._finder.scan(), grace_s=grace_s, own_writer=own).after(going)
        self._begin_change()
        with self._dispatcher.lock:
            self._dispatcher.claim.check_fence()
            gone = self._retire(keep, force=force) if keep is not None else []
            return prune(self._storage, self._finder.scan(), grace_s=grace_s, own_writer=own).after(gone)

    def _retire(self, keep: Keep, *, force: bool) -> list[str]:
        if self._replicators:
            raise FormatError("prune(keep=…) deletes, in this place only; open the store without its backups for that")
        catalogue = self._finder.scan()
        judgement = judged(self._storage, catalogue, keep)
        if not force:
            refuse_many(judgement, self.url, keep)
        return retire(self._storage, catalogue, judgement, keep)
