"""The ``.ckpt`` files of Lightning's ``ModelCheckpoint``, and the folders in which its loggers put them."""

from __future__ import annotations

from collections.abc import Iterator

from ckptstore.tools.importing.folder import Folder
from ckptstore.tools.importing.found import Found

SUFFIX = ".ckpt"
_STEP = "global_step"
_EPOCH = "loops/fit_loop/epoch_progress/current/processed"
_META = "meta.pt"


def checkpoints_in(folder: Folder) -> Iterator[Found]:
    """Each file, and each folder of a sharded one, whose steps only the content tells: names are free.

    The file's own ``epoch`` is the one that runs, even where its end was reached.
    """
    for name in (name for name in folder.files if name.endswith(SUFFIX)):
        yield Found(
            "lightning", folder.path / name, {"": folder.path / name}, None, facts_in={"step": _STEP, "epoch": _EPOCH}
        )
    for name in sorted(name for name in folder.folders if name.endswith(SUFFIX)):
        found = sharded(folder.child(name))
        if found:
            yield found


def sharded(folder: Folder) -> Found | None:
    """A checkpoint of ranks: a DCP, beside which ``meta.pt`` holds all that is no tensor."""
    if not (folder.files.get(".metadata") and folder.files.get(_META)):
        return None
    files = {"state": folder.path, "meta": folder.path / _META}
    return Found("lightning", folder.path, files, None, facts_in={"step": f"meta/{_STEP}", "epoch": f"meta/{_EPOCH}"})
