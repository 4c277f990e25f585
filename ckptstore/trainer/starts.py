"""The random state at which a pass over a source starts: the process's and that of the source's own generators."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from ckptstore.errors import StateError
from ckptstore.format.digest import BLOCK_DIGEST, new_hasher
from ckptstore.state import rng
from ckptstore.state.rng import RNG

_MAX_SAMPLERS = 8


def capture(source: object) -> dict[str, Any]:
    """What ``restore`` needs to let a pass over ``source`` start as it would now."""
    return {"random": process_state(), "own": own_states(source), "epochs": _epochs(source)}


def restore(start: dict[str, Any], source: object, name: str) -> None:
    """Let a pass over ``source`` start as it did when ``start`` was captured.

    Raises:
        FormatError, StateError: a random state is malformed or doesn't fit; the message names the source.
    """
    set_process_state(start["random"], f"{name}/start/random")
    restore_own(start["own"], source, name)
    for path, sampler in _samplers(source):
        epoch = start["epochs"].get(path)
        if epoch is not None and _has_epoch(sampler) and sampler.epoch != epoch:
            sampler.set_epoch(epoch)


def process_state() -> dict[str, Any]:
    """The state of Python's, NumPy's and torch's generators on the CPU: no iterator draws from a CUDA device's."""
    return {
        "python": rng.python_state(random),
        "numpy": np.random.get_state(legacy=False),
        "torch": torch.get_rng_state(),
    }


def set_process_state(state: Any, path: str) -> None:
    """The inverse of ``process_state``; also for what ``RNG().state_dict()`` gives.

    Raises:
        FormatError, StateError: it is malformed or doesn't fit.
    """
    rng.set_state("rng", RNG(), state, path)


def fingerprint() -> str:
    """A digest of the process's random state."""
    return digest_of(process_state())


def digest_of(state: Any) -> str:
    """A digest of random states as they are saved."""
    hasher = new_hasher(BLOCK_DIGEST)

    def add(value: Any) -> None:
        if isinstance(value, dict):
            for key in sorted(value, key=str):
                hasher.update(str(key).encode())
                add(value[key])
        elif isinstance(value, torch.Tensor):
            hasher.update(value.numpy().tobytes())
        else:
            hasher.update(value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode())

    add(state)
    return hasher.hexdigest()


def own_states(source: object) -> dict[str, Any]:
    """The states of all generators that the source and its samplers own, by where they are."""
    found: dict[str, Any] = {}
    for path, generator in _generators(source):
        state = rng.state_of(generator)
        if state is not None:
            found[path] = {"kind": state[0], "state": state[1]}
    return found


def restore_own(states: dict[str, Any], source: object, name: str) -> None:
    """The inverse of ``own_states``.

    Raises:
        FormatError, StateError: a state is malformed or doesn't fit.
    """
    targets = dict(_generators(source))
    for path, saved in states.items():
        place = f"{name}/{path}"
        target = targets.get(path)
        if target is None:
            warnings.warn(
                f"the source {name!r} had a random generator at {path} when it was saved and has none now: its order "
                "won't continue where it was",
                stacklevel=2,
            )
            continue
        kind = rng.state_of(target)
        if not isinstance(saved, dict) or kind is None or saved.get("kind") != kind[0]:
            raise StateError(f"the generator at {place!r} isn't of the kind that was saved", path=place)
        rng.set_state(kind[0], target, saved.get("state"), place)


def _generators(source: object) -> Iterator[tuple[str, Any]]:
    """Where a generator is, and the generator, each once."""
    seen: set[int] = set()
    for prefix, owner in (("", source), *((f"{path}.", sampler) for path, sampler in _samplers(source))):
        for key, value in getattr(owner, "__dict__", {}).items():
            if type(value) in rng.GENERATORS.values() and not isinstance(value, RNG) and id(value) not in seen:
                seen.add(id(value))
                yield prefix + key, value


def _samplers(source: object) -> Iterator[tuple[str, Any]]:
    """The samplers of a loader and those that they wrap, each once."""
    waiting, seen = [("", source)], {id(source)}
    while waiting and len(seen) <= _MAX_SAMPLERS:
        prefix, owner = waiting.pop(0)
        for key in ("sampler", "batch_sampler"):
            sampler = getattr(owner, "__dict__", {}).get(key)
            if sampler is not None and id(sampler) not in seen:
                seen.add(id(sampler))
                waiting.append((f"{prefix}{key}.", sampler))
                yield prefix + key, sampler


def _epochs(source: object) -> dict[str, int]:
    return {path: sampler.epoch for path, sampler in _samplers(source) if _has_epoch(sampler)}


def _has_epoch(sampler: Any) -> bool:
    return type(getattr(sampler, "epoch", None)) is int and callable(getattr(sampler, "set_epoch", None))
