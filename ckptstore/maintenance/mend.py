"""What a load found damaged or gone is put back, from where the good bytes were."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from ckptstore.engine.catalogue import Checkpoint, Damage
from ckptstore.engine.damage import DamageWarning
from ckptstore.engine.finder import Finder
from ckptstore.engine.rescue import Rescuer
from ckptstore.format import layout
from ckptstore.maintenance.repair import Repairer
from ckptstore.maintenance.replicate import Replicator
from ckptstore.maintenance.retire import given_up
from ckptstore.maintenance.transfer import Carrier
from ckptstore.policy.retention import Keep
from ckptstore.storage.base import Storage


@dataclass(frozen=True)
class Mender:
    """Mends a primary after a load.

    Attributes:
        keep: what the store's rules give up doesn't come back.
    """

    storage: Storage
    finder: Finder
    carrier: Carrier
    keep: Keep | None
    replicators: Sequence[Replicator]
    read_only: bool

    def repair(self, home: Storage, rescuer: Rescuer) -> None:
        """Replace what ``rescuer`` met damaged in ``home``, and say so."""
        first, more = rescuer.met[0], len(rescuer.met) - 1
        told = f"{first.problem}{f', and {more} more' if more else ''}; the good bytes came from a backup"
        if self.read_only:
            warnings.warn(f"{told}. Nothing was repaired: opened read-only", DamageWarning, stacklevel=5)
            return
        failures = Repairer(home, rescuer.others, self.carrier).noted(rescuer)
        how = f"repairing it failed: {failures[0]}" if failures else "it is repaired"
        warnings.warn(f"{told}, and {how}", DamageWarning, stacklevel=5)

    def restore(self, checkpoint: Checkpoint, home: Storage) -> None:
        """Have the primary be whole where it has lost what no load needs: store.json, or all of ``checkpoint``."""
        if self.finder.store_record() is None:
            repairer = Repairer(self.storage, self.finder.backups.storages, self.carrier)
            repairer.records([Damage(layout.STORE, "")], checkpoint.record.store_id)
        if home is not self.storage:
            self._bring_back(checkpoint, home)

    def _bring_back(self, checkpoint: Checkpoint, home: Storage) -> None:
        """Have the primary hold what was loaded; all that it should have, where it has lost everything."""
        found = self.finder.view()
        missed = [c for c in reversed(found.checkpoints) if found.elsewhere.get(c.id) is home]
        lost_all = len(missed) == len(found.checkpoints)
        gone = set() if self.keep is None else given_up(self.keep, found.checkpoints)
        wanted = [c for c in (missed if lost_all else [checkpoint]) if c.id not in gone]
        for replicator in self.replicators:
            if replicator.storage is home:
                replicator.bring_back(wanted)
