"""A loaded foreign object → plain data that a store takes, without what it can't."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from ckptstore.errors import FormatError, StateError
from ckptstore.state.dtypes import TORCH_STORED, numpy_stored
from ckptstore.state.encode import MAX_DEPTH, join
from ckptstore.state.values import VALUE_ENCODERS
from ckptstore.tools.importing import standins

_LEAVES = frozenset((type(None), bool, int, float, str, *VALUE_ENCODERS))
_MAX_VALUES = 5_000_000
"""Besides those in lists of numbers and texts. A short pickle can name one list a million times, and so on."""
_MAX_PLAIN = 100_000_000


class _RefusedError(Exception):
    """A value can't be taken; its container decides."""


class Plainer:
    """One walk over a loaded object.

    Attributes:
        left_out: path → why, of what had to be left out.
    """

    def __init__(self) -> None:
        self.left_out: dict[str, str] = {}
        self._values = self._plain = 0

    def walk(self, value: Any, path: str) -> Any:
        """``value`` as plain data.

        Raises:
            StateError: nothing of it can be taken.
            FormatError: it has more values than any state.
        """
        try:
            return self._walk(value, path, 0)
        except _RefusedError as error:
            raise StateError(f"{path or 'the state'!r} {error}", path=path or None) from error

    def _walk(self, value: Any, path: str, depth: int) -> Any:
        self._values += 1
        self._check()
        cls = type(value)
        if cls in _LEAVES:
            return value
        if depth > MAX_DEPTH:
            raise _RefusedError(f"lies more than {MAX_DEPTH} containers deep")
        if cls in _CONTAINERS:
            return _CONTAINERS[cls](self, value, path, depth + 1)
        if why := _refusal(value):
            raise _RefusedError(why)
        return value

    def _dict(self, value: Mapping[Any, Any], path: str, depth: int) -> Any:
        kept = {}
        for key, item in value.items():
            here = join(path, key)
            try:
                kept[self._walk(key, here, depth)] = self._walk(item, here, depth)
            except _RefusedError as error:
                self.left_out[here] = str(error)
        make: Any = _made_of(value) or type(value)
        return make(kept)

    def _list(self, value: Any, path: str, depth: int) -> Any:
        make: Any = _made_of(value) or type(value)
        if _LEAVES.issuperset(map(type, value)):
            # Long lists of numbers need no walk.
            self._plain += len(value)
            self._check()
            return make(value)
        return make([self._walk(item, join(path, index), depth) for index, item in enumerate(value)])

    def _check(self) -> None:
        if self._values > _MAX_VALUES or self._plain > _MAX_PLAIN:
            raise FormatError("it has more values than any state: it names the same ones again and again")

    def _namespace(self, value: SimpleNamespace, path: str, depth: int) -> Any:
        return SimpleNamespace(**{str(k): v for k, v in self._dict(dict(vars(value)), path, depth).items()})


def _made_of(value: object) -> Callable[[Any], Any] | None:
    content, make = standins.made.get(id(value), (None, None))
    return make if content is value else None


def _refusal(value: object) -> str | None:
    """Why a single value can't be taken; None where it can."""
    name = standins.name_of(value)
    if name is not None:
        return f"is an object of {name}"
    if isinstance(value, torch.Tensor):
        return _tensor_refusal(value)
    if isinstance(value, np.ndarray | np.generic):
        good = numpy_stored(value.dtype) is not None
        return None if good else f"is an array of {value.dtype}, which only a pickle can hold"
    return f"is {'the class' if isinstance(value, type) else 'an object of'} {_class_name(value)}"


def _class_name(value: object) -> str:
    cls = value if isinstance(value, type) else type(value)
    return f"{cls.__module__}.{cls.__qualname__}"


def _tensor_refusal(value: torch.Tensor) -> str | None:
    if value.layout is not torch.strided:
        return f"is a sparse tensor ({value.layout})"
    if value.is_nested or type(value) not in (torch.Tensor, torch.nn.Parameter):
        return f"is a tensor of the class {_class_name(value)}"
    if value.dtype not in TORCH_STORED:
        return f"is a quantised tensor ({value.dtype})"
    return "is a tensor without values" if value.is_meta else None


_CONTAINERS: dict[type, Callable[[Plainer, Any, str, int], Any]] = {
    dict: Plainer._dict,
    OrderedDict: Plainer._dict,
    Counter: Plainer._dict,
    list: Plainer._list,
    tuple: Plainer._list,
    set: Plainer._list,
    frozenset: Plainer._list,
    SimpleNamespace: Plainer._namespace,
}
