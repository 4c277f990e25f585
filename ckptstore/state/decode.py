"""Tensors and JSON → nested plain state. The inverse is in ``encode.py``.

A tree is parsed whole before any value is made: ``parse`` checks a node and gives a *maker*, to be called when all
bytes are in. The tree may be hostile: whatever it holds, only ``FormatError`` and ``StateError`` come out.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from keyword import iskeyword
from operator import itemgetter
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from ckptstore.errors import FormatError, StateError
from ckptstore.state import modules, optimizer, rng
from ckptstore.state.dtypes import numpy_dtype, numpy_stored, torch_dtype
from ckptstore.state.encode import FACTORIES, MAX_DEPTH, is_key_node, join, key_text
from ckptstore.state.registry import Registration, is_namedtuple, registered_name
from ckptstore.state.select import ABSENT
from ckptstore.state.sharding import Box
from ckptstore.state.tensors import Destination, TensorSpec, tensor_shape
from ckptstore.state.values import DICT_KINDS, TAG, VALUE_DECODERS

Maker = Callable[[], Any]

# Value nodes have no depth of their own, and containers of a module or an optimizer are two levels of ours.
_MAX_NODE_DEPTH = 2 * MAX_DEPTH + 8


class Decoder:
    """One parse of a tree.

    Attributes:
        wanted: tensors that the parsed nodes need, and where their bytes go.
    """

    def __init__(self, specs: Sequence[TensorSpec]) -> None:
        self.specs = {spec.name: spec for spec in specs}
        self.wanted: dict[str, Destination] = {}
        self._leaves: dict[tuple[str, bool, bool], torch.Tensor] = {}

    def parse(self, node: object, path: str, depth: int = 0) -> Maker:
        """What makes the value of ``node``.

        Raises:
            FormatError: the node is malformed, or names a tensor that isn't there.
            StateError: it is an object of a class that isn't registered here.
        """
        if depth > _MAX_NODE_DEPTH:
            raise FormatError(f"{path!r} lies deeper than any state that can be saved")
        kind = type(node)
        if kind is dict:
            return self._parse_dict(node, path, depth)  # type: ignore[arg-type]
        if kind is list:
            return self._parse_list(node, path, depth)  # type: ignore[arg-type]
        if node is None or kind in (bool, int, float, str):
            return lambda: node
        raise FormatError(f"{path!r} is no value of JSON")

    def spec(self, name: object, path: str) -> TensorSpec:
        """The spec of the tensor that a node names, checked."""
        spec = self.specs.get(name) if isinstance(name, str) else None
        if spec is None:
            raise FormatError(f"{path!r} refers to the tensor {name!r}, which the checkpoint doesn't have")
        return spec

    def tensor_spec(self, node: object, path: str) -> tuple[TensorSpec, torch.dtype, tuple[int, ...]]:
        """Spec, element type and shape of a tensor node's tensor."""
        if not isinstance(node, dict) or node.get(TAG) != "tensor":
            raise FormatError(f"{path!r} is no tensor")
        spec = self.spec(node.get("name"), path)
        dtype = torch_dtype(spec.dtype, spec.logical)
        return spec, dtype, tensor_shape(spec, dtype)

    def array_spec(self, node: dict[str, Any], path: str) -> tuple[TensorSpec, np.dtype[Any], tuple[int, ...]]:
        """Spec, element type and shape of an array node's array."""
        spec = self.spec(node.get("name"), path)
        dtype = numpy_dtype(node.get("dtype"))
        row = numpy_stored(dtype)
        assert row is not None
        cut = len(spec.shape) - len(row.tail)
        if (row.code, row.logical) != (spec.dtype, spec.logical) or cut < 0 or spec.shape[cut:] != row.tail:
            raise FormatError(f"the array at {path!r} isn't stored as its element type {dtype.str} is")
        return spec, dtype, spec.shape[:cut]

    def destination(self, spec: TensorSpec, region: Box | None = None) -> Destination:
        """Where the bytes of a tensor, or of a region of it, go, on first request in memory of its own.

        Raises:
            StateError: two different regions of it are wanted.
        """
        found = self.wanted.get(spec.name)
        if found is None:
            found = self.wanted[spec.name] = Destination(spec, None, region)
        elif found.region != region:
            raise StateError(
                f"{spec.name!r} stands at two places of the state, and the target has different shards of it there: "
                "spread both alike",
                path=spec.name,
            )
        found.copied = True
        return found

    def children(self, node: object, path: str) -> dict[Any, Any]:
        """Key → node of the nodes of a dict, of whichever class."""
        if isinstance(node, dict) and TAG not in node:
            return node
        items = node.get("items") if isinstance(node, dict) and node[TAG] in DICT_KINDS else None
        if not isinstance(items, list):
            raise FormatError(f"{path!r} is no dict")
        content: dict[Any, Any] = {}
        for item in items:
            if not isinstance(item, list) or len(item) != 2:
                raise FormatError(f"{path!r} is a dict with an entry that is no pair")
            content[self.key(item[0], path)] = item[1]
        return content

    def entries(self, node: object, path: str, depth: int) -> dict[Any, Maker]:
        """Key → maker of a dict's values."""
        prefix = f"{path}/" if path else ""
        if isinstance(node, dict) and TAG not in node:
            return {key: self.parse(child, prefix + key, depth + 1) for key, child in node.items()}
        return {
            key: self.parse(child, prefix + key_text(key, index), depth + 1)
            for index, (key, child) in enumerate(self.children(node, path).items())
        }

    def key(self, node: object, path: str) -> Any:
        """A dict's key, made at once."""
        if not is_key_node(node):
            raise FormatError(f"{path!r} has a key that is none")
        value = self.parse(node, path)()
        try:
            hash(value)
        except TypeError as error:
            raise FormatError(f"{path!r} has a key that is none: {error}") from error
        return value

    def items(self, node: dict[str, Any], path: str, depth: int) -> list[Maker]:
        """The makers of a sequence's values."""
        return self._sequence(node.get("items"), path, depth)

    def _sequence(self, items: object, path: str, depth: int) -> list[Maker]:
        if not isinstance(items, list):
            raise FormatError(f"{path!r} lacks its items")
        prefix = f"{path}/" if path else ""
        return [
            self.parse(item, f"{prefix}{index}", depth + 1) for index, item in enumerate(items) if item is not ABSENT
        ]

    def _parse_list(self, node: list[Any], path: str, depth: int) -> Maker:
        if not {*map(type, node)} - {int, float, bool, str, type(None)}:
            return lambda: list(node)
        makers = self._sequence(node, path, depth)
        return lambda: [make() for make in makers]

    def _parse_dict(self, node: dict[str, Any], path: str, depth: int) -> Maker:
        if TAG not in node:
            makers = self.entries(node, path, depth)
            return lambda: {key: make() for key, make in makers.items()}
        tag = node[TAG]
        handler = _HANDLERS.get(tag) if isinstance(tag, str) else None
        if handler is not None:
            return handler(self, node, path, depth)
        value = _value(node, path)
        return lambda: value

    def _tensor(self, node: dict[str, Any], path: str, depth: int) -> Maker:
        spec, dtype, _ = self.tensor_spec(node, path)
        destination = self.destination(spec)
        parameter, grad = node.get("parameter") is True, node.get("grad") is True
        if not parameter and not grad:
            return destination.tensor
        if grad and not (dtype.is_floating_point or dtype.is_complex):
            raise FormatError(f"the tensor at {path!r} is of {dtype} and can't have a gradient")
        return lambda: self._leaf(destination, parameter, grad)

    def _leaf(self, destination: Destination, parameter: bool, grad: bool) -> torch.Tensor:
        key = (destination.spec.name, parameter, grad)
        if key not in self._leaves:
            plain = destination.tensor().detach()
            self._leaves[key] = torch.nn.Parameter(plain, requires_grad=grad) if parameter else plain.requires_grad_()
        return self._leaves[key]

    def _array(self, node: dict[str, Any], path: str, depth: int) -> Maker:
        spec, dtype, shape = self.array_spec(node, path)
        destination = self.destination(spec)
        return lambda: array_of(destination, dtype, shape)

    def _bytes(self, node: dict[str, Any], path: str, depth: int) -> Maker:
        cls = bytes if node[TAG] == "bytes" else bytearray
        if "tensor" not in node:
            value = _value(node, path)
            # Every bytearray made is a new one.
            return lambda: cls(value)  # type: ignore[call-overload]
        spec = self.spec(node["tensor"], path)
        if spec.dtype != "U8" or spec.logical is not None or len(spec.shape) != 1:
            raise FormatError(f"the bytes at {path!r} aren't stored as bytes")
        destination = self.destination(spec)
        return lambda: cls(destination.image().tobytes())

    def _items_of(self, node: dict[str, Any], path: str, depth: int, build: Callable[[Iterable[Any]], Any]) -> Maker:
        makers = self.items(node, path, depth)
        return lambda: build(make() for make in makers)

    def _set(self, node: dict[str, Any], path: str, depth: int) -> Maker:
        cls = set if node[TAG] == "set" else frozenset
        items = node.get("items")
        if not isinstance(items, list):
            raise FormatError(f"{path!r} lacks its items")
        keys = [self.key(item, path) for item in items]
        return lambda: cls(keys)

    def _deque(self, node: dict[str, Any], path: str, depth: int) -> Maker:
        maxlen = node.get("maxlen")
        if maxlen is not None and (type(maxlen) is not int or not 0 <= maxlen < 2**63):
            raise FormatError(f"{path!r} is a deque with a malformed length")
        return self._items_of(node, path, depth, lambda values: deque(values, maxlen))

    def _dict(self, node: dict[str, Any], path: str, depth: int) -> Maker:
        makers = self.entries(node, path, depth)
        factory: Any = {"dict": dict, "ordered_dict": OrderedDict, "counter": _counter}.get(node[TAG])
        if factory is None:
            factory = _default_dict(node.get("factory"), path)
        return lambda: factory((key, make()) for key, make in makers.items())

    def _namespace(self, node: dict[str, Any], path: str, depth: int) -> Maker:
        makers = self.fields(node, path, depth)
        registration = _registration(node, path) if node[TAG] == "dataclass" else None
        if registration is not None and dataclasses.is_dataclass(registration.cls):
            cls = registration.cls
            return lambda: build_dataclass(cls, {key: make() for key, make in makers.items()}, path)
        return lambda: SimpleNamespace(**{key: make() for key, make in makers.items()})

    def fields(self, node: dict[str, Any], path: str, depth: int) -> dict[str, Maker]:
        """The makers of a dataclass's or namespace's fields."""
        fields = node.get("fields")
        if not isinstance(fields, dict):
            raise FormatError(f"{path!r} lacks its fields")
        return {key: self.parse(child, join(path, key), depth + 1) for key, child in fields.items()}

    def _namedtuple(self, node: dict[str, Any], path: str, depth: int) -> Maker:
        fields, name = node.get("fields"), node.get("type")
        makers = self.items(node, path, depth)
        if not isinstance(fields, list) or not isinstance(name, str) or not _are_fields(fields, len(makers)):
            raise FormatError(f"{path!r} is a malformed named tuple")
        registration = _registration(node, path)
        if registration is None or not is_namedtuple(registration.cls):
            cls = _light_tuple(name.rpartition(".")[2], tuple(fields))
        elif list(registration.cls._fields) != fields:  # type: ignore[attr-defined]
            raise StateError(f"{path!r} was saved with the fields {fields}, which {name} hasn't any more", path=path)
        else:
            cls = registration.cls
        return lambda: tuple.__new__(cls, (make() for make in makers))

    def _object(self, node: dict[str, Any], path: str, depth: int) -> Maker:
        registration = _registration(node, path)
        if registration is None or registration.from_state is None:
            raise StateError(
                f"{path!r} is an object of the class {node.get('type')!r}, which isn't registered here: call "
                "ckptstore.register_type for it before loading",
                path=path,
            )
        make, from_state = self.parse(node.get("state"), path, depth + 1), registration.from_state
        return lambda: _from_state(from_state, make(), path)

    def _stateful(self, node: dict[str, Any], path: str, depth: int) -> Maker:
        return self.parse(node.get("state"), path, depth + 1)

    def _module(self, node: dict[str, Any], path: str, depth: int) -> Maker:
        makers = {
            key: self.parse(child, join(path, key), depth + 1) for key, child in modules.entry_nodes(node, path).items()
        }
        return lambda: {key: make() for key, make in makers.items()}

    def _generator(self, node: dict[str, Any], path: str, depth: int) -> Maker:
        kind, device = node[TAG], node.get("device")
        make = self.parse(node.get("state"), path, depth + 1)
        return lambda: rng.make(kind, make(), device, path)


