"""What is wrong with a config, in words: all of it at once, each with its place and its way out."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from pydantic import ValidationError

from ckptstore.config.files import Keys
from ckptstore.config.model import LEVELS, OPTIONS, names
from ckptstore.errors import FormatError

Problem: TypeAlias = tuple[Keys, str]


@dataclass
class Problems:
    """Collects what is wrong.

    Attributes:
        source: where the config comes from.
        lines: on which line each key stands.
        variables: which keys come from which variable of the environment.
        aliases: under which names keys stand in another program's config.
        found: what was found so far, in words.
    """

    source: str
    lines: Mapping[Keys, int] = field(default_factory=dict)
    variables: dict[Keys, str] = field(default_factory=dict)
    aliases: dict[Keys, Keys] = field(default_factory=dict)
    found: list[str] = field(default_factory=list)

    def add(self, path: Keys, text: str) -> None:
        """Something is wrong with the key at ``path``."""
        where = self._where(path)
        self.found.append(f"{where}: {text}" if where else text)

    @contextmanager
    def at(self, path: Keys) -> Iterator[None]:
        """Collect a ``FormatError`` that the block ends with."""
        try:
            yield
        except FormatError as error:
            self.add(path, str(error))

    def raise_any(self) -> None:
        """Nothing, where nothing was found.

        Raises:
            FormatError: all that was.
        """
        found = list(dict.fromkeys(self.found))
        if len(found) == 1:
            raise FormatError(f"{self.source}: {found[0]}")
        if found:
            listed = "; ".join(f"({number}) {text}" for number, text in enumerate(found, 1))
            raise FormatError(f"{self.source} has {len(found)} errors: {listed}")

    def _where(self, path: Keys) -> str:
        path = path if path in self.variables else self.aliases.get(path, path)
        beginnings = [path[:count] for count in range(len(path), 0, -1)]
        variable = next((self.variables[each] for each in beginnings if each in self.variables), None)
        if variable is not None:
            return variable
        line = next((self.lines[each] for each in beginnings if each in self.lines), None)
        return ".".join(path) + ("" if line is None else f" (line {line})")


def add_validation(problems: Problems, error: ValidationError) -> None:
    """All that pydantic found."""
    for each in error.errors(include_url=False):
        path = tuple(str(part) for part in each["loc"])
        if each["type"] == "extra_forbidden":
            problems.add(path, unknown(path))
        elif each["type"] == "value_error":
            problems.add(path, str(each["ctx"]["error"]))
        else:
            problems.add(path, _text(each["type"], each["input"], each.get("ctx", {}), path))


def unknown(path: Keys) -> str:
    """That there is no such key, and which one is meant."""
    *level, name = path
    here = names(tuple(level))
    if near := nearest(name, here):
        return f"unknown key; did you mean {near}?"
    if elsewhere := [(*other, name) for other in LEVELS if other != tuple(level) and name in names(other)]:
        place = elsewhere[0]
        return f"unknown key; {name} stands " + (f"under {place[0]}:" if len(place) > 1 else "at the top")
    return f"unknown key; there are {', '.join(here)}"


def nearest(name: str, known: Sequence[str]) -> str | None:
    """The name that was probably meant."""
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.65)
    return near[0] if near else None


def _whole(value: object) -> str:
    if isinstance(value, str) and value.isdecimal():
        return f"; write {value} without quotes"
    return f"; write {int(value)}" if isinstance(value, float) and value.is_integer() else ""


_Words: TypeAlias = Callable[[Any, Mapping[str, Any]], str]
_WORDS: Mapping[str, _Words] = {
    "int_type": lambda value, ctx: f"must be a whole number of at least 1{_whole(value)}",
    "greater_than_equal": lambda value, ctx: f"must be a whole number of at least {ctx['ge']}",
    "bool_type": lambda value, ctx: "must be true or false",
    "literal_error": lambda value, ctx: f"must be {ctx['expected']}",
}


def _text(kind: str, value: object, ctx: Mapping[str, Any], path: Keys) -> str:
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        keys = names(path) if path in LEVELS else []
        return f"must be a section of keys: {', '.join(keys)}" if keys else "must be a section of keys"
    words = _WORDS.get(kind)
    said = words(value, ctx) if words else f"is refused ({kind})"
    shown = "" if path and path[0] in OPTIONS else f"{value!r:.60} "
    return f"{shown}{said}"


def listed(words: Iterable[str]) -> str:
    """``words`` as a person lists them."""
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last
