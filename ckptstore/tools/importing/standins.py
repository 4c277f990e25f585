"""What a foreign pickle may make: plain data of known classes, and inert stand-ins for all others.

``torch.load(weights_only=True)`` looks a global up in a table, and never imports one. This is what ours adds to it.
"""

from __future__ import annotations

import collections
import datetime
import pathlib
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

_PLAIN = {one.__name__: one for one in (list, dict, tuple, frozenset, int, float, str, bool, bytes, slice, range)}
_ATTRIBUTE_DICTS = (
    "lightning.fabric.utilities.data.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "lightning.pytorch.utilities.parsing.AttributeDict",
)
_PATHS = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path", "PurePath")

made: dict[int, tuple[Any, Any]] = {}
"""id of a plain container → itself, and the container that it stands for: a function of its items.

PyTorch's reader puts items into plain lists and dicts only.
"""


class Deque:
    """A list that ``plain`` makes a deque of."""

    def __new__(cls, items: Iterable[Any] = (), maxlen: int | None = None) -> Any:
        content = list(items)
        made[id(content)] = content, lambda values: collections.deque(values, maxlen)
        return content


class DefaultDict:
    """A dict that ``plain`` makes a defaultdict of."""

    def __new__(cls, factory: Any = None, *items: Any) -> Any:
        content = dict(*items)
        known = factory is None or factory is set or factory in _PLAIN.values()
        made[id(content)] = content, lambda values: collections.defaultdict(factory if known else None, values)
        return content


class PlainDict:
    """A dict for a class that is one with attributes."""

    def __new__(cls, *items: Any) -> Any:
        return dict(*items)


class PathText:
    """A path as text."""

    def __new__(cls, *parts: str) -> Any:
        return str(pathlib.PurePosixPath(*parts))


class Text:
    """Text of a class of its own."""

    def __new__(cls, text: str = "") -> Any:
        return str(text)


def _as_text(of: Callable[..., Any]) -> type:
    return type(of.__name__, (), {"__new__": lambda cls, *parts: str(of(*parts))})


def known() -> list[Any]:
    """Our additions to PyTorch's own table, as ``torch.serialization.add_safe_globals`` takes them."""
    rows: list[tuple[Any, str]] = [(cls, f"builtins.{name}") for name, cls in _PLAIN.items()]
    rows += [(Deque, "collections.deque"), (DefaultDict, "collections.defaultdict")]
    rows += [(SimpleNamespace, "argparse.Namespace"), (SimpleNamespace, "types.SimpleNamespace")]
    rows += [(PlainDict, name) for name in _ATTRIBUTE_DICTS]
    rows += [(PathText, f"{module}.{name}") for module in ("pathlib", "pathlib._local") for name in _PATHS]
    rows += [(Text, "torch.torch_version.TorchVersion")]
    times = (datetime.datetime, datetime.date, datetime.time, datetime.timedelta)
    rows += [(_as_text(cls), f"datetime.{cls.__name__}") for cls in times]
    return rows + _numpy()


def _numpy() -> list[tuple[Any, str]]:
    """Arrays and scalars, as PyTorch's manual recommends to allow them."""
    numpy: Any = np
    multiarray = numpy._core.multiarray if hasattr(np, "_core") else numpy.core.multiarray
    homes = ("numpy.core.multiarray", "numpy._core.multiarray")
    rows: list[tuple[Any, str]] = [(np.ndarray, "numpy.ndarray"), (np.dtype, "numpy.dtype")]
    rows += [(getattr(multiarray, name), f"{home}.{name}") for home in homes for name in ("_reconstruct", "scalar")]
    if hasattr(np, "dtypes"):
        dtypes = {name: cls for name, cls in vars(np.dtypes).items() if isinstance(cls, type)}
        rows += [(cls, f"numpy.dtypes.{name}") for name, cls in dtypes.items()]
    return rows


class _Kind(type):
    """The class of stand-ins' classes. PyTorch's reader lets them have items, as a class derived from dict may."""

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is dict

    __hash__ = type.__hash__


class StandIn(metaclass=_Kind):
    """An object of a class that nobody imports. It takes whatever it is given, and keeps nothing."""

    of = ""
    """The name of the class."""

    def __new__(cls, *args: Any) -> Any:
        return object.__new__(cls)

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


def stand_in(name: str) -> tuple[Any, str]:
    """What stands for the class or function ``name``."""
    return _Kind(name.rpartition(".")[2], (StandIn,), {"of": name}), name


def name_of(value: object) -> str | None:
    """What ``value`` stands for; None where it isn't a stand-in."""
    if isinstance(type(value), _Kind):
        value = type(value)
    return str(getattr(value, "of", "")) if isinstance(value, _Kind) else None


def allow() -> None:
    """Let PyTorch's reader make what is known here, in this process."""
    torch.serialization.add_safe_globals(known())
