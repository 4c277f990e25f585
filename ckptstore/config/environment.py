"""Keys from the environment: ``CKPTSTORE_STORAGE``, ``CKPTSTORE_RUN__TOTAL_STEPS``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckptstore.config.files import Keys, yaml_value
from ckptstore.config.model import LEVELS, OPTIONS, names
from ckptstore.config.problems import Problems, nearest
from ckptstore.config.secrets import is_secret
from ckptstore.errors import FormatError

PREFIX = "CKPTSTORE_"
OTHERS = frozenset({"CKPTSTORE_TRACEBACK"})
"""Variables of the package that are no keys."""

_TEXTS = frozenset({"storage", "save", "keep", "eval", "durable", "compression"})
"""Keys that are text, whatever stands in it."""


def variables() -> list[str]:
    """All that can be set, but for what may stand under the options."""
    paths = [(*level, name) for level in LEVELS for name in names(level) if (name,) not in LEVELS]
    return [PREFIX + "__".join(path).upper() for path in paths]


def override(data: dict[str, Any], environment: Mapping[str, str], problems: Problems) -> dict[str, Any]:
    """``data`` with what the environment says instead. An empty variable says nothing."""
    made = {key: dict(value) if isinstance(value, dict) else value for key, value in data.items()}
    for name, text in sorted(environment.items()):
        if not name.startswith(PREFIX) or name in OTHERS or not text:
            continue
        path = _path(name)
        if path is None:
            problems.add((name,), _unknown(name))
            continue
        problems.variables[path] = name
        try:
            _put(made, path, _value(path, text))
        except FormatError as error:
            problems.add(path, str(error))
    return made


def _path(name: str) -> Keys | None:
    path = tuple(part.lower() for part in name.removeprefix(PREFIX).split("__"))
    if path[0] in OPTIONS:
        return path if len(path) > 1 and all(path) else None
    known = (path[:-1] in LEVELS) and path[-1] in names(path[:-1]) and path not in LEVELS
    return path if known else None


def _unknown(name: str) -> str:
    known = variables()
    # What all have in common says nothing about which one is near.
    near = nearest(name.removeprefix(PREFIX), [each.removeprefix(PREFIX).lower() for each in known])
    meant = f"did you mean {PREFIX}{near.upper()}?" if near else f"there are {', '.join(known)}"
    return f"no key is called so; {meant}"


def _value(path: Keys, text: str) -> Any:
    # A password of digits is text, too.
    if path[0] in _TEXTS or (path[0] in OPTIONS and is_secret(path[-1])):
        return text
    if path[0] in ("backup", "resume") and not text.startswith("["):
        return {"true": True, "false": False}.get(text, text) if path[0] == "resume" else text
    try:
        return yaml_value(text, "the value")
    except FormatError as error:
        # What stands there may be secret.
        raise FormatError("the value can't be read: write it as in a config, as 1000 or true") from error


def _put(data: dict[str, Any], path: Keys, value: Any) -> None:
    *sections, last = path
    for name in sections:
        inner = data.get(name)
        if inner is not None and not isinstance(inner, dict):
            # That this is no section is told by who checks it.
            return
        # Copied, as whoever gave the config keeps it as it was.
        data[name] = dict(inner or {})
        data = data[name]
    data[last] = value
