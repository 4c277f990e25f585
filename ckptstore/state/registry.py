"""Classes that the user made storable, by class when saving and by name when loading."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")


class Registration(NamedTuple):
    """One class, and how its objects become plain values and back. Without functions: field by field."""

    cls: type
    name: str
    to_state: Callable[[Any], object] | None
    from_state: Callable[[Any], object] | None


_by_class: dict[type, Registration] = {}
_by_name: dict[str, Registration] = {}


def register_type(
    cls: type[T],
    *,
    to_state: Callable[[T], object] | None = None,
    from_state: Callable[[Any], T] | None = None,
    name: str | None = None,
) -> None:
    """Make objects of exactly this class storable.

    ``to_state`` gives a value that can be stored; ``from_state`` takes it back and gives the object. Dataclasses and
    named tuples may leave both out: their fields are stored anyway, and a registered class comes back as itself
    (without running ``__init__``). ``name`` is what is stored; the default is the class's full name. A checkpoint
    never imports anything, so the class must be registered in the process that loads, too.

    Raises:
        TypeError: only one function, or none for a class that has no fields.
        ValueError: the name belongs to another class.
    """
    if (to_state is None) != (from_state is None):
        raise TypeError(f"{cls.__qualname__}: give both to_state and from_state, or neither")
    if to_state is None and not (dataclasses.is_dataclass(cls) or is_namedtuple(cls)):
        raise TypeError(f"{cls.__qualname__} is no dataclass and no named tuple: give to_state and from_state")
    name = type_name(cls) if name is None else name
    if name in _by_name and _by_name[name].cls is not cls:
        raise ValueError(f"the name {name!r} is registered for another class: give name=")
    forget_type(cls)
    _by_class[cls] = _by_name[name] = Registration(cls, name, to_state, from_state)


def forget_type(cls: type) -> None:
    """Undo ``register_type``; does nothing where the class isn't registered."""
    registration = _by_class.pop(cls, None)
    if registration is not None:
        del _by_name[registration.name]


def registered_class(cls: type) -> Registration | None:
    """The registration of exactly this class."""
    return _by_class.get(cls)


def registered_name(name: str) -> Registration | None:
    """The registration under a stored name."""
    return _by_name.get(name)


def type_name(cls: type) -> str:
    """What is stored for a class that has no name of its own."""
    return f"{cls.__module__}.{cls.__qualname__}"


def is_namedtuple(cls: type) -> bool:
    """Whether the class was made by ``namedtuple`` or ``NamedTuple`` (and isn't a subclass of such)."""
    fields = getattr(cls, "_fields", None)
    return cls.__bases__ == (tuple,) and type(fields) is tuple and all(type(field) is str for field in fields)
