"""Writing a schedule's steps back into a config, and leaving all else in it as it stands."""

from __future__ import annotations

import io
import os
import shutil
import tempfile
import textwrap
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode

from ckptstore.config import foreign
from ckptstore.config.files import Keys, plain, read_text, yaml_value
from ckptstore.config.loading import load
from ckptstore.errors import ExistsError, FormatError, StorageError
from ckptstore.policy.schedule import Schedule
from ckptstore.policy.steps import at

_WIDTH = 100
_RUN = 4
"""So many steps at one distance are written as a segment."""


def write_steps(
    path: str | os.PathLike[str], steps: Iterable[int], output: str | os.PathLike[str] | None = None
) -> None:
    """Put ``steps`` into the YAML config at ``path``, as what is saved.

    In a config of ckptstore they become ``save: at(…)``, beside what of ``save`` depends on metrics or time; in another
    program's ``training.checkpoint_schedule``, or ``checkpointing.save_at_steps`` where it has that section. Other
    keys, their order and comments stay. Whoever reads meanwhile, or after a crash, finds the old file or the new one.

    Args:
        path: of the config.
        steps: the steps to save.
        output: where to write it, instead of back to ``path``.

    Raises:
        NotFoundError: there is no such file.
        StorageError: it can't be read or written.
        FormatError: it is no YAML, what stands in it is wrong, or there are no steps.
    """
    source, target = os.fspath(path), os.fspath(output if output is not None else path)
    if Path(source).suffix.lower() == ".toml":
        raise FormatError(f'{source}: steps are written into YAML only; put them into save = "at(0, 10, 30)" by hand')
    wanted = sorted(set(steps))
    at(*wanted)
    text = read_text(source)
    data = plain(yaml_value(text, source) or {}, source)
    key, value = _assignment(source, data, wanted)
    _replace(target, _edited(text, key, value, source), like=source)


