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
    from ckptstore.engine.background import SaveHandle, TornReadWarning
    from ckptstore.engine.catalogue import Checkpoint, Damage
    from ckptstore.engine.damage import DamageWarning, FallbackWarning
    from ckptstore.engine.loader import Loaded
    from ckptstore.errors import (
        CheckpointError,
        CommitUnknownError,
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
    from ckptstore.maintenance.verify import VerifyReport
    from ckptstore.policy.retention import last
    from ckptstore.state.registry import register_type
    from ckptstore.state.rng import RNG
    from ckptstore.state.staging import fence
    from ckptstore.store import Store, open

__version__ = "0.1.0"

__all__ = [
    "RNG",
    "Checkpoint",
    "CheckpointError",
    "CommitUnknownError",
    "CopyReport",
    "Damage",
    "DamageWarning",
    "ExistsError",
    "FallbackWarning",
    "FormatError",
    "IntegrityError",
    "Lag",
    "Loaded",
    "NoCheckpointError",
    "NotFoundError",
    "PruneReport",
    "SaveFailedError",
    "SaveHandle",
    "StaleWriterError",
    "StateError",
    "StorageError",
    "StorageFullError",
    "Store",
    "TornReadWarning",
    "UnavailableError",
    "VerifyReport",
    "__version__",
    "fence",
    "last",
    "open",
    "register_type",
]

_HOMES = {
    "ckptstore.engine.catalogue": ("Checkpoint", "Damage"),
    "ckptstore.engine.loader": ("Loaded",),
    "ckptstore.errors": tuple(name for name in __all__ if name.endswith("Error")),
    "ckptstore.maintenance.copy": ("CopyReport",),
    "ckptstore.maintenance.prune": ("PruneReport",),
    "ckptstore.maintenance.receipts": ("Lag",),
    "ckptstore.maintenance.verify": ("VerifyReport",),
    "ckptstore.engine.background": ("SaveHandle", "TornReadWarning"),
    "ckptstore.policy.retention": ("last",),
    "ckptstore.state.rng": ("RNG",),
    "ckptstore.state.staging": ("fence",),
    "ckptstore.state.registry": ("register_type",),
    "ckptstore.engine.damage": ("DamageWarning", "FallbackWarning"),
    "ckptstore.store": ("Store", "open"),
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
