"""The parts of the state that a user gives: what each one is, and which of them are meant."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, Literal, TypeAlias, TypeVar

import torch
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils.data import DataLoader

from ckptstore.config.settings import Parts
from ckptstore.errors import StateError
from ckptstore.state.modules import is_stateful
from ckptstore.trainer import prepared
from ckptstore.trainer.run import PART

Kind: TypeAlias = Literal["optimizer", "scheduler", "data"]

T = TypeVar("T")

_TYPES: dict[Kind, tuple[type, ...]] = {
    "optimizer": (torch.optim.Optimizer,),
    "scheduler": (LRScheduler, ReduceLROnPlateau),
    "data": (DataLoader,),
}
_NAMES: dict[str, Kind] = {"optimizer": "optimizer", "scheduler": "scheduler", "lr_scheduler": "scheduler"}


def kind_of(name: str, value: object) -> Kind | None:
    """What an entry of the state is: by its class, or by its name; None for the model and whatever else."""
    for kind, types in _TYPES.items():
        if _all_are(value, types):
            return kind
    return "data" if name == "data" and is_stateful(value) else _NAMES.get(name)


def _all_are(value: object, types: tuple[type, ...]) -> bool:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return bool(value) and all(_all_are(item, types) for item in value)
    return isinstance(value, types)


def check_state(state: object) -> dict[str, Any]:
    """``state`` as a dict of its own.

    Raises:
        StateError: it is no mapping of names, or uses the name that the run itself has.
    """
    if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
        raise StateError(
            f"the state is a {type(state).__name__}: give a dict of names, as {{'model': model, 'optimizer': "
            "optimizer}",
            path="",
        )
    if PART in state:
        raise StateError(f"{PART!r} is where the run itself stands in each checkpoint: take another name", path=PART)
    return {name: prepared.unwrapped(value) for name, value in state.items()}


def chosen(state: Mapping[str, Any], parts: Parts) -> dict[str, Any]:
    """The entries of ``state`` that ``parts`` means, without sources of data, whose position the run holds."""
    kinds = {name: kind_of(name, value) for name, value in state.items()}
    return {
        name: value
        for name, value in state.items()
        if kinds[name] != "data" and (kinds[name] is None or getattr(parts, kinds[name] or ""))
    }


def sources(state: Mapping[str, Any]) -> dict[str, Any]:
    """The sources of data, by name; those of a dict or a list under ``data`` are called ``data/train``, ``data/0``."""
    found = {name: value for name, value in state.items() if kind_of(name, value) == "data"}
    return dict(_each_source(found, ""))


def _each_source(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) or type(value) in (list, tuple):
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _each_source(item, f"{path}/{key}" if path else str(key))
    else:
        yield path, value


def unread(state: Mapping[str, Any], read: Collection[str]) -> dict[str, Any]:
    """Sources that save themselves and that nobody reads by way of the run: they are saved as everything else."""
    return {
        name: value
        for name, value in state.items()
        if kind_of(name, value) == "data" and is_stateful(prepared.loader_of(value)) and name not in read
    }


def optimizers(value: object) -> Iterator[torch.optim.Optimizer]:
    """All in a state."""
    return _each(value, torch.optim.Optimizer)


def trainable(value: object) -> int:
    """Elements of the parameters that are trained, in all modules of a state, shared ones once."""
    found: dict[int, int] = {}
    for module in _each(value, torch.nn.Module):
        found |= {id(p): p.numel() for p in module.parameters() if p.requires_grad}
    return sum(found.values())


def _each(value: object, cls: type[T]) -> Iterator[T]:
    """All objects of a class in a state, in dicts and lists of any depth."""
    if isinstance(value, cls):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _each(item, cls)