def write_new(path: str | os.PathLike[str], text: str, *, replace: bool = False) -> None:
    """Write a config.

    Raises:
        ExistsError: there is such a file, and it isn't to be replaced.
        StorageError: it can't be written.
    """
    target = os.fspath(path)
    if replace and os.path.exists(target):
        _replace(target, text, like=target)
        return
    try:
        with open(target, "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise ExistsError(f"{target} exists: name another file") from error
    except OSError as error:
        raise StorageError(f"the config {target} can't be written: {error.strerror or error}") from error


def _assignment(source: str, data: dict[str, Any], steps: Sequence[int]) -> tuple[Keys, list[int] | str]:
    """The key that says what is saved, and what it shall say."""
    if not foreign.is_foreign(data):
        return ("save",), " | ".join(map(str, [at(*_segments(steps)), *_beyond_steps(source)]))
    section = data.get("checkpointing")
    if isinstance(section, dict) and not section.keys().isdisjoint(("save_at_steps", "save_steps")):
        return ("checkpointing", "save_at_steps"), list(steps)
    if not isinstance(data.get("training"), dict | None):
        raise FormatError(f"{source}: training must be a section of keys, to take a checkpoint_schedule")
    return ("training", "checkpoint_schedule"), list(steps)


def _beyond_steps(source: str) -> list[Schedule]:
    """What of ``save`` can't be told in steps."""
    config = load(source, environment={})
    parts: Sequence[Schedule] = [] if config.save is None else getattr(config.save, "parts", (config.save,))
    length = config.run.length()
    return [reduce(or_, open_ended)] if (open_ended := [part for part in parts if part.open_ends(length)]) else []


def _segments(steps: Sequence[int]) -> list[int | str]:
    """``steps`` with segments for those that follow at one distance."""
    found: list[int | str] = []
    start = 0
    while start < len(steps):
        end = start + 1
        while end < len(steps) and steps[end] - steps[end - 1] == steps[start + 1] - steps[start]:
            end += 1
        if end - start >= _RUN:
            found.append(f"{steps[start]}-{steps[end - 1]}/{steps[start + 1] - steps[start]}")
            start = end
        else:
            found.append(steps[start])
            start += 1
    return found


def _edited(text: str, path: Keys, value: list[int] | str, source: str) -> str:
    """``text`` with ``value`` at ``path``, and nothing else changed: not its spaces, quotes and comments."""
    wanted = plain(yaml_value(text, source) or {}, source)
    _assign(wanted, path, value)
    # Where that meets anchors, flow mappings and the like, the whole is written anew, comments included.
    for edit in (_spliced, _rewritten):
        with suppress(FormatError, YAMLError):
            edited = edit(text, path, value)
            # As text, in which nan is nan.
            if repr(plain(yaml_value(edited, source), source)) == repr(wanted):
                return edited
    raise FormatError(
        f"{source}: {'.'.join(path)} can't be written without changing other keys, as an alias repeats it: write it "
        "by hand"
    )


def _assign(data: dict[str, Any], path: Keys, value: object) -> None:
    *sections, last = path
    for name in sections:
        if not isinstance(data.get(name), dict):
            data[name] = {}
        data = data[name]
    data[last] = value


def _spliced(text: str, path: Keys, value: list[int] | str) -> str:
    pairs: list[tuple[Node, Node]] = []
    node, missing = YAML(typ="safe", pure=True).compose(text), path
    while missing:
        pairs = node.value if isinstance(node, MappingNode) else []
        found = next((pair for pair in pairs if pair[0].value == missing[0]), None)
        if found is None:
            return _inserted(text, pairs, missing, value)
        key, node = found
        missing = missing[1:]
    # After the colon, as an empty value has no place of its own.
    begin = key.end_mark.index + 1
    end = max(begin, _end(key, node))
    return f"{text[:begin]} {_written(value, ' ' * (key.start_mark.column + 2))}{text[end:]}"


def _inserted(text: str, pairs: list[tuple[Node, Node]], missing: Keys, value: list[int] | str) -> str:
    """``text`` with keys that it lacks, after the last of ``pairs``."""
    indent = " " * pairs[0][0].start_mark.column if pairs else ""
    lines = [f"{indent}{'  ' * level}{name}:" for level, name in enumerate(missing)]
    lines[-1] += f" {_written(value, indent + '  ' * len(missing))}"
    place = text.find("\n", _end(*pairs[-1])) if pairs else -1
    before, after = (text, "") if place < 0 else (text[:place], text[place + 1 :])
    return "\n".join([before.rstrip("\n"), *lines, after]).lstrip("\n")


def _end(key: Node, node: Node) -> int:
    """Where the value of ``key`` ends. A block's own mark stands where the next one begins, behind comments."""
    while isinstance(node, MappingNode | SequenceNode) and not node.flow_style and node.value:
        last = node.value[-1]
        key, node = last if isinstance(last, tuple) else (last, last)
    # An empty value's mark stands there, too.
    empty = node.start_mark.index == node.end_mark.index
    return int(key.end_mark.index) + 1 if empty else int(node.end_mark.index)


def _written(value: list[int] | str, indent: str) -> str:
    text = value if isinstance(value, str) else f"[{', '.join(map(str, value))}]"
    folded = textwrap.wrap(text, _WIDTH, break_long_words=False, break_on_hyphens=False, subsequent_indent=indent)
    return "\n".join(folded)


def _rewritten(text: str, path: Keys, value: list[int] | str) -> str:
    yaml = YAML()
    yaml.preserve_quotes, yaml.width = True, 1 << 20
    data = yaml.load(text)
    _assign(data, path, value)
    made = io.StringIO()
    yaml.dump(data, made)
    return made.getvalue()


def _replace(target: str, text: str, *, like: str) -> None:
    """Put ``text`` in the place of ``target`` at once; a link stays one, and rights are those of ``like``."""
    place = Path(os.path.realpath(target))
    temp = None
    try:
        with tempfile.NamedTemporaryFile("w", dir=place.parent, prefix=".", delete=False, encoding="utf-8") as file:
            temp = file.name
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        shutil.copymode(like, temp)
        os.replace(temp, place)
        temp = None
        folder = os.open(place.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise StorageError(f"the config {target} can't be written: {error.strerror or error}") from error
    finally:
        if temp is not None:
            with suppress(OSError):
                os.unlink(temp)
