"""A folder of ``torch.distributed.checkpoint``: what its metadata say, read without running them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ckptstore.errors import FormatError, IntegrityError, NotFoundError, StateError
from ckptstore.tools.importing.dcpfiles import opened
from ckptstore.tools.importing.dcpmetadata import METADATA_LIMIT, DcpContents, Place, read_metadata

DCP_METADATA = ".metadata"


@dataclass(frozen=True)
class Folder:
    """A folder, and what it holds."""

    path: Path
    contents: DcpContents


def open_folder(path: Path, skip: Sequence[str] = ()) -> Folder:
    """What a folder holds, without the flat keys in ``skip``.

    Raises:
        NotFoundError: it holds no checkpoint, or nothing of such a key.
        StateError: its metadata would need code to run.
        FormatError: they are malformed, contradict themselves, or point outside of the folder.
        IntegrityError: a file is missing or too short.
    """
    folder = Path(os.path.realpath(path))
    contents = _without(read_metadata(_metadata(folder), DCP_METADATA), skip)
    _check_places(folder, contents.places)
    return Folder(folder, contents)


def _without(contents: DcpContents, skip: Sequence[str]) -> DcpContents:
    for name in skip:
        if not any(_is_in(key, name) for key in contents.entries):
            raise NotFoundError(f"skip: there is no {name!r} in it")
    kept = {k: entry for k, entry in contents.entries.items() if not any(_is_in(k, name) for name in skip)}
    return DcpContents(kept, contents.paths)


def _is_in(key: str, name: str) -> bool:
    return key == name or key.startswith(f"{name}.")


def _metadata(folder: Path) -> bytes:
    file = folder / DCP_METADATA
    if not file.exists():
        ranks = sorted(folder.glob("__*.metadata"))
        if ranks:
            raise StateError(
                f"{folder} was saved with use_collectives=False: each rank has metadata of its own ({ranks[0].name}), "
                "and nothing says that they belong together",
                path=ranks[0].name,
            )
        raise NotFoundError(f"{folder} holds no checkpoint of torch.distributed.checkpoint: it has no {DCP_METADATA}")
    with opened(folder, DCP_METADATA) as stream:
        data = stream.read(METADATA_LIMIT + 1)
    if len(data) > METADATA_LIMIT:
        raise FormatError(f"{file} has more than {METADATA_LIMIT} bytes", key=DCP_METADATA)
    return data


def _check_places(folder: Path, places: list[Place]) -> None:
    """Nothing, if all bytes are there. Each belongs to one entry, so all that is read is no more than the files."""
    sizes: dict[str, int] = {}
    for place in places:
        if place.file not in sizes:
            with opened(folder, place.file) as stream:
                sizes[place.file] = os.fstat(stream.fileno()).st_size
        end = place.begin + place.length
        if end > sizes[place.file]:
            raise IntegrityError(
                f"{folder / place.file} has {sizes[place.file]} bytes, and {end} are needed: it was cut off, or an "
                "older checkpoint in the same folder was overwritten",
                key=place.file,
                expected=end,
                actual=sizes[place.file],
            )
