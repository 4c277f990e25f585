"""The parts of a stored tree that ``only=`` asks for."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase, translate
from typing import Any, Final

from ckptstore.errors import FormatError, StateError
from ckptstore.near import meant_pattern
from ckptstore.state.encode import join, key_text
from ckptstore.state.values import DICT_KINDS, TAG


class _Absent:
    """Stands in a list for an element that wasn't asked for. No JSON gives such a value."""


ABSENT: Final = _Absent()
_MAX_DEPTH = 500


class Selection:
    """Patterns over paths and tensor names, where "*" also matches "/".

    What a pattern matches is taken with all that is in it. Sets, named tuples, dataclasses and generators are taken
    whole if anything in them is matched.
    """

    def __init__(self, patterns: Sequence[str], *, whole_statefuls: bool) -> None:
        """``whole_statefuls``: objects that load themselves can't be taken in part."""
        self._patterns = [(pattern, re.compile(translate(pattern))) for pattern in patterns]
        self._used: set[str] = set()
        self._whole_statefuls = whole_statefuls

    def matches(self, path: str) -> bool:
        """Whether a pattern matches the path; notes which ones do."""
        found = [pattern for pattern, regex in self._patterns if regex.match(path)]
        self._used.update(found)
        return bool(found)

    def means(self, name: str) -> bool:
        """Whether a pattern matches an entry of the state, or may match something in it; notes which ones do.

        For entries of which only the name is known.
        """
        found = [pattern for pattern, _ in self._patterns if any(fnmatchcase(name, head) for head in _heads(pattern))]
        self._used.update(found)
        return bool(found)

    def prune(self, tree: object, lacking: Sequence[str] = ()) -> Any:
        """The tree without what doesn't match.

        Args:
            lacking: entries that a pattern may mean though the tree doesn't have them.

        Raises:
            StateError: a pattern matches nothing, or a part of what can only be restored whole.
            FormatError: the tree is too deep or malformed.
        """
        pruned = self._prune(tree, "", 0)
        meant = [name for name in lacking if self.means(name)]
        if meant and pruned is ABSENT:
            pruned = {}
        self._check(tree, pruned is not ABSENT)
        return pruned

    def require(self, *trees: object) -> None:
        """Nothing, if every pattern matches something in one of the trees.

        Raises:
            StateError: one doesn't.
            FormatError: a tree is too deep or malformed.
        """
        found = [self.asks(tree, "") for tree in trees]
        self._check(trees[0], any(found))

    def asks(self, node: object, path: str) -> bool:
        """Whether a pattern matches the node at ``path``, or something in it."""
        return self._prune(node, path, 0) is not ABSENT

    def _check(self, tree: object, found: bool) -> None:
        unused = [pattern for pattern, _ in self._patterns if pattern not in self._used]
        if unused or not found:
            names = ", ".join(map(repr, unused)) or "an empty list"
            known = (
                f"; it has {', '.join(map(repr, list(tree)[:20]))}"
                if isinstance(tree, dict) and TAG not in tree
                else ""
            )
            hint = meant_pattern(unused[0], _names(tree, "", 0)) if unused else ""
            like = f"{hint} Patterns" if hint else ": patterns"
            raise StateError(f"only={names} matches nothing in the checkpoint{like} are like 'model/*'{known}")

    def _prune(self, node: Any, path: str, depth: int) -> Any:
        if depth > _MAX_DEPTH:
            raise FormatError(f"{path!r} lies deeper than any state that can be saved")
        if self.matches(path):
            self._touch(node, path, depth)
            return node
        if isinstance(node, list):
            return self._some([self._prune(item, join(path, index), depth + 1) for index, item in enumerate(node)])
        if not isinstance(node, dict):
            return ABSENT
        if TAG not in node:
            return self._entries(node, path, depth)
        return self._tagged(node, path, depth)

    def _touch(self, node: Any, path: str, depth: int) -> None:
        # A pattern for something inside of what another pattern takes whole is not in vain.
        if len(self._used) < len(self._patterns) and isinstance(node, dict | list):
            before, self._whole_statefuls = self._whole_statefuls, False
            for name, child in _children(node):
                self._prune(child, join(path, name), depth + 1)
            self._whole_statefuls = before

    def _tagged(self, node: dict[str, Any], path: str, depth: int) -> Any:
        kind = node[TAG]
        if kind == "tensor":
            name = node.get("name")
            return node if isinstance(name, str) and self.matches(name) else ABSENT
        if kind in DICT_KINDS and isinstance(node.get("items"), list):
            return self._with(node, "items", self._pairs(node["items"], path, depth))
        if kind == "tuple":
            return self._with(node, "items", self._prune(node.get("items"), path, depth + 1))
        if kind == "module" and isinstance(node.get("entries"), dict):
            return self._with(node, "entries", self._entries(node["entries"], path, depth))
        if kind == "stateful":
            return self._stateful(node, path, depth)
        if kind == "optimizer":
            return self._optimizer(node, path, depth)
        inner = [self._prune(child, join(path, name), depth + 1) for name, child in _children(node)]
        return node if any(item is not ABSENT for item in inner) else ABSENT

    def _stateful(self, node: dict[str, Any], path: str, depth: int) -> Any:
        state = self._prune(node.get("state"), path, depth + 1)
        if state is ABSENT or not self._whole_statefuls:
            return self._with(node, "state", state)
        raise StateError(
            f"only= asks for a part of {path!r}, which loads itself and can only be restored whole: use {path!r}",
            path=path,
        )

    def _optimizer(self, node: dict[str, Any], path: str, depth: int) -> Any:
        groups, states = node.get("groups"), node.get("state")
        if not isinstance(groups, list) or not isinstance(states, list):
            raise FormatError(f"the optimizer at {path!r} lacks its groups or its state")
        options = [self._options(group, f"{path}/groups/{number}", depth) for number, group in enumerate(groups)]
        kept = self._pairs(states, f"{path}/state", depth)
        other = self._prune(node.get("other"), f"{path}/other", depth + 1)
        if kept is ABSENT and other is ABSENT and all(option is ABSENT for option in options):
            return ABSENT
        return {
            **node,
            "groups": [
                {**group, "options": {} if option is ABSENT else option}
                for group, option in zip(groups, options, strict=True)
            ],
            "state": [] if kept is ABSENT else kept,
            "other": {} if other is ABSENT else other,
        }

    def _options(self, group: object, path: str, depth: int) -> Any:
        if not isinstance(group, dict):
            raise FormatError(f"{path!r} is a malformed group of an optimizer")
        return self._prune(group.get("options"), path, depth + 1)

    def _entries(self, entries: dict[str, Any], path: str, depth: int) -> Any:
        kept = {key: self._prune(child, join(path, key), depth + 1) for key, child in entries.items()}
        return {key: child for key, child in kept.items() if child is not ABSENT} or ABSENT

    def _pairs(self, pairs: list[Any], path: str, depth: int) -> Any:
        kept = []
        for index, pair in enumerate(pairs):
            if not isinstance(pair, list) or len(pair) != 2:
                raise FormatError(f"{path!r} has an entry that is no pair")
            child = self._prune(pair[1], join(path, key_text(pair[0], index)), depth + 1)
            if child is not ABSENT:
                kept.append([pair[0], child])
        return kept or ABSENT

    @staticmethod
    def _some(items: list[Any]) -> Any:
        return items if any(item is not ABSENT for item in items) else ABSENT

    @staticmethod
    def _with(node: dict[str, Any], field: str, content: Any) -> Any:
        return ABSENT if content is ABSENT else {**node, field: content}


def _heads(pattern: str) -> Iterator[str]:
    """The pattern, and what stands before each of its slashes."""
    yield pattern
    yield from (pattern[:index] for index, character in enumerate(pattern) if character == "/")


def _names(node: object, path: str, depth: int) -> Iterator[str]:
    """The paths of all nodes and the names of all tensors in a tree."""
    if isinstance(node, dict) and node.get(TAG) == "tensor":
        yield str(node.get("name"))
    elif depth < _MAX_DEPTH:
        yield from ([path] if path else [])
        for name, child in _children(node):
            yield from _names(child, join(path, name), depth + 1)


def _children(node: Any) -> list[tuple[str, Any]]:
    """The nodes inside of a node, with their names in paths."""
    if isinstance(node, list):
        return [(str(index), child) for index, child in enumerate(node)]
    if not isinstance(node, dict):
        return []
    if TAG not in node:
        return list(node.items())
    for field in ("items", "fields", "entries", "state"):
        content = node.get(field)
        if isinstance(content, dict | list):
            return _children(content)
    return []
