"""What stands in the tree of a checkpoint: the tensors and their paths, and which of them are a model's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ckptstore.errors import FormatError
from ckptstore.state.decode import Decoder
from ckptstore.state.encode import join, key_text
from ckptstore.state.modules import entry_nodes
from ckptstore.state.rng import GENERATORS
from ckptstore.state.select import ABSENT
from ckptstore.state.values import DICT_KINDS, TAG, Json

_NODES = Decoder([])
_ABSENT: Any = ABSENT


class Place(NamedTuple):
    """A node of the tree.

    Attributes:
        path: the way to it, by names.
        node: itself.
        model: it may be a weight: it belongs neither to an optimizer nor to a random generator.
    """

    path: str
    node: Json
    model: bool


def kind_of(node: Json) -> str | None:
    """The kind of a tagged node; None for all others."""
    kind = node.get(TAG) if isinstance(node, dict) else None
    return kind if isinstance(kind, str) else None


def is_tensor(node: Json) -> bool:
    """Whether a node stands for a tensor."""
    return kind_of(node) == "tensor"


def content_of(node: Json) -> dict[Any, Json] | None:
    """Key → node of what is a dict, of whichever class; None for all else.

    Raises:
        FormatError: it is malformed.
    """
    if not isinstance(node, dict) or (TAG in node and node[TAG] not in DICT_KINDS):
        return None
    return _NODES.children(node, "")


def is_optimizer(node: Json) -> bool:
    """Whether a node is an optimizer, or its ``state_dict``."""
    if kind_of(node) == "optimizer":
        return True
    if isinstance(node, dict) and kind_of(node) == "stateful":
        return is_optimizer(node.get("state"))
    content = content_of(node)
    return content is not None and {"state", "param_groups"} <= content.keys()


def walk(node: Json, path: str = "", model: bool = True) -> Iterator[Place]:
    """A node and all that are in it, in their order; a module, an optimizer or a generator is a node, too."""
    model = model and not is_optimizer(node) and kind_of(node) not in GENERATORS
    yield Place(path, node, model)
    for name, child in children(node, path):
        yield from walk(child, name, model)


def children(node: Json, path: str) -> list[tuple[str, Json]]:
    """The nodes in a node, by their paths."""
    kind = kind_of(node)
    if isinstance(node, list):
        # Lists of numbers are single values: there may be millions of them.
        plain = not any(isinstance(child, dict | list) for child in node)
        return [] if plain else [(join(path, n), child) for n, child in enumerate(node) if child is not _ABSENT]
    content = content_of(node)
    if content is not None:
        named = ((key_text(plain_key(key), index), child) for index, (key, child) in enumerate(content.items()))
        return [(join(path, name), child) for name, child in named]
    if not isinstance(node, dict):
        return []
    if kind == "module":
        return [(join(path, name), child) for name, child in entry_nodes(node, path).items()]
    if kind in ("stateful", "object", *GENERATORS):
        return children(node.get("state"), path)
    if kind == "optimizer":
        return _optimizer_children(node, path)
    for field in ("items", "fields"):
        if isinstance(node.get(field), list | dict) and kind in _WITH_CHILDREN:
            return children(node[field], path)
    return []


_WITH_CHILDREN = frozenset({"tuple", "deque", "namedtuple", "dataclass", "namespace"})


def plain_key(key: Any) -> Json:
    """A dict's key where it is a simple value; others are called by their places."""
    return key if key is None or type(key) in (str, int, float, bool) else []


def _optimizer_children(node: dict[str, Any], path: str) -> list[tuple[str, Json]]:
    groups, states = node.get("groups"), node.get("state")
    if not isinstance(groups, list) or not isinstance(states, list):
        raise FormatError(f"the optimizer at {path!r} lacks its groups or its state")
    found = [(f"{path}/groups/{number}", group["options"]) for number, group in enumerate(groups)]
    return (
        found + [(f"{path}/state/{ref}", child) for ref, child in states] + [(f"{path}/other", node.get("other", {}))]
    )


def models(tree: Json) -> dict[str, Mapping[str, Json]]:
    """The ``state_dict`` of each model in a state, by its path; where there are no modules, of each dict of tensors.

    Raises:
        FormatError: the tree is malformed.
    """
    places = [place for place in walk(tree) if place.model]
    modules = {place.path: _entries(place.node) for place in places if _is_module(place.node)}
    return _with_tensors(modules) or _with_tensors({place.path: _all_tensors(place.node) for place in places})


def _with_tensors(found: Mapping[str, Mapping[str, Json]]) -> dict[str, Mapping[str, Json]]:
    return {path: entries for path, entries in found.items() if any(map(is_tensor, entries.values()))}


def module_names(tree: Json) -> dict[str, str]:
    """Full name → name in its module, of all that modules have."""
    return {
        join(place.path, name): name
        for place in walk(tree)
        if kind_of(place.node) == "module"
        for name in entry_nodes(place.node, place.path)  # type: ignore[arg-type]
    }


def _is_module(node: Json) -> bool:
    # Only the ``state_dict`` of a module has versions.
    return kind_of(node) == "module" or (kind_of(node) == "stateful" and "metadata" in node)  # type: ignore[operator]


def _entries(node: Json) -> Mapping[str, Json]:
    assert isinstance(node, dict)
    if node[TAG] == "module":
        return entry_nodes(node, "")
    content = content_of(node.get("state")) or {}
    return {key: child for key, child in content.items() if isinstance(key, str)}


def _all_tensors(node: Json) -> Mapping[str, Json]:
    content = content_of(node)
    if not content or not all(isinstance(key, str) and is_tensor(child) for key, child in content.items()):
        return {}
    return content
