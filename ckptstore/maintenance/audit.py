"""A verification from its beginning to its end: look, prove, repair, prove again."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from functools import partial

from ckptstore.engine.finder import Finder
from ckptstore.engine.rescue import Rescuer
from ckptstore.engine.saver import Tools
from ckptstore.engine.workers import Progress
from ckptstore.maintenance.repair import Repairer
from ckptstore.maintenance.transfer import Carrier
from ckptstore.maintenance.verify import VerifyReport, prove, verify


@dataclass(frozen=True)
class Auditor:
    """Verifies one checkpoint, or all that lies in a store and a share ``sample`` of their blocks."""

    tools: Tools
    finder: Finder
    carrier: Carrier
    selector: str | None
    sample: float

    def report(self, progress: Progress | None) -> VerifyReport:
        """Read, and say what was found.

        Raises:
            NotFoundError: there is no store, or no such checkpoint.
            StorageError: the storage can't be read; that is no damage.
        """
        storage, finder, selector = self.tools.storage, self.finder, self.selector
        # Listed before the commits are: a save that ends in between is committed, not unfinished.
        entries = storage.list("") if selector is None else None
        catalogue = finder.scan(afresh=True)
        if selector is None and finder.store_record() is None and catalogue.highest is None:
            finder.require_store()
        chosen = [finder.select(catalogue, selector)] if selector is not None else list(catalogue.checkpoints)
        return verify(
            storage,
            catalogue,
            chosen,
            entries=entries,
            sample=self.sample,
            pool=self.tools.pool,
            threads=self.tools.threads,
            progress=progress,
        )

    def repaired(self, report: VerifyReport) -> VerifyReport:
        """Repair what ``report`` found, from the backups, and see what is left of it.

        Raises:
            StorageError: as ``report``.
        """
        storage, backups = self.tools.storage, self.finder.backups
        repairer = Repairer(storage, backups.storages, self.carrier)
        store = self.finder.store_record() or backups.store_record()
        found = report.damages
        if repairer.records(report.records, store.store_id if store else None):
            # A checkpoint whose record was damaged has not been read yet.
            report = self.report(None)
            found += report.damages
        bad = [one.checkpoint for one in report.checkpoints if not one.ok]
        read = partial(prove, storage, bad, pool=self.tools.pool, threads=self.tools.threads)
        with closing(Rescuer(backups.storages)) as rescuer:
            read(rescuer)
        repairer.noted(rescuer)
        return report.with_checkpoints(read(None)).after(found)
