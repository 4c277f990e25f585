"""What a foreign folder or file is: the checkpoints in it, told by names and JSON, without opening what may run code.

Nothing goes by the time of a file, which a copy changes, nor by text, in which 9 comes after 10: what is recorded is
what counts, and then the numbers in the last part of a path alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ckptstore.errors import CheckpointError, FormatError, NotFoundError, StorageError
from ckptstore.tools.importing import lightning, older
from ckptstore.tools.importing.folder import Folder, by_numbers
from ckptstore.tools.importing.found import Found
from ckptstore.tools.importing.infolder import checkpoint_in
from ckptstore.tools.importing.noted import count_of
from ckptstore.tools.importing.parts import NUMBERED, refused, shortened
from ckptstore.tools.importing.single import SUFFIXES, found_in_file
from ckptstore.tools.importing.told import value_at
from ckptstore.tools.importing.weights import weights_in

_LOOKED_FOR = (
    "folders as checkpoint-500 with model.safetensors or pytorch_model.bin, Lightning's .ckpt files, a "
    "torch.distributed.checkpoint (.metadata), files as latest.pt, and single .pt, .pth, .bin and .safetensors files"
)
_RUN = re.compile(r"(?:version_|run-)\d+", re.ASCII)
_STEP = re.compile(r"(?:.*[-_.])?step[=_-]?([0-9]{1,15})(?:[-_.].*)?")
_UNFINISHED = re.compile(r"(?:.*[-_.])?te?mp(?:[-_.].*)?", re.IGNORECASE)
_SHARDED = "a folder of shards that only the strategy that wrote them can read"
_NO_STEP = "records no step: import it by itself, and say which with --step"


def find(path: Path) -> list[Found]:
    """The checkpoints that lie at ``path``, oldest first, as far as names and JSON tell (see ``told.settled``).

    What lies beside them and isn't imported stands in the newest one's ``left_out``.

    Raises:
        NotFoundError: there is nothing at ``path``, or nothing that is a checkpoint.
        FormatError: what is there is incomplete, or holds several runs.
        StorageError: it can't be read.
    """
    if not path.is_dir():
        return [_file(path)]
    folder = Folder.at(path)
    for place in _places(folder):
        found = _of_run(place)
        if found:
            return found if place is folder else _with(found, folder, _weights_beside(folder))
    itself = checkpoint_in(folder)
    if isinstance(itself, str):
        raise FormatError(f"{path} can't be imported: {itself}", key=str(path))
    found = [itself] if itself else _of_any_name(folder)
    if not found:
        seen = "".join(f"; {name} is {why}" for name, why in list(folder.left_out.items())[:3])
        raise NotFoundError(f"no checkpoint at {path}: looked for {_LOOKED_FOR}{seen}", key=str(path))
    return found


def _file(path: Path) -> Found:
    """The checkpoint that a file is, with what the names around it tell."""
    if not path.exists():
        raise NotFoundError(f"there is nothing at {path}", key=str(path))
    try:
        around = _files_of_programs(Folder.at(path.parent))
    except StorageError:
        # Who may read a file may not always look at what is beside it.
        around = []
    return next((found for found in around if found.path.name == path.name), None) or found_in_file(path)


def _places(folder: Folder) -> Iterable[Folder]:
    """Where a run's checkpoints may lie: in the folder, in ``checkpoints``, or where Lightning's loggers put them."""
    yield folder
    if "checkpoints" in folder.folders:
        yield folder.child("checkpoints")
    logs = folder.child("lightning_logs") if "lightning_logs" in folder.folders else folder
    runs = []
    for name in sorted((name for name in logs.folders if _RUN.fullmatch(name)), key=by_numbers):
        run = logs.child(name)
        place = run.child("checkpoints") if "checkpoints" in run.folders else run
        if _is_run(place):
            runs.append(place)
    if len(runs) > 1:
        names = ", ".join(str(run.path.relative_to(folder.path)) for run in runs)
        raise FormatError(f"{folder.path} holds several runs: import one of {names}", key=str(folder.path))
    yield from runs


def _of_run(folder: Folder) -> list[Found]:
    """All that lies in the folder under names that programs give; [] if nothing does."""
    files = _files_of_programs(folder)
    left_out = older.unfinished_in(folder)
    found = [one for one in files if not _is_spare(folder, one.path.name, left_out)]
    named = bool(files)
    for name in folder.folders:
        if any(one.path.name == name for one in files):
            continue
        one = _SHARDED if name.endswith(lightning.SUFFIX) else _inside(folder, name, checkpoint_in)
        named = named or one is _SHARDED or (one is not None and bool(NUMBERED.fullmatch(name)))
        _sort_in(one, name, found, left_out)
    if not named:
        return []
    if not found:
        why = "; ".join(f"{name} {why}" for name, why in list(left_out.items())[:3])
        raise FormatError(f"no checkpoint in {folder.path} can be imported: {why}", key=str(folder.path))
    found = _in_order(found)
    _itself(folder, found, left_out)
    known = {one.path.name for one in files} | weights_in(folder).names
    for name in (name for name in folder.files if name.endswith(SUFFIXES) and name not in known):
        left_out.setdefault(name, refused(name) or "no checkpoint of this run, by its name: import it by itself")
    return _with(found, folder, left_out)


def _is_run(folder: Folder) -> bool:
    try:
        return bool(_of_run(folder))
    except CheckpointError:
        # One that is incomplete is one of several all the same.
        return True


def _inside(folder: Folder, name: str, look: Callable[[Folder], Any]) -> Any:
    """What ``look`` finds in a subfolder; the reason where it can't be looked into, which needn't keep the others."""
    try:
        return look(folder.child(name))
    except CheckpointError as error:
        return error.message


def _is_spare(folder: Folder, name: str, left_out: dict[str, str]) -> bool:
    """Whether a file holds nothing, or what another one holds; it is noted as left out."""
    if name in folder.links:
        left_out[name] = f"a link to {folder.links[name].relative_to(folder.root)}"
    elif folder.files.get(name) == 0:
        left_out[name] = "empty"
    return name in left_out


def _sort_in(one: Found | str | None, name: str, found: list[Found], left_out: dict[str, str]) -> None:
    if isinstance(one, str):
        left_out[name] = one
    elif one is not None and _UNFINISHED.fullmatch(name):
        left_out[name] = "an unfinished save, by its name"
    elif one is not None and one.step is None and "step" not in one.facts_in:
        left_out[name] = _NO_STEP
    elif one is not None:
        found.append(one)


def _itself(folder: Folder, found: list[Found], left_out: dict[str, str]) -> None:
    """The weights that a program puts beside its checkpoints at the end, most often those of the last one."""
    itself = checkpoint_in(replace(folder, folders=frozenset()))
    if not isinstance(itself, Found) or "model" not in itself.files:
        return
    newest, name = found[-1].step, itself.files["model"].name
    # Its own name, which may be that of a checkpoint, says nothing.
    step = count_of(value_at(itself.values, "trainer_state/global_step"))
    if step is None or newest is None:
        left_out[name] = _NO_STEP
    elif step > newest:
        found.append(itself)
    else:
        left_out[name] = f"the weights at the end of training, step {step}, of which there is a checkpoint"


def _weights_beside(folder: Folder) -> dict[str, str]:
    """Weights in a run's folder whose checkpoints lie in another one; most often they lead there."""
    links = {name: f"a link to {target.relative_to(folder.root)}" for name, target in folder.links.items()}
    return {str(folder.path / name): links.get(name, _NO_STEP) for name in sorted(weights_in(folder).names)}


