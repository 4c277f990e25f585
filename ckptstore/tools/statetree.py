"""Parts of a stored tree by themselves: what is taken of it, and the tensors that this names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ckptstore.errors import StateError
from ckptstore.state.merge import APART
from ckptstore.state.select import ABSENT, Selection
from ckptstore.state.values import DICT_KINDS, TAG
from ckptstore.tools.outline import TENSORS
from ckptstore.view import check_patterns

_MODELS = ("model", "module", "state_dict")
"""Entries that hold weights where nothing in a state was a module when it was saved."""

_MAX_DEPTH = 500


def taken(tree: Any, only: Sequence[str] | None) -> Any:
    """What ``only`` matches of a tree; without it all modules, or an entry called "model" where there are none.

    Raises:
        StateError: a pattern matches nothing, or nothing looks like weights.
        FormatError: the tree is malformed.
    """
    if only is not None:
        check_patterns(only)
        return _closed(Selection(only, whole_statefuls=False).prune(tree))
    modules = _modules(tree, 0)
    if modules is not ABSENT:
        return modules
    entries = list(tree) if isinstance(tree, dict) and TAG not in tree else []
    found = {name: _closed(tree[name]) for name in _MODELS if name in entries}
    if not found:
        known = ", ".join(map(repr, entries[:20])) or "no entries with names"
        raise StateError(f"there are no modules in the state; say with only= which part is the weights: it has {known}")
    return found


def _modules(node: Any, depth: int) -> Any:
    """The tree of nothing but modules."""
    if depth > _MAX_DEPTH or not isinstance(node, dict | list):
        return ABSENT
    if isinstance(node, list):
        inside = [kept for item in node if (kept := _modules(item, depth + 1)) is not ABSENT]
        return inside or ABSENT
    kind = node.get(TAG)
    if kind == "module":
        return node
    if kind is None:
        entries = {key: kept for key, item in node.items() if (kept := _modules(item, depth + 1)) is not ABSENT}
        return entries or ABSENT
    if kind in (*DICT_KINDS, "tuple") and isinstance(node.get("items"), list):
        pairs = kind != "tuple"
        kept = [(item, _modules(item[1] if pairs else item, depth + 1)) for item in node["items"]]
        some = [[item[0], it] if pairs else it for item, it in kept if it is not ABSENT]
        return {**node, "items": some} if some else ABSENT
    return ABSENT


def _closed(node: Any) -> Any:
    """A part of a tree as a tree of its own: without the gaps in lists, and without marks that are in memory only."""
    if isinstance(node, list):
        return [_closed(item) for item in node if item is not ABSENT]
    if isinstance(node, dict):
        return {key: _closed(item) for key, item in node.items() if not (key == APART and TAG in node)}
    return node


def named(node: Any) -> Iterator[tuple[str, str]]:
    """The tensors that a tree names, and the kind of node of each; one that stands at several places several times."""
    if isinstance(node, list):
        for item in node:
            yield from named(item)
    elif isinstance(node, dict):
        kind = node.get(TAG)
        field = TENSORS.get(str(kind))
        if field is None:
            for item in node.values():
                yield from named(item)
        elif isinstance(node.get(field), str):
            yield node[field], str(kind)
