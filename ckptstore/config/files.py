"""Reading YAML and TOML: what stands in a file, and on which line."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node

from ckptstore.errors import FormatError, NotFoundError, StorageError

Keys: TypeAlias = tuple[str, ...]

_LARGEST = 1 << 20
_DEEPEST = 30
_MOST = 200_000
"""Values in a config. Aliases of aliases make billions out of a few lines."""


@dataclass(frozen=True)
class Draft:
    """What was written, before anything of it was checked.

    Attributes:
        source: where, for messages.
        data: the keys.
        lines: on which line each of them stands, where that is known.
    """

    source: str
    data: dict[str, Any]
    lines: Mapping[Keys, int] = field(default_factory=dict)


def read(path: str | os.PathLike[str]) -> Draft:
    """What a YAML file, or one that is called ``.toml``, holds.

    Raises:
        NotFoundError: there is none.
        StorageError: it can't be read.
        FormatError: it is no YAML or no TOML, or no section of keys.
    """
    source = os.fspath(path)
    text = read_text(source)
    if Path(source).suffix.lower() == ".toml":
        return Draft(source, plain(_toml(text, source), source))
    data = yaml_value(text, source)
    return Draft(source, plain({} if data is None else data, source), dict(_lines(text)))


def read_text(path: str) -> str:
    """A file's text.

    Raises:
        NotFoundError: there is none.
        StorageError: it can't be read.
        FormatError: it is no text, or too long for a config.
    """
    try:
        with open(path, "rb") as file:
            raw = file.read(_LARGEST + 1)
    except FileNotFoundError as error:
        raise NotFoundError(f"there is no config {path}; ckptstore init {path} writes one") from error
    except OSError as error:
        raise StorageError(f"the config {path} can't be read: {error.strerror or error}") from error
    if len(raw) > _LARGEST:
        raise FormatError(f"{path} is over {_LARGEST >> 20} MiB, which is no config")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FormatError(f"{path} is no text in UTF-8: byte {error.start} is no part of a letter") from error


def yaml_value(text: str, source: str) -> Any:
    """What ``text`` means as YAML, without anything that could run.

    Raises:
        FormatError: it is no YAML.
    """
    try:
        return YAML(typ="safe", pure=True).load(text)
    except (YAMLError, ValueError, RecursionError) as error:
        raise FormatError(f"{source} is no YAML: {_yaml_problem(error)}") from error


def plain(data: object, source: str) -> dict[str, Any]:
    """``data`` as dicts and lists of its own.

    Raises:
        FormatError: it is no section of keys, or has too many values.
    """
    if not isinstance(data, Mapping):
        raise FormatError(f"{source} holds {type(data).__name__}, no keys: write them as storage: runs/gpt2")
    left = [_MOST]
    return {_name(key): _plain(value, source, left, 0) for key, value in data.items()}


def _plain(value: object, source: str, left: list[int], depth: int) -> Any:
    left[0] -= 1
    if left[0] < 0 or depth > _DEEPEST:
        raise FormatError(f"{source} holds more than {_MOST:,} values, or over {_DEEPEST} levels: that is no config")
    if isinstance(value, Mapping):
        return {_name(key): _plain(item, source, left, depth + 1) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item, source, left, depth + 1) for item in value]
    return value


def _name(key: object) -> str:
    return key if isinstance(key, str) else repr(key)


def _toml(text: str, source: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise FormatError(f"{source} is no TOML: {error}") from error


def _yaml_problem(error: Exception) -> str:
    if not isinstance(error, MarkedYAMLError):
        return " ".join(str(error).split())
    mark = error.problem_mark or error.context_mark
    where = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
    # It would go on with both values, which may be secret.
    problem = str(error.problem or error.context).partition(" with value ")[0]
    return f"{where}{problem}"


def _lines(text: str) -> Iterator[tuple[Keys, int]]:
    root = YAML(typ="safe", pure=True).compose(text)
    waiting: list[tuple[Keys, Node]] = [] if root is None else [((), root)]
    while waiting:
        path, node = waiting.pop()
        if not isinstance(node, MappingNode) or len(path) > 3:
            continue
        for key, value in node.value:
            name = (*path, str(key.value))
            yield name, key.start_mark.line + 1
            waiting.append((name, value))