def array_of(destination: Destination, dtype: np.dtype[Any], shape: tuple[int, ...]) -> np.ndarray:
    """The array in a destination's bytes, which are little-endian."""
    array = np.zeros(shape, dtype.newbyteorder("<"))
    if array.nbytes:
        array.reshape(-1).view(np.uint8)[:] = destination.image()
    return array.astype(dtype, copy=False)


def build_dataclass(cls: type, values: dict[str, Any], path: str) -> Any:
    """An instance with these fields, made without running any code of the class.

    Raises:
        StateError: the class has other fields.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    if unknown := sorted(values.keys() - fields.keys()):
        raise StateError(f"{path!r} was saved with {', '.join(unknown)}, which {cls.__qualname__} hasn't", path=path)
    instance: Any = object.__new__(cls)
    for name, field in fields.items():
        if name in values:
            value = values[name]
        elif field.default is not dataclasses.MISSING:
            value = field.default
        elif field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        else:
            raise StateError(f"{path!r} was saved without {name!r}, which {cls.__qualname__} needs", path=path)
        object.__setattr__(instance, name, value)
    return instance


def _value(node: dict[str, Any], path: str) -> object:
    decode = VALUE_DECODERS.get(node[TAG]) if isinstance(node[TAG], str) else None
    if decode is None:
        raise FormatError(f"{path!r} is of the kind {node[TAG]!r}, which this version doesn't know: a newer one may")
    try:
        return decode(node)
    except Exception as error:
        raise FormatError(f"the {node[TAG]} at {path!r} is malformed: {error}") from error


def _registration(node: dict[str, Any], path: str) -> Registration | None:
    name = node.get("type")
    if not isinstance(name, str):
        raise FormatError(f"{path!r} doesn't name its class")
    return registered_name(name)


def _from_state(from_state: Callable[[Any], Any], state: Any, path: str) -> Any:
    try:
        return from_state(state)
    except Exception as error:
        raise StateError(f"from_state failed for {path!r}: {error}", path=path) from error


def _counter(items: Iterable[tuple[Any, Any]]) -> Counter[Any]:
    return Counter(dict(items))


def _default_dict(name: object, path: str) -> Callable[[Any], Any]:
    if name is not None and (not isinstance(name, str) or name not in FACTORIES):
        raise FormatError(f"{path!r} is a defaultdict with an unknown factory")
    factory = None if name is None else FACTORIES[name]
    return lambda items: defaultdict(factory, items)


def _are_fields(fields: list[Any], count: int) -> bool:
    texts = [f for f in fields if isinstance(f, str) and f.isidentifier() and not iskeyword(f) and f[:1] != "_"]
    return len(texts) == len(fields) == len(set(texts)) == count


@lru_cache(maxsize=256)
def _light_tuple(name: str, fields: tuple[str, ...]) -> type:
    # ``collections.namedtuple`` compiles source text made of these names.
    content: dict[str, Any] = {field: property(itemgetter(index)) for index, field in enumerate(fields)}
    return type(name, (tuple,), {**content, "__slots__": (), "_fields": fields})


_Handler = Callable[[Decoder, dict[str, Any], str, int], Maker]
_HANDLERS: dict[str, _Handler] = {
    "tensor": Decoder._tensor,
    "ndarray": Decoder._array,
    "bytes": Decoder._bytes,
    "bytearray": Decoder._bytes,
    "tuple": lambda decoder, node, path, depth: decoder._items_of(node, path, depth, tuple),
    "namedtuple": Decoder._namedtuple,
    "set": Decoder._set,
    "frozenset": Decoder._set,
    "deque": Decoder._deque,
    "dataclass": Decoder._namespace,
    "namespace": Decoder._namespace,
    "object": Decoder._object,
    "stateful": Decoder._stateful,
    "module": Decoder._module,
    "optimizer": optimizer.decode,
    **dict.fromkeys(DICT_KINDS, Decoder._dict),
    **dict.fromkeys(rng.GENERATORS, Decoder._generator),
}
