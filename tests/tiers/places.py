"""States to save, and what lies in a place, past the code under test."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

import ckptstore as cs
from ckptstore.store import Store


def state(step: int, *, width: int = 64) -> dict[str, Any]:
    """A state whose tensors tell the step."""
    return {"model": {"weight": torch.full((width, width), float(step)), "bias": torch.arange(8.0) + step}, "n": step}


def holds(store: Store, selector: str, step: int) -> bool:
    """Whether ``selector`` loads just what was saved at ``step``."""
    found, saved = store.load(selector), state(step)
    same = all(torch.equal(found["model"][name], saved["model"][name]) for name in ("weight", "bias"))
    return same and found["n"] == step


def steps(place: Path) -> list[int]:
    """The steps of the checkpoints that lie at ``place`` alone."""
    with cs.open(place) as store:
        return [checkpoint.step for checkpoint in store.checkpoints()]


def objects(place: Path, folder: str) -> dict[str, bytes]:
    """Every file below ``folder`` of ``place``."""
    found = (path for path in (place / folder).rglob("*") if path.is_file())
    return {path.relative_to(place).as_posix(): path.read_bytes() for path in found}


def flip(path: Path, offset: int) -> None:
    """Change one bit."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(bytes(data))


def data_file(place: Path, id: str) -> Path:
    """The only data file of a checkpoint."""
    (path,) = (place / "checkpoints" / id).glob("model.*")
    return path


def lose(place: Path) -> None:
    """The disk is gone."""
    shutil.rmtree(place)
