"""The tree of a checkpoint that DCP plans, and what DCP calls the entries of any tree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ckptstore.errors import FormatError, StateError
from ckptstore.state import optimizer
from ckptstore.state.decode import Decoder
from ckptstore.state.encode import Encoder, join
from ckptstore.state.modules import entry_nodes
from ckptstore.state.values import DICT_KINDS, TAG, Json, is_plain_text, text_node
from ckptstore.tools.importing.dcpnames import Path, nest

_FLAT = "torch.distributed.checkpoint"
"""The type of a root whose keys are DCP's own, where they don't follow from the tree."""


def tensor_name(key: str, path: Path) -> str:
    """The name in the store of the tensor that DCP calls ``key`` and that stands at ``path``; never that of another.

    Raises:
        StateError: it is too long for a table of tensors.
    """
    parts = [str(part).replace("~", "~0").replace("/", "~1") for part in path]
    name = "/".join(parts).encode("utf-8", "backslashreplace").decode()
    if len(name) > _NAME_LENGTH:
        raise StateError(f"the name {name[:80]!r}… has {len(name)} characters, {_NAME_LENGTH} can be stored", path=key)
    # Names that the header of a safetensors file has for itself.
    reserved = name == "__metadata__" or name.partition("/")[2] == "__metadata__"
    return f"{name}~2" if reserved else name


_NAME_LENGTH = 3900


def key_path(key: str, planner_data: object) -> Path:
    """Where ``key`` stands in the nested state, as far as DCP's planner knows."""
    path = planner_data.get(key) if isinstance(planner_data, Mapping) else None
    return path if _is_path(path) else (key,)  # type: ignore[return-value]


def _is_path(value: object) -> bool:
    return type(value) is tuple and bool(value) and {*map(type, value)} <= {str, int} and type(value[0]) is str


def build(nodes: Mapping[str, Json], planner_data: object) -> Json:
    """The tree of a state of which each entry's node is known, by DCP's key.

    It is nested as it was before DCP flattened it. Where the keys don't follow from that, because another planner made
    them, or flattened nothing, they stand side by side, with the planner's data.

    Raises:
        StateError: the planner's data can't be stored.
    """
    paths = {key: key_path(key, planner_data) for key in nodes}
    known = planner_data is None or _is_mapping(planner_data, nodes)
    try:
        tree: Json = nest(nodes, paths, _dict_node)
        if known and dict(_key_paths(tree)) == paths:
            return tree
    except FormatError:
        pass
    encoder = Encoder()
    planner = encoder.encode(planner_data, "the planner's data")
    if encoder.sources:
        raise StateError("the planner's data hold tensors or arrays, which can't be stored there", path="planner_data")
    return {TAG: "stateful", "type": _FLAT, "state": _dict_node(dict(nodes)), "planner": planner}


def _is_mapping(planner_data: object, nodes: Mapping[str, Json]) -> bool:
    return isinstance(planner_data, dict) and all(_is_path(planner_data.get(key)) for key in nodes)


def _key_paths(tree: Json) -> Iterator[tuple[str, Path]]:
    for path, _ in leaves(tree):
        yield ".".join(map(str, path)), path


def _dict_node(items: dict[str, Any]) -> Json:
    """The node of a dict, as ``Encoder`` makes it."""
    if TAG in items or not all(map(is_plain_text, items)):
        return {TAG: "dict", "items": [[text_node(key), item] for key, item in items.items()]}
    return items


def entries(tree: Json) -> tuple[dict[str, Json], Any]:
    """The nodes of a tree by the keys that DCP has for them, and the data for its planner.

    Raises:
        StateError: the state is no dict, or two of its entries get one key.
        FormatError: the tree is malformed.
    """
    try:
        return _entries(tree)
    except RecursionError as error:
        raise FormatError("the tree is nested deeper than any state that can be saved") from error


def _entries(tree: Json) -> tuple[dict[str, Json], Any]:
    if isinstance(tree, dict) and tree.get(TAG) == "stateful" and tree.get("type") == _FLAT:
        content = _children(tree.get("state"))
        if content is None:
            raise FormatError("the state of the tree is no dict")
        return {str(key): node for key, node in content.items()}, Decoder([]).parse(tree.get("planner"), "")()
    if _children(tree) is None:
        raise StateError("what was saved is no dict, and DCP loads nothing else: use Store.load", path="")
    nodes: dict[str, Json] = {}
    paths: dict[str, Path] = {}
    for path, node in leaves(tree):
        key = ".".join(map(str, path))
        if key in nodes:
            raise StateError(f"{key!r} is the key of two entries for DCP: use Store.load", path=key)
        nodes[key], paths[key] = node, path
    return nodes, paths


def leaves(tree: Json) -> Iterator[tuple[Path, Json]]:
    """What DCP saves one by one of a state, and the way to it.

    Those are the values in dicts of dicts, however deep, and those in lists in which there is a dict or a tensor
    somewhere; other lists are single values. Optimizers are as DCP's ``get_state_dict`` gives them.
    """
    names: dict[str, str] | None = None
    stack: list[tuple[Path, Json]] = [((), tree)]
    while stack:
        path, node = stack.pop()
        if isinstance(node, dict) and node.get(TAG) == "optimizer":
            names = _module_names(tree) if names is None else names
            node = _plain_optimizer(node, names)
        content = _children(node)
        if content is not None:
            stack += [((*path, str(key)), child) for key, child in reversed(content.items())]
        elif isinstance(node, list) and not _is_value(node):
            stack += [((*path, index), child) for index, child in reversed(list(enumerate(node)))]
        else:
            yield path, node


def _module_names(tree: Json) -> dict[str, str]:
    """Full name → name in its module, of all parameters."""
    names: dict[str, str] = {}
    stack: list[tuple[str, Json]] = [("", tree)]
    while stack:
        path, node = stack.pop()
        if isinstance(node, dict) and node.get(TAG) == "module":
            names |= {join(path, name): name for name in entry_nodes(node, path)}
        else:
            content = _children(node) or (dict(enumerate(node)) if isinstance(node, list) else {})
            stack += [(join(path, key), child) for key, child in content.items()]
    return names


def _plain_optimizer(node: dict[str, Any], names: Mapping[str, str]) -> Json:
    saved = optimizer.read(node, "")
    refs = [ref for group in saved.groups for ref in group.params]
    if len({names.get(ref, ref) for ref in refs}) < len(refs):
        # Of several modules with parameters of the same names: by the short ones some would be lost.
        names = {}
    groups: list[Json] = []
    for group in saved.groups:
        options = {str(key): child for key, child in (_children(group.options) or {}).items()}
        groups.append(_dict_node({**options, "params": [text_node(names.get(ref, ref)) for ref in group.params]}))
    state = _dict_node({names.get(ref, ref): child for ref, child in saved.state.items()})
    return {"state": state, "param_groups": groups}


def _is_value(items: list[Any]) -> bool:
    """Whether a list holds neither tensors nor dicts, in lists of lists either."""
    for item in items:
        inner = isinstance(item, list) and not _is_value(item)
        if inner or _children(item) is not None or (isinstance(item, dict) and item.get(TAG) == "tensor"):
            return False
    return True


def _children(node: Json) -> dict[Any, Any] | None:
    """Key → node of what is a dict for DCP: of objects their state; None for all else."""
    kind = node.get(TAG) if isinstance(node, dict) else None
    if not isinstance(node, dict):
        return None
    if kind == "module":
        return entry_nodes(node, "")
    if kind == "stateful":
        return _children(node.get("state"))
    if TAG in node and kind not in DICT_KINDS:
        return None
    return Decoder([]).children(node, "")
