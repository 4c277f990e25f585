"""A stored tree beside that of a live state: which values differ, and which tensors must be compared byte by byte."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

from ckptstore.errors import FormatError
from ckptstore.state import optimizer
from ckptstore.state.capture import Snapshot
from ckptstore.state.encode import MAX_DEPTH, join, key_text
from ckptstore.state.rng import GENERATORS
from ckptstore.state.select import Selection
from ckptstore.state.tensors import TensorSource, TensorSpec
from ckptstore.state.values import DICT_KINDS, TAG

_MAX_DEPTH = 2 * MAX_DEPTH + 8
_SCALARS = frozenset((bool, int, float, str, type(None)))
_CONTENT = {
    **dict.fromkeys((*DICT_KINDS, "tuple", "namedtuple", "deque"), "items"),
    **dict.fromkeys(("dataclass", "namespace"), "fields"),
    **dict.fromkeys(("object", "stateful", *GENERATORS), "state"),
    "module": "entries",
    "ndarray": "name",
    "tensor": "name",
    "bytes": "tensor",
    "bytearray": "tensor",
}
"""Kind of node → the field with the nodes in it, or with the name of its tensor."""
_TENSORS = ("tensor", "ndarray", "bytes", "bytearray")
_WHOLE = tuple(GENERATORS)
"""What counts as one value, whatever is in it."""
# Whose class may have been renamed or wrapped.
_IGNORED = {"module": {"type"}, "stateful": {"type", "metadata"}}

_Content: TypeAlias = "dict[str, tuple[str | None, Any]]"
"""The nodes in a node, by what tells them apart: path below the node, None where it is the node's own, and node."""


class Finding(NamedTuple):
    """A name of something that differs, or may differ: then its bytes tell."""

    name: str
    saved: str = ""
    live: TensorSource | None = None
    """The tensor whose bytes are to be compared with those of ``saved``."""


class _Node(NamedTuple):
    """A node taken apart."""

    text: str
    """All that it is besides what follows."""
    tensor: str | None
    content: _Content


class _Place(NamedTuple):
    """Where the walk is."""

    path: str
    name: str | None
    """What all that differs here is called; by its own path where it is None."""
    asked: bool
    """It lies in something that was asked for."""
    depth: int

    @property
    def label(self) -> str:
        return self.name or self.path or "state"

    def below(self, part: str | None) -> _Place:
        path = self.path if part is None else join(self.path, part)
        return self._replace(path=path, depth=self.depth + 1)


class Comparison:
    """One walk over both trees.

    Attributes:
        findings: in the order of the stored tree.
    """

    def __init__(self, specs: Sequence[TensorSpec], live: Snapshot, selection: Selection | None) -> None:
        self.findings: list[Finding] = []
        self._specs = {spec.name: spec for spec in specs}
        self._sources = {source.whole.name: source for source in live.sources}
        self._selection = selection

    def walk(self, saved: Any, live: Any, place: _Place) -> None:
        """Compare two nodes.

        Raises:
            FormatError: the stored node is malformed.
        """
        if place.depth > _MAX_DEPTH:
            raise FormatError(f"{place.path!r} lies deeper than any state that can be saved")
        if self._selection is not None and self._selection.matches(place.path):
            place = place._replace(asked=True)
        rows = _flat_items(saved), _flat_items(live)
        if place.asked and rows[0] is not None and rows[1] is not None and _mould(saved) == _mould(live):
            self._rows(rows[0], rows[1], place)
            return
        mine, theirs = _both_apart(saved, live, place.path)
        if mine.text != theirs.text or (mine.tensor is None) != (theirs.tensor is None):
            self._differs(place, saved, live)
        elif mine.tensor is not None and theirs.tensor is not None:
            self._tensor(mine.tensor, self._sources.get(theirs.tensor), place)
        else:
            if _kind(saved) in _WHOLE:
                place = place._replace(name=place.label)
            self._content(mine.content, theirs.content, place)

    def _content(self, saved: _Content, live: _Content, place: _Place) -> None:
        for key, (part, node) in saved.items():
            if key in live:
                self.walk(node, live[key][1], place.below(part))
            else:
                self._differs(place.below(part), node)
        for key, (part, node) in live.items():
            if key not in saved:
                self._differs(place.below(part), node)

    def _rows(self, saved: list[Any], live: list[Any], place: _Place) -> None:
        """Simple values in a row: where they begin to differ."""
        if json.dumps(saved) == json.dumps(live):
            return
        both = min(len(saved), len(live))
        first = next((i for i in range(both) if json.dumps(saved[i]) != json.dumps(live[i])), both)
        self.findings.append(Finding(place.below(str(first)).label))

    def _differs(self, place: _Place, *nodes: Any) -> None:
        selection = self._selection
        if place.asked or selection is None or any(selection.asks(node, place.path) for node in nodes):
            self.findings.append(Finding(place.label))

    def _tensor(self, name: str, live: TensorSource | None, place: _Place) -> None:
        if live is None:
            # Of a tensor that is spread over processes this one has nothing.
            return
        spec = self._specs.get(name)
        if spec is None:
            raise FormatError(f"{place.path!r} refers to the tensor {name!r}, which the checkpoint doesn't have")
        if place.asked or (self._selection is not None and self._selection.matches(name)):
            alike = (spec.dtype, tuple(spec.shape), spec.logical) == live.whole[1:]
            self.findings.append(Finding(place.label, name, live if alike else None))


