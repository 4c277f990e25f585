"""A checkpoint that is one file."""

from __future__ import annotations

import re
import stat
from pathlib import Path

from ckptstore.errors import FormatError, NotFoundError
from ckptstore.tools.importing.found import Found

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
_INDEX = (".safetensors.index.json", ".bin.index.json")
_STEP = re.compile(r"(?:.*[-_.])?(?:step|iter|iteration)[=_-]?([0-9]{1,15})(?:[-_.].*)?")


def found_in_file(path: Path) -> Found:
    """What the file's name tells of it.

    Raises:
        NotFoundError: it isn't there.
        FormatError: it is empty, no regular file, or of a kind that holds no checkpoint.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise NotFoundError(f"{path} can't be looked at: {error.strerror or error}", key=str(path)) from error
    if not stat.S_ISREG(found.st_mode):
        raise FormatError(f"{path} is no regular file", key=str(path))
    if not path.name.endswith((*SUFFIXES, *_INDEX)):
        known = ", ".join(SUFFIXES)
        raise FormatError(f"{path} holds no checkpoint by its name: that of one ends in {known}", key=str(path))
    if found.st_size == 0:
        raise FormatError(f"{path} is empty", key=str(path))
    match = _STEP.fullmatch(path.name)
    step = int(match[1]) if match else None
    if path.name.endswith((".safetensors", *_INDEX)):
        return Found("safetensors" if ".safetensors" in path.name else "torch", path, {"model": path}, step)
    return Found("torch", path, {"": path}, step)
