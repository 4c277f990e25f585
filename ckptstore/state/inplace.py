"""Live values that are changed in place: what they are, and how they are filled."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ckptstore.errors import StateError
from ckptstore.state import modules, rng
from ckptstore.state.decode import Maker
from ckptstore.state.dtypes import CARRIERS, TORCH_STORED, torch_name
from ckptstore.state.encode import Encoder
from ckptstore.state.registry import is_namedtuple, type_name

GENERATOR_KINDS = {cls: kind for kind, cls in rng.GENERATORS.items()}
PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter)
LIVE_KINDS = frozenset(("module", "optimizer", "stateful", *rng.GENERATORS))
"""What is stored for objects that only a live one of their kind can take back."""


def is_record(target: dict[Any, Any], nodes: dict[Any, Any]) -> bool:
    """Whether a dict's keys are names that must agree, rather than data that follows the checkpoint.

    Data are Counters, defaultdicts, dicts with other keys than text, and what is still empty in the target.
    """
    if not target or type(target) in (Counter, defaultdict):
        return False
    return all(type(key) is str for key in target) and all(type(key) is str for key in nodes)


def holds_live(value: object) -> bool:
    """Whether there is something in a value that is restored in place rather than replaced."""
    if type(value) in (tuple, list, deque) or is_namedtuple(type(value)):
        return any(map(holds_live, value))  # type: ignore[call-overload]
    if isinstance(value, dict):
        return any(map(holds_live, value.values()))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return any(holds_live(getattr(value, field.name)) for field in dataclasses.fields(value))
    return isinstance(value, torch.Tensor | np.ndarray) or only_live(value)


def same(node: object, value: object) -> bool:
    """Whether a plain value would be stored as this node."""
    encoder = Encoder()
    try:
        mine = encoder.encode(value, "")
    except StateError:
        return False
    return not encoder.sources and json.dumps(mine) == json.dumps(node)


def only_live(value: object) -> bool:
    """Whether nothing but the object itself could take its state back."""
    return type(value) in GENERATOR_KINDS or modules.is_stateful(value)


def obstacle_to(target: torch.Tensor, dtype: torch.dtype) -> str | None:
    """Why no stored tensor of that type can go into a live one, whatever their shapes."""
    if target.is_meta:
        return ", on the meta device: call to_empty() first"
    if target.layout is not torch.strided or target.is_nested or type(target) not in PLAIN_TENSORS:
        return f", a {type_name(type(target))} that isn't plain"
    if target.dtype != dtype and not _converts(dtype, target.dtype):
        return ", into which it can't be converted without loss of more than precision"
    if target.is_inference() and not torch.is_inference_mode_enabled():
        return ", an inference tensor: load inside of torch.inference_mode(), or clone() it first"
    if not target.is_contiguous() and 0 in target.stride():
        return ", whose elements share memory: call contiguous() first"
    return None


def _converts(saved: torch.dtype, live: torch.dtype) -> bool:
    """Floats into floats and complex into complex, whatever their precision; integers only where every value fits."""
    if not {saved, live} <= _CASTABLE:
        return False
    if saved.is_floating_point or saved.is_complex:
        return saved.is_floating_point == live.is_floating_point and saved.is_complex == live.is_complex
    if live.is_floating_point or live.is_complex or live == torch.bool:
        return False
    if saved == torch.bool:
        return True
    inner, outer = torch.iinfo(saved), torch.iinfo(live)
    return outer.min <= inner.min and inner.max <= outer.max


def _castable() -> set[torch.dtype]:
    names = "bool uint8 int8 int16 int32 int64 uint16 uint32 uint64 float16 bfloat16 float32 float64 complex32 "
    names += "complex64 complex128 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz"
    return {getattr(torch, name) for name in names.split() if hasattr(torch, name)}


_CASTABLE = _castable()


def code_of(dtype: torch.dtype) -> str:
    row = TORCH_STORED.get(dtype)
    return torch_name(dtype) if row is None else row.logical or row.code


def copy_tensor(target: torch.Tensor, value: torch.Tensor) -> None:
    """Copy in place, with conversion where the types differ."""
    if target.dtype not in _CASTABLE:
        # torch moves the bits of types that it has no copy for as integers.
        target, value = target.view(CARRIERS[target.element_size()]), value.view(CARRIERS[value.element_size()])
    with torch.no_grad():
        target.copy_(value)


def fill_dict(target: dict[Any, Any], makers: dict[Any, Maker | None], *, follow: bool) -> None:
    content = {key: target[key] if make is None else make() for key, make in makers.items()}
    if follow:
        target.clear()
    target.update(content) if not isinstance(target, Counter) else dict.update(target, content)


def fill_list(target: Any, makers: list[Maker | None]) -> None:
    kept = list(target)
    values = [kept[index] if make is None else make() for index, make in enumerate(makers) if make or index < len(kept)]
    target.clear()
    target.extend(values)


def fill_set(target: set[Any], values: set[Any]) -> None:
    target.clear()
    target.update(values)


def attribute_setter(target: object, name: str, make: Maker) -> Callable[[], None]:
    return lambda: setattr(target, name, make())
