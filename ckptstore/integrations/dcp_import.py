"""Checkpoints that PyTorch's own ``FileSystemWriter`` wrote, taken into a store."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from ckptstore.engine.catalogue import Checkpoint
from ckptstore.engine.facts import Facts
from ckptstore.errors import FormatError, StateError
from ckptstore.store import Store
from ckptstore.tools.importing.found import Found
from ckptstore.tools.importing.run import Wishes, import_found
from ckptstore.tools.importing.sandbox import Sandbox


def import_dcp(
    path: str | os.PathLike[str],
    store: Store,
    *,
    step: int,
    epoch: int | None = None,
    metrics: Mapping[str, Any] | None = None,
    modes: Mapping[str, Literal["min", "max"]] | None = None,
    reasons: Iterable[str] = (),
    skip: Iterable[str] = (),
) -> Checkpoint:
    """Save in ``store`` what ``torch.distributed.checkpoint`` saved in a folder with its own ``FileSystemWriter``.

    Of however many ranks it is: the tensors are put together, and the state is nested again as it was. Nothing in the
    folder runs: ``.metadata``, which is a pickle, is taken apart, tensors and objects are read as data only, in a
    process of their own. Tensors are streamed: the state needn't fit into memory.

    Args:
        path: the folder, on a local file system.
        store: where to save.
        step: the number of completed optimizer steps, which the folder doesn't tell.
        epoch, metrics, modes, reasons: as ``Store.save``.
        skip: flat keys, as ``optim.state.exp_avg``, that are left out, with all in them.

    Raises:
        NotFoundError: there is no such checkpoint.
        StateError: an object in it, which the error names, can't be read or stored without running pickled code.
        FormatError: its metadata are malformed, contradict themselves, or point outside of the folder.
        IntegrityError: a file is missing, too short or damaged.
        SaveFailedError, CommitUnknownError, StaleWriterError: as ``Store.save``.
    """
    if "://" in os.fspath(path):
        raise FormatError(f"{path} can't be imported from there: copy the folder to a local file system")
    folder = Path(os.path.realpath(path))
    facts = Facts.of(step, epoch, metrics or {}, modes or {}, reasons)
    wishes = Wishes(
        step, epoch, facts.metrics, again=True, skip=list(skip), reasons=list(facts.reasons), modes=modes or {}
    )
    with Sandbox() as sandbox:
        try:
            report = import_found([Found("dcp", folder, {"": folder}, step)], store, wishes, sandbox)
        except StateError as error:
            if error.path is None or "pickled code" not in error.message:
                raise
            raise StateError(f"{error}. Leave it out with skip=[{error.path!r:.100}]", path=error.path) from error
    return report.checkpoints[0]
