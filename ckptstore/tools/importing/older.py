"""Programs' own layouts: folders with ``training_state.pt`` or a file per component, tiers of files, milestones."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ckptstore.tools.importing.folder import Folder, by_numbers, number_in
from ckptstore.tools.importing.found import Found
from ckptstore.tools.importing.huggingface import NUMBERED
from ckptstore.tools.importing.noted import Noted, count_of, time_of
from ckptstore.tools.importing.parts import NO_MODEL

_STATE = "training_state.pt"
_MANIFEST = "checkpoint_manifest.json"
_COMPONENT = re.compile(r"(optimizer|scheduler|trainer|dataset)_state\.pt|rng_state_rank_\d+\.pt", re.ASCII)

_TIER = re.compile(
    r"latest(_backup)?\.pt|best_model(_backup|_previous)?\.pt|rolling_(step_\d+|last_backup)\.pt|epoch_\d{5}\.pt"
    r"|emergency_step_\d+_\d{8}_\d{6}\.pt",
    re.ASCII,
)
_ROLLING = re.compile(r"rolling_step_([0-9]+)\.pt")
_EPOCH = re.compile(r"epoch_([0-9]{5})\.pt")
_EMERGENCY = re.compile(r"emergency_step_([0-9]+)_[0-9]{8}_[0-9]{6}\.pt")
_TIER_FACTS = {
    "step": "step",
    "epoch": "epoch",
    "metric:train_loss": "train_loss",
    "metric:val_loss": "val_loss",
    "created": "timestamp",
}
_MILESTONE = re.compile(r"checkpoint_([0-9]+\.[0-9])([BMK])_step_([0-9]+)\.pt")


def state_noted(folder: Folder) -> Noted | None:
    """``checkpoint-N`` with ``training_state.pt``, and ``metadata.json`` where there is one."""
    if _STATE not in folder.files:
        return None
    found = Noted("training state")
    metadata = found.read(folder, "metadata.json", "metadata")
    found.step = count_of(metadata.get("global_step"))
    found.epoch = count_of(metadata.get("epoch"))
    found.created = time_of(metadata.get("timestamp"))
    _from_name(found, folder, "global_step")
    if found.epoch is None:
        found.facts_in["epoch"] = "epoch"
    return found


def components_noted(folder: Folder) -> Noted | None:
    """``checkpoint-N`` with a file for each component, and ``checkpoint_manifest.json``."""
    if not any(name in (_MANIFEST, NO_MODEL) or _COMPONENT.fullmatch(name) for name in folder.files):
        return None
    found = Noted("components")
    found.created = time_of(found.read(folder, _MANIFEST, "manifest").get("timestamp"))
    _from_name(found, folder, "trainer/global_step")
    return found


def tiers_in(folder: Folder) -> Iterator[Found]:
    """``latest.pt``, ``rolling_step_000250.pt`` and their like. Steps and epochs count from 0.

    A number in a name, and ``step`` in the file, is that of the last step done; where a signal ended the run it is that
    of the step that would have come next. ``epoch`` is the running one: so many are complete, and one more at its end.
    """
    for name in (name for name in folder.files if _TIER.fullmatch(name)):
        emergency, ended = number_in(_EMERGENCY, name), number_in(_EPOCH, name)
        step = number_in(_ROLLING, name) if emergency is None else max(emergency - 1, 0)
        facts = dict(_TIER_FACTS)
        if emergency is not None:
            facts = {fact: place for fact, place in facts.items() if not fact.startswith("metric:")}
        if step is not None:
            del facts["step"]
        if ended is not None:
            del facts["epoch"]
        yield Found(
            "tiers",
            folder.path / name,
            {"": folder.path / name},
            step,
            epoch=None if ended is None else ended + 1,
            facts_in=facts,
            reasons=_tier_reasons(name, emergency, ended),
        )


def _tier_reasons(name: str, emergency: int | None, ended: int | None) -> tuple[str, ...]:
    if emergency is not None:
        return (f"interrupted before step {emergency}",)
    if ended is not None:
        return (f"epoch {ended + 1}",)
    return ("best val_loss",) if name == "best_model.pt" else ()


def milestones_in(folder: Folder) -> Iterator[Found]:
    """``checkpoint_1.0B_step_10000.pt``, and the JSON beside it where there is one that can be read."""
    for name in folder.files:
        match = _MILESTONE.fullmatch(name)
        if match is None:
            continue
        beside = name.removesuffix(".pt") + ".json"
        found = Noted("milestones")
        step = count_of(found.read(folder, beside, "").get("global_step"))
        # The file says the same, and is what is imported; the JSON is for people.
        found.values.clear()
        yield Found(
            found.kind,
            folder.path / name,
            {"": folder.path / name},
            int(match[3]) if step is None else step,
            facts_in={"step": "global_step"},
            left_out=found.left_out,
            reasons=(f"milestone {match[1].removesuffix('.0')}{match[2]}",),
        )


def unfinished_in(folder: Folder) -> dict[str, str]:
    """Names that only say that something isn't there: leftovers of a save, and JSON whose checkpoint is gone."""
    gone = {}
    for name in sorted(folder.files, key=by_numbers):
        checkpoint = name.removesuffix(".json") + ".pt"
        if name.endswith(".pt.tmp"):
            gone[name] = "an unfinished save"
        elif name.endswith(".json") and _MILESTONE.fullmatch(checkpoint) and checkpoint not in folder.files:
            gone[name] = f"describes {checkpoint}, which isn't there"
    return gone


def _from_name(found: Noted, folder: Folder, place: str) -> None:
    """Where no JSON tells the step, the content does; the name is right as long as nobody renamed the folder."""
    if found.step is None:
        found.step = number_in(NUMBERED, folder.path.name)
        found.facts_in["step"] = place
