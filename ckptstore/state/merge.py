"""The trees of several ranks as one: what only some of them have of a module or an optimizer comes together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ckptstore.state.rng import GENERATORS
from ckptstore.state.values import DICT_KINDS, TAG

APART = "apart"
"""Marks, in memory only, a random state that each rank had its own of."""


def merged(trees: Sequence[Any], first: int) -> Any:
    """The tree of rank ``first``, with what only others have of its dicts, modules and optimizers."""
    tree: Any = trees[first]
    for rank, other in enumerate(trees):
        if rank != first:
            tree = _merge(tree, other)
    return tree


def _merge(mine: Any, other: Any) -> Any:
    if not isinstance(mine, dict) or not isinstance(other, dict) or mine == other:
        return mine
    kind = mine.get(TAG)
    if kind != other.get(TAG):
        return mine
    if kind is None:
        return _merge_dicts(mine, other)
    if kind in GENERATORS:
        return {**mine, APART: True}
    if kind == "module" and isinstance(mine.get("entries"), dict) and isinstance(other.get("entries"), dict):
        return {**mine, "entries": _merge_dicts(mine["entries"], other["entries"])}
    if kind == "stateful":
        return {**mine, "state": _merge(mine.get("state"), other.get("state"))}
    if kind in ("dataclass", "namespace"):
        return {**mine, "fields": _merge(mine.get("fields"), other.get("fields"))}
    if kind in DICT_KINDS:
        return {**mine, "items": _merge_items(mine.get("items"), other.get("items"))}
    return _merge_optimizers(mine, other) if kind == "optimizer" else mine


def _merge_dicts(mine: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    both = {key: _merge(value, other[key]) if key in other else value for key, value in mine.items()}
    return both | {key: value for key, value in other.items() if key not in mine}


def _merge_items(mine: Any, other: Any) -> Any:
    """Pairs of key and value."""
    if not (_are_pairs(mine) and _are_pairs(other)):
        return mine
    others = {json.dumps(key): [key, value] for key, value in other}
    found = []
    for key, value in mine:
        pair = others.pop(json.dumps(key), None)
        found.append([key, value if pair is None else _merge(value, pair[1])])
    return [*found, *others.values()]


def _are_pairs(items: Any) -> bool:
    return isinstance(items, list) and all(isinstance(item, list) and len(item) == 2 for item in items)


def _merge_optimizers(mine: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Groups, one by one, with the parameters that have a name; a number means another one on each rank."""
    groups, others = mine.get("groups"), other.get("groups")
    if not isinstance(groups, list) or not isinstance(others, list) or len(groups) != len(others):
        return mine
    known = {ref for group in groups for ref in _refs(group)}
    merged_groups = [_merge_group(group, more, known) for group, more in zip(groups, others, strict=True)]
    state: Any = mine.get("state")
    if not _are_pairs(state) or not _are_pairs(other.get("state")):
        return mine
    more_state = [pair for pair in other["state"] if _is_new(pair[0], known)]
    return {**mine, "groups": merged_groups, "state": state + more_state}


def _merge_group(group: Any, other: Any, known: set[Any]) -> Any:
    refs, shapes = _refs(other), other.get("shapes") if isinstance(other, dict) else None
    mine = group.get("shapes") if isinstance(group, dict) else None
    if not isinstance(mine, list) or not isinstance(shapes, list) or len(shapes) != len(refs):
        return group
    more = [(ref, shape) for ref, shape in zip(refs, shapes, strict=True) if _is_new(ref, known)]
    return {
        **group,
        "params": [*_refs(group), *(ref for ref, _ in more)],
        "shapes": [*mine, *(shape for _, shape in more)],
    }


def _refs(group: Any) -> list[Any]:
    refs = group.get("params") if isinstance(group, dict) else None
    return refs if isinstance(refs, list) else []


def _is_new(ref: Any, known: set[Any]) -> bool:
    return isinstance(ref, str) and not ref.startswith("#") and ref not in known
