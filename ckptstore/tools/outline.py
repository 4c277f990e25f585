"""What stands in a stored tree, by paths: its nodes, and its plain values. Reads the stored JSON; needs no torch."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

TAG = "$"
"""The key that marks a tagged node in the stored tree."""

TENSORS = {"tensor": "name", "ndarray": "name", "bytes": "tensor", "bytearray": "tensor"}
"""Kinds of nodes that may name a tensor, and the field that does."""

_DICTS = frozenset({"dict", "ordered_dict", "default_dict", "counter"})
_INSIDES = ("items", "fields", "state", "entries")
"""Where the different kinds of nodes keep what is in them."""


def wanted(name: str, patterns: Sequence[str]) -> bool:
    """Whether a pattern matches a name or a folder that it is in; without patterns every one is wanted."""
    parts = name.split("/")
    folders = ["/".join(parts[:count]) for count in range(1, len(parts) + 1)]
    return not patterns or any(fnmatchcase(folder, pattern) for pattern in patterns for folder in folders)


def plain_values(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value in a stored tree that is no tensor, with its path; rows of plain numbers are one value."""
    for where, leaf in nodes(node, path):
        if inside(leaf, where) is None and tensor_of(leaf) is None:
            yield where, _value(leaf)


def nodes(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """A node of a stored tree, and all that is in it, with paths."""
    yield path, node
    for where, child in inside(node, path) or ():
        yield from nodes(child, where)


def tensor_of(node: Any) -> str | None:
    """The tensor that a node stands for."""
    kind = node.get(TAG) if isinstance(node, dict) else None
    field = TENSORS.get(kind) if isinstance(kind, str) else None
    name = node.get(field) if field is not None else None
    return name if isinstance(name, str) else None


def inside(node: Any, path: str) -> list[tuple[str, Any]] | None:
    """The nodes in a node, with their paths; None where it is a value, or a tensor."""
    if isinstance(node, dict) and TAG in node:
        return _inside_tagged(node, path)
    if isinstance(node, dict):
        return [(join(path, key), item) for key, item in node.items()]
    if isinstance(node, list) and any(isinstance(item, dict | list) for item in node):
        return [(join(path, index), item) for index, item in enumerate(node)]
    return None


def _inside_tagged(node: Mapping[str, Any], path: str) -> list[tuple[str, Any]] | None:
    kind = node[TAG]
    if tensor_of(node) is not None or kind in _SCALARS:
        return None
    if kind == "optimizer":
        return list(_optimizer(node, path))
    if kind in _DICTS and isinstance(node.get("items"), list):
        return [
            (join(path, f"#{index}" if isinstance(key, dict | list) else key), item)
            for index, (key, item) in enumerate(node["items"])
        ]
    field = next((name for name in _INSIDES if name in node), None)
    if field is None:
        return None
    content = node[field]
    return inside(content, path) if inside(content, path) is not None else [(path, content)]


def _optimizer(node: Mapping[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    for number, group in enumerate(node.get("groups", ())):
        yield join(path, f"groups/{number}/params"), group.get("params")
        yield join(path, f"groups/{number}"), group.get("options")
    for ref, item in node.get("state", ()):
        yield join(path, f"state/{ref}"), item


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


def _value(node: Any) -> Any:
    """A value for people; one whose node is malformed is shown as it stands, loading it is another's work."""
    if not isinstance(node, dict) or TAG not in node:
        return node
    decode = _SCALARS.get(node[TAG])
    if decode is None:
        return {key: value for key, value in node.items() if key != TAG}
    try:
        return decode(node)
    except (KeyError, ValueError, TypeError, struct.error):
        return dict(node)


def join(path: str, part: object) -> str:
    """A path with one name more."""
    return f"{path}/{part}" if path else str(part)
