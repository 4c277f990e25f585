"""``torch.distributed.checkpoint`` (DCP) with a store in place of its folder of pickles.

DCP plans who saves and loads what; all below that is the store's: hashed blocks, one commit for all ranks, selectors,
retention, backups, and no pickle::

    import torch.distributed.checkpoint as dcp
    from ckptstore.integrations.dcp import CkptStoreReader, CkptStoreWriter

    store = ckptstore.open("runs/gpt2")                    # on every rank
    dcp.save(state, storage_writer=CkptStoreWriter(store, step=1000, metrics={"val_loss": 3.1}))
    dcp.load(state, storage_reader=CkptStoreReader(store, "best:val_loss"))

Each is a checkpoint like any other of the store: ``store.load``, ``ckptstore show``, ``verify`` and ``copy`` take it.
What DCP's own ``FileSystemWriter`` has written before, ``import_dcp`` brings into a store.
"""

from __future__ import annotations

from ckptstore.integrations.dcp_import import import_dcp
from ckptstore.integrations.dcp_planners import CkptStoreLoadPlanner, CkptStoreSavePlanner
from ckptstore.integrations.dcp_reader import CkptStoreReader
from ckptstore.integrations.dcp_writer import CkptStoreWriter

__all__ = ["CkptStoreLoadPlanner", "CkptStoreReader", "CkptStoreSavePlanner", "CkptStoreWriter", "import_dcp"]
