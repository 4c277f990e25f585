"""Nested states and flat keys: as ``torch.distributed.checkpoint`` names what it saves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, TypeVar

from ckptstore.errors import FormatError

Path: TypeAlias = tuple[str | int, ...]
"""The keys and indices that lead to a value."""

MAX_DEPTH = 100
_MAX_HOLES = 100
"""Entries of a list that nothing is known of: they were empty dicts, of which DCP saves nothing."""

V = TypeVar("V")


class _Leaf:
    def __init__(self, value: Any) -> None:
        self.value = value


def nest(
    values: Mapping[str, V], paths: Mapping[str, Path] | None, make_dict: Callable[[dict[str, Any]], Any] = dict
) -> Any:
    """The nested state whose flat keys and values are ``values``; keys without a path stand at the top.

    Args:
        values: by flat key.
        paths: as DCP's planner notes them.
        make_dict: makes each dict of it, of its items.

    Raises:
        FormatError: two values belong at one place, or a place can't be.
    """
    root: dict[str | int, Any] = {}
    for key, value in values.items():
        path = (paths or {}).get(key, (key,))
        if not 0 < len(path) <= MAX_DEPTH or type(path[0]) is not str:
            raise FormatError(f"{key!r:.100} belongs at {path!r:.100}, where nothing can stand")
        branch = root
        for part in path[:-1]:
            branch = branch.setdefault(part, {})
            if isinstance(branch, _Leaf):
                raise FormatError(f"{key!r:.100} belongs in what is a value itself")
        if path[-1] in branch:
            raise FormatError(f"{key!r:.100} belongs where something else stands")
        branch[path[-1]] = _Leaf(value)
    return _made(root, make_dict)


def _made(branch: Any, make_dict: Callable[[dict[str, Any]], Any]) -> Any:
    if isinstance(branch, _Leaf):
        return branch.value
    kinds = {*map(type, branch)}
    if kinds == {int}:
        length = max(branch) + 1
        if min(branch) < 0 or length - len(branch) > _MAX_HOLES:
            raise FormatError("a list lacks most of its entries")
        return [_made(branch.get(index, {}), make_dict) for index in range(length)]
    if kinds - {str}:
        raise FormatError("a container has both names and numbers")
    return make_dict({key: _made(item, make_dict) for key, item in branch.items()})
