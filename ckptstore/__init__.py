"""Checkpoints that are there when you need them: saved atomically, proven on every load.

>>> import ckptstore as cs
>>> store = cs.open("memory://docs")
>>> saved = store.save({"weights": [1.0, 2.0]}, step=1)
>>> store.load("latest")
{'weights': [1.0, 2.0]}
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ckptstore.config.settings import Parts
    from ckptstore.engine.background import SaveHandle, TornReadWarning
    from ckptstore.engine.catalogue import Checkpoint, Damage
    from ckptstore.engine.damage import DamageWarning, FallbackWarning
    from ckptstore.engine.loader import Loaded
    from ckptstore.errors import (
        CheckpointError,
        CommitUnknownError,
        DivergedError,
        ExistsError,
        FormatError,
        IntegrityError,
        NoCheckpointError,
        NotFoundError,
        SaveFailedError,
        StaleWriterError,
        StateError,
        StorageError,
        StorageFullError,
        UnavailableError,
    )
    from ckptstore.maintenance.copy import CopyReport
    from ckptstore.maintenance.prune import PruneReport
    from ckptstore.maintenance.receipts import Lag
    from ckptstore.maintenance.verifications import Verification
    from ckptstore.maintenance.verify import VerifyReport
    from ckptstore.opening import open
    from ckptstore.policy.budget import budget
    from ckptstore.policy.epochs import epoch_plan
    from ckptstore.policy.events import on_best
    from ckptstore.policy.guard import diverged
    from ckptstore.policy.judge import Judgement, Verdict
    from ckptstore.policy.plan import Plan, foresee
    from ckptstore.policy.progress import Costs, Length, Past, Progress
    from ckptstore.policy.rules import (
        at_most,
        best,
        epochs,
        every_kept,
        last,
        milestones,
        tagged,
        within,
    )
    from ckptstore.policy.steps import at, every
    from ckptstore.state.registry import register_type
    from ckptstore.state.rng import RNG
    from ckptstore.state.staging import fence
    from ckptstore.store import Store
    from ckptstore.tools.average import average
    from ckptstore.tools.bisect import Bisection, bisect
    from ckptstore.tools.diff import Diff, diff
    from ckptstore.tools.examine import TensorStats, examine
    from ckptstore.tools.export import ExportReport, export
    from ckptstore.tools.importing.run import Imported, ImportReport, import_from
    from ckptstore.tools.report import report
    from ckptstore.tools.soup import greedy_soup
    from ckptstore.tools.usage import Usage, usage
    from ckptstore.trainer.checkpointer import Checkpointer
    from ckptstore.trainer.events import Failed, Listener, Resumed, Saved, Stats

__version__ = "0.1.0"

__all__ = [
    "Bisection",
    "Checkpoint",
    "CheckpointError",
    "Checkpointer",
    "CommitUnknownError",
    "CopyReport",
    "Costs",
    "Damage",
    "DamageWarning",
    "Diff",
    "DivergedError",
    "ExistsError",
    "ExportReport",
    "Failed",
    "FallbackWarning",
    "FormatError",
    "ImportReport",
    "Imported",
    "IntegrityError",
    "Judgement",
    "Lag",
    "Length",
    "Listener",
    "Loaded",
    "NoCheckpointError",
    "NotFoundError",
    "Parts",
    "Past",
    "Plan",
    "Progress",
    "PruneReport",
    "RNG",
    "Resumed",
    "SaveFailedError",
    "SaveHandle",
    "Saved",
    "StaleWriterError",
    "StateError",
    "Stats",
    "StorageError",
    "StorageFullError",
    "Store",
    "TensorStats",
    "TornReadWarning",
    "UnavailableError",
    "Usage",
    "Verdict",
    "Verification",
    "VerifyReport",
    "__version__",
    "at",
    "at_most",
    "average",
    "best",
    "bisect",
    "budget",
    "diff",
    "diverged",
    "epoch_plan",
    "epochs",
    "every",
    "every_kept",
    "export",
    "examine",
    "fence",
    "foresee",
    "import_from",
    "greedy_soup",
    "last",
    "milestones",
    "on_best",
    "open",
    "register_type",
    "report",
    "tagged",
    "usage",
    "within",
]

_HOMES = {
    "ckptstore.engine.catalogue": ("Checkpoint", "Damage"),
    "ckptstore.engine.loader": ("Loaded",),
    "ckptstore.errors": tuple(name for name in __all__ if name.endswith("Error")),
    "ckptstore.maintenance.copy": ("CopyReport",),
    "ckptstore.maintenance.prune": ("PruneReport",),
    "ckptstore.maintenance.receipts": ("Lag",),
    "ckptstore.maintenance.verifications": ("Verification",),
    "ckptstore.maintenance.verify": ("VerifyReport",),
    "ckptstore.engine.background": ("SaveHandle", "TornReadWarning"),
    "ckptstore.opening": ("open",),
    "ckptstore.policy.budget": ("budget",),
    "ckptstore.policy.epochs": ("epoch_plan",),
    "ckptstore.policy.events": ("on_best",),
    "ckptstore.policy.guard": ("diverged",),
    "ckptstore.policy.judge": ("Judgement", "Verdict"),
    "ckptstore.policy.plan": ("Plan", "foresee"),
    "ckptstore.policy.progress": ("Costs", "Length", "Past", "Progress"),
    "ckptstore.policy.rules": ("at_most", "best", "epochs", "every_kept", "last", "milestones", "tagged", "within"),
    "ckptstore.policy.steps": ("at", "every"),
    "ckptstore.state.rng": ("RNG",),
    "ckptstore.state.staging": ("fence",),
    "ckptstore.config.settings": ("Parts",),
    "ckptstore.trainer.checkpointer": ("Checkpointer",),
    "ckptstore.trainer.events": ("Failed", "Listener", "Resumed", "Saved", "Stats"),
    "ckptstore.state.registry": ("register_type",),
    "ckptstore.engine.damage": ("DamageWarning", "FallbackWarning"),
    "ckptstore.store": ("Store",),
    "ckptstore.tools.bisect": ("Bisection", "bisect"),
    "ckptstore.tools.report": ("report",),
    "ckptstore.tools.usage": ("Usage", "usage"),
    "ckptstore.tools.importing.run": ("ImportReport", "Imported", "import_from"),
    "ckptstore.tools.export": ("ExportReport", "export"),
    "ckptstore.tools.average": ("average",),
    "ckptstore.tools.diff": ("Diff", "diff"),
    "ckptstore.tools.examine": ("TensorStats", "examine"),
    "ckptstore.tools.soup": ("greedy_soup",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    # Loaded on first use: `ckptstore --help` answers at once, and looking needs no torch.
    if name not in _HOME:
        raise AttributeError(f"module 'ckptstore' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
