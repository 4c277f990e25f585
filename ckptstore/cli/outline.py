"""A checkpoint's state as a tree of names, collapsed where it gets deep. Reads the stored JSON; needs no torch."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from ckptstore.cli.terminal import plain
from ckptstore.near import meant_pattern

if TYPE_CHECKING:
    from rich.tree import Tree

TAG = "$"
"""The key that marks a tagged node in the stored tree."""

_TENSORS = frozenset({"tensor", "ndarray"})
_DICTS = frozenset({"dict", "ordered_dict", "default_dict", "counter"})
_INSIDES = ("items", "fields", "state", "entries")
"""Where the different kinds of nodes keep what is in them."""

_INLINE_ITEMS = 8
_INLINE_CHARS = 100


@dataclass
class Branch:
    """One level of names: what lies under each, and the leaves that end here."""

    branches: dict[str, Branch] = field(default_factory=dict)
    leaves: dict[str, str] = field(default_factory=dict)
    count: int = 0
    stored_bytes: int = 0


def grow(leaves: Iterable[tuple[str, str, int]], separators: str) -> Branch:
    """The tree of (name, what stands behind it, bytes), cut after each of ``separators``."""
    root, cut = Branch(), re.compile(f"(?<=[{re.escape(separators)}])")
    for name, text, size in leaves:
        *folders, last = cut.split(name)
        branch = root
        for folder in (None, *folders):
            if folder is not None:
                branch = branch.branches.setdefault(folder, Branch())
            branch.count += 1
            branch.stored_bytes += size
        branch.leaves[last] = text
    return root


def draw(title: str, root: Branch, depth: int, label: Callable[[Branch], str]) -> Tree:
    """The tree as rich draws it; what lies deeper than ``depth`` is only counted, by ``label``."""
    from rich.tree import Tree

    tree = Tree(_text(title), guide_style="dim")
    _draw(tree, root, depth, label)
    return tree


def _draw(tree: Tree, branch: Branch, depth: int, label: Callable[[Branch], str]) -> None:
    for name, text in branch.leaves.items():
        tree.add(_text(f"{name}{text}"))
    for name, below in branch.branches.items():
        path, end = name, below
        # A folder with nothing but one other in it takes no level of its own.
        while len(end.branches) == 1 and not end.leaves:
            ((more, end),) = end.branches.items()
            path += more
        if len(end.leaves) == 1 and not end.branches:
            ((last, text),) = end.leaves.items()
            tree.add(_text(f"{path}{last}{text}"))
            continue
        node = tree.add(_text(f"{path}  {label(end)}"))
        if depth > 1:
            _draw(node, end, depth - 1, label)


def _text(content: str) -> Any:
    from rich.text import Text

    return Text(plain(content), overflow="fold")


def wanted(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a pattern matches a name or a folder that it is in; without patterns every one is wanted."""
    parts = name.split("/")
    folders = ["/".join(parts[:count]) for count in range(1, len(parts) + 1)]
    return not patterns or any(fnmatchcase(folder, pattern) for pattern in patterns for folder in folders)


def unmatched(patterns: tuple[str, ...], names: Collection[str]) -> Iterator[str]:
    """For each of ``patterns`` that matches none of ``names`` a remark, with what may have been meant."""
    for pattern in patterns:
        if not any(wanted(name, (pattern,)) for name in names):
            yield f"nothing here matches {pattern!r}{meant_pattern(pattern, names)}"


def plain_values(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value in a stored tree that is no tensor, with its path; rows of plain numbers are one value."""
    if isinstance(node, dict) and TAG in node:
        yield from _tagged(node, path)
    elif isinstance(node, dict):
        for key, item in node.items():
            yield from plain_values(item, _join(path, key))
    elif isinstance(node, list) and any(isinstance(item, dict | list) for item in node):
        for index, item in enumerate(node):
            yield from plain_values(item, _join(path, index))
    else:
        yield path, node


def _tagged(node: Mapping[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    kind = node[TAG]
    if kind in _TENSORS or "tensor" in node:
        return
    if kind in _SCALARS:
        yield path, _scalar(node)
    elif kind == "optimizer":
        yield from _optimizer(node, path)
    elif kind in _DICTS and isinstance(node.get("items"), list):
        for index, (key, item) in enumerate(node["items"]):
            yield from plain_values(item, _join(path, f"#{index}" if isinstance(key, dict | list) else key))
    elif (inside := next((name for name in _INSIDES if name in node), None)) is not None:
        yield from plain_values(node[inside], path)
    else:
        yield path, {key: value for key, value in node.items() if key != TAG}


def _optimizer(node: Mapping[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    for number, group in enumerate(node.get("groups", ())):
        yield _join(path, f"groups/{number}/params"), group.get("params")
        yield from plain_values(group.get("options"), _join(path, f"groups/{number}"))
    for ref, item in node.get("state", ()):
        yield from plain_values(item, _join(path, f"state/{ref}"))


_SCALARS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    # Python refuses to print the longest ones in decimal.
    "int": lambda node: int(node["hex"], 16) if len(node["hex"]) < 1000 else node["hex"],
    "float": lambda node: struct.unpack(">d", bytes.fromhex(node["bits"]))[0],
    "str": lambda node: bytes.fromhex(node["utf8"]).decode("utf-8", "backslashreplace"),
    "dtype": lambda node: f"torch.{node['name']}",
    "device": lambda node: node["name"],
    "bytes": lambda node: f"{len(node['base64']) * 3 // 4} bytes",
    "bytearray": lambda node: f"{len(node['base64']) * 3 // 4} bytes",
    "numpy_str": lambda node: node["text"],
    "scalar": lambda node: f"{node['dtype']} {node['bits']}",
    "complex": lambda node: str(complex(*struct.unpack(">dd", bytes.fromhex(node["bits"])))),
}


def _scalar(node: Mapping[str, Any]) -> Any:
    """A value for people; one whose node is malformed is shown as it stands, loading it is another's work."""
    try:
        return _SCALARS[node[TAG]](node)
    except (KeyError, ValueError, TypeError, struct.error):
        return dict(node)


def value_text(value: Any) -> str:
    """A value in a few words."""
    if isinstance(value, list) and len(value) > _INLINE_ITEMS:
        shown = ", ".join(value_text(item) for item in value[:3])
        return f"[{shown}, … {len(value):,} in all]"
    # Infinities and NaN have no JSON, and people know them by their Python names.
    text = repr(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _INLINE_CHARS else text[:_INLINE_CHARS] + "…"


def _join(path: str, part: object) -> str:
    return f"{path}/{part}" if path else str(part)