def compare_trees(
    tree: Any, specs: Sequence[TensorSpec], live: Snapshot, *, only: Sequence[str] | None = None
) -> list[Finding]:
    """What a live state has otherwise than a checkpoint, in the checkpoint's order.

    Equal is what a save of the live state would store alike; the order of a dict's entries and the classes of
    modules don't count. What only one of the two has is named as a whole, and of a list of simple values the first
    that differs.

    Args:
        tree: the checkpoint's.
        specs: of all stored tensors.
        live: the state, captured.
        only: patterns; just what they match is compared.

    Raises:
        FormatError: the checkpoint's tree is malformed.
        StateError: a pattern matches nothing in either.
    """
    selection = None if only is None else Selection(only, whole_statefuls=False)
    comparison = Comparison(specs, live, selection)
    try:
        if selection is not None:
            selection.require(tree, live.tree)
        comparison.walk(tree, live.tree, _Place("", None, selection is None, 0))
    except RecursionError as error:
        raise FormatError("the tree is nested deeper than any state that can be saved") from error
    return comparison.findings


def _flat_items(node: Any) -> list[Any] | None:
    """The simple values in a list, tuple or deque of nothing else."""
    items = node.get("items") if _kind(node) in ("tuple", "deque") else node
    return items if type(items) is list and set(map(type, items)) <= _SCALARS else None


def _mould(node: Any) -> object:
    """What such a sequence is besides its values."""
    return {**node, "items": None} if isinstance(node, dict) else None


def _taken_apart(node: Any, path: str) -> _Node:
    if isinstance(node, list):
        return _Node("list", None, {str(index): (str(index), child) for index, child in enumerate(node)})
    if not isinstance(node, dict):
        return _Node(json.dumps(node), None, {})
    if TAG not in node:
        return _Node("dict", None, {_key(key): (key, child) for key, child in node.items()})
    kind = node[TAG] if isinstance(node[TAG], str) else ""
    field = _CONTENT.get(kind)
    if field is None or (kind in _TENSORS and field not in node):
        return _Node(json.dumps(node, sort_keys=True), None, {})
    if kind == "tensor":
        # Whether it is a parameter, or wants a gradient, is no part of its value.
        return _Node(kind, str(node["name"]), {})
    rest = {key: value for key, value in node.items() if key not in (field, *_IGNORED.get(kind, ()))}
    text, content = json.dumps(rest, sort_keys=True), node.get(field)
    if kind in _TENSORS:
        return _Node(text, str(content), {})
    if field == "state":
        return _Node(text, None, {"": (None, content), "_metadata": ("_metadata", node.get("metadata"))})
    return _Node("dict" if kind == "dict" else text, None, _entries(content, kind in DICT_KINDS, path))


def _entries(content: object, pairs: bool, path: str) -> _Content:
    if isinstance(content, dict) and not pairs:
        return {_key(key): (key, child) for key, child in content.items()}
    if not isinstance(content, list):
        raise FormatError(f"{path!r} lacks what is in it")
    if not pairs:
        return {str(index): (str(index), child) for index, child in enumerate(content)}
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in content):
        raise FormatError(f"{path!r} is a dict with an entry that is no pair")
    return {_key(key): (key_text(key, index), child) for index, (key, child) in enumerate(content)}


def _key(node: Any) -> str:
    return f":{node}" if isinstance(node, str) else json.dumps(node)


def _both_apart(saved: Any, live: Any, path: str) -> tuple[_Node, _Node]:
    if _kind(saved) == _kind(live) == "optimizer":
        mine, theirs = optimizer.read(saved, path), optimizer.read(live, path)
        return _optimizer(saved, mine, {}), _optimizer(live, theirs, _renaming(mine, theirs))
    return _taken_apart(saved, path), _taken_apart(live, path)


def _kind(node: object) -> object:
    return node.get(TAG) if isinstance(node, dict) else None


def _renaming(saved: optimizer.Saved, live: optimizer.Saved) -> dict[str, str]:
    """What the live optimizer's parameters are called in the checkpoint: loading pairs them by place, too, where their
    names differ.
    """
    mine, theirs = ([ref for group in one.groups for ref in group.params] for one in (saved, live))
    sizes = [[len(group.params) for group in one.groups] for one in (saved, live)]
    return dict(zip(theirs, mine, strict=True)) if set(mine) != set(theirs) and sizes[0] == sizes[1] else {}


def _optimizer(node: dict[str, Any], read: optimizer.Saved, renamed: dict[str, str]) -> _Node:
    """A group's parameters count with their shapes and in any order: a step does the same to each."""
    content: _Content = {}
    for number, group in enumerate(read.groups):
        place = f"groups/{number}"
        refs = [renamed.get(ref, ref) for ref in group.params]
        content[f"{place}/params"] = f"{place}/params", json.dumps(sorted(zip(refs, group.shapes, strict=True)))
        options = group.options
        if isinstance(options, dict) and TAG not in options:
            # They name the live parameters, whatever was loaded.
            options = {key: child for key, child in options.items() if key != "param_names"}
        content[place] = place, options
    for ref, child in read.state.items():
        place = f"state/{renamed.get(ref, ref)}"
        content[place] = place, child
    content["other"] = "other", read.other
    # Modules move; see Pairing.same_class.
    return _Node(str(node.get("type")).rpartition(".")[2], None, content)