def _files_of_programs(folder: Folder) -> list[Found]:
    return [*older.tiers_in(folder), *older.milestones_in(folder), *lightning.checkpoints_in(folder)]


def _of_any_name(folder: Folder) -> list[Found]:
    """Folders and files whose names say nothing of who wrote them."""
    found: list[Found] = []
    left_out: dict[str, str] = {}
    for name in folder.folders:
        if _inside(folder, name, lambda inside: any(map(_of_run, _places(inside)))):
            left_out[name] = "a run of its own: import it by itself"
        else:
            _sort_in(_inside(folder, name, checkpoint_in), name, found, left_out)
    for name in (name for name in folder.files if name.endswith(SUFFIXES)):
        if not _is_spare(folder, name, left_out):
            found.append(found_in_file(folder.path / name))
    if left_out and not found:
        why = "; ".join(f"{name}: {why}" for name, why in list(left_out.items())[:3])
        raise NotFoundError(f"no checkpoint at {folder.path} can be imported: {why}", key=str(folder.path))
    return _with(_in_order(found), folder, left_out) if found else []


def _in_order(found: Iterable[Found]) -> list[Found]:
    return sorted(found, key=_order)


def _order(found: Found) -> tuple[Any, ...]:
    match = _STEP.fullmatch(found.path.name)
    step = int(match[1]) if found.step is None and match else found.step
    time = found.created.timestamp() if found.created else 0.0
    return step is None, step or 0, time, by_numbers(found.path.name)


def _with(found: list[Found], folder: Folder, left_out: Mapping[str, str]) -> list[Found]:
    """The newest one says what lies beside."""
    newest, beside = found[-1], shortened({**left_out, **folder.left_out}, folder)
    return [*found[:-1], replace(newest, left_out={**newest.left_out, **beside})]
