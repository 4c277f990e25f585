"""Nested live state → tensors and JSON. The inverse is in ``decode.py``."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from ckptstore.errors import StateError
from ckptstore.state import modules, optimizer, rng, sharding
from ckptstore.state.device import DeviceReader
from ckptstore.state.dtypes import CODE_BYTES, TORCH_STORED, numpy_stored
from ckptstore.state.registry import Registration, is_namedtuple, registered_class, type_name
from ckptstore.state.sharding import Box, Shard
from ckptstore.state.tensors import TensorSource, TensorSpec
from ckptstore.state.values import (
    EXACT_INT,
    TAG,
    VALUE_ENCODERS,
    Json,
    float_node,
    int_node,
    is_plain_text,
    scalar_fields,
    text_node,
)

MAX_DEPTH = 100
"""Containers inside of each other. JSON parsers and Python's stack have their own limits, far above."""

INLINE_BYTES = 1024
"""Longer byte strings are stored as tensors, where they are hashed, compressed and read like these."""

_NAME_LENGTH = 4000
"""Names of tensors are cut there, for a tensor's table takes 4096 characters; the tree has the whole path."""

FACTORIES: dict[str, Any] = {f.__name__: f for f in (list, dict, set, int, float, str, tuple, bool)}
"""What a defaultdict may make its values with."""

KEY_KINDS = frozenset((
    "int", "float", "str", "complex", "bytes", "range", "size", "dtype", "device", "scalar", "numpy_str", "numpy_bytes",
    "object",
))  # fmt: skip
"""Tagged nodes that a dict's key or a set's element may be, besides those whose items are such."""
KEY_CONTAINERS = frozenset(("tuple", "frozenset", "namedtuple"))


def join(path: str, part: object) -> str:
    """A path one step further down."""
    return f"{path}/{part}" if path else str(part)


def key_text(node: Json, index: int) -> str:
    """What a dict's key is called in a path: its text, or its place where the key is no simple value."""
    return f"#{index}" if isinstance(node, dict | list) else str(node)


def is_key_node(node: object) -> bool:
    """Whether a node can be a key: its value is hashable and needs no tensor."""
    if not isinstance(node, dict):
        return not isinstance(node, list)
    kind = node.get(TAG)
    if not isinstance(kind, str) or kind in KEY_KINDS:
        return isinstance(kind, str) and "tensor" not in node
    items = node.get("items")
    return kind in KEY_CONTAINERS and isinstance(items, list) and all(map(is_key_node, items))


class Encoder:
    """One walk over a state. ``finish`` must follow the last ``encode``."""

    def __init__(self) -> None:
        self.sources: list[TensorSource] = []
        self.owners: dict[int, str] = {}
        """id of a module's parameter → its full tensor name."""
        self.modules: list[torch.nn.Module] = []
        self.optimizers: list[torch.optim.Optimizer] = []
        self.parameters: dict[int, torch.Tensor] = {}
        # A tensor of this name would be hidden in the header of a safetensors file.
        self._names = {"__metadata__"}
        self._shared: dict[Any, str] = {}
        self._active: dict[int, str] = {}
        self._optimizers: list[tuple[torch.optim.Optimizer, str, dict[str, Json]]] = []
        self._readers: dict[torch.device, DeviceReader] = {}
        self._in_key = False

    def finish(self) -> None:
        """Encode what had to wait: optimizers name their parameters as the modules do, wherever these are."""
        for instance, path, node in self._optimizers:
            node.update(optimizer.encode(self, instance, path))
        self._optimizers.clear()

    def encode(self, value: object, path: str) -> Json:
        """The node of one value.

        Raises:
            StateError: it can't be stored without pickle.
        """
        method = _ENCODERS.get(type(value))
        if method is not None:
            return method(self, value, path)
        return self._other(value, path)

    def tensor(self, value: torch.Tensor, path: str) -> dict[str, Json]:
        """The node of a tensor, which becomes a source unless the very same one already is."""
        if sharding.is_sharded(value):
            return self._sharded(value, path)
        _check_tensor(value, path)
        key = _identity(value, value.shape)
        name = self._shared.get(key) if key is not None else None
        if name is None:
            name = self._name(path)
            self._add(value, name, key, None)
        return {TAG: "tensor", "name": name}

    def _sharded(self, value: torch.Tensor, path: str) -> dict[str, Json]:
        """The node of a tensor that is spread over processes: it names the whole; the part here becomes a source."""
        local, box = sharding.local_of(value), sharding.box_of(value, path)
        if box is None:
            return {TAG: "tensor", "name": self._name(path)}
        _check_tensor(local, path)
        key = _identity(local, value.shape)
        name = self._shared.get(key) if key is not None else None
        if name is None:
            name, tail = self._name(path), TORCH_STORED[value.dtype].tail
            region = box[0] + (0,) * len(tail), box[1] + tail
            spread = local.shape != value.shape
            self._add(local, name, key, Shard(name, tuple(value.shape) + tail, region) if spread else None)
        return {TAG: "tensor", "name": name}

    def piece(self, value: torch.Tensor, name: str, shape: tuple[int, ...], box: Box) -> None:
        """Make a plain tensor a source, as what lies in ``box`` of the tensor ``name`` of that shape, or as all of it.

        Raises:
            StateError: it can't be stored without pickle.
        """
        _check_tensor(value, name)
        self._names.add(name)
        if not value.numel() and 0 not in shape:
            return
        tail, shard = TORCH_STORED[value.dtype].tail, None
        if box[1] != shape:
            shard = Shard(name, shape + tail, (box[0] + (0,) * len(tail), box[1] + tail))
        self._add(value, name, _identity(value, torch.Size(shape)), shard)

    def _add(self, value: torch.Tensor, name: str, key: tuple[Any, ...] | None, shard: Shard | None) -> None:
        """Make a plain tensor of this process a source."""
        row = TORCH_STORED[value.dtype]
        stored = name if shard is None else self._name(f"{name}@{'.'.join(map(str, shard.region[0]))}")
        spec = TensorSpec(stored, row.code, tuple(value.shape) + row.tail, row.logical)
        reader = self._reader(value)
        own = key[0] if key is not None and (reader or value.is_cpu) and value.is_contiguous() else 0
        nbytes = value.numel() * value.element_size()
        self.sources.append(TensorSource(spec, nbytes, value, place=own, reader=reader, shard=shard))
        if key is not None:
            self._shared[key] = name

    def _reader(self, value: torch.Tensor) -> DeviceReader | None:
        """What reads a tensor on a device; made here, in the caller's thread, because it waits for its stream."""
        if not value.is_cuda:
            return None
        if value.device not in self._readers:
            self._readers[value.device] = DeviceReader(value.device)
        return self._readers[value.device]

    def parameter(self, value: torch.Tensor, name: str) -> None:
        """Note a module's parameter, under its first name."""
        self.parameters.setdefault(id(value), value)
        self.owners.setdefault(id(value), name)

    @contextmanager
    def inside(self, value: object, path: str) -> Iterator[None]:
        """Walk into a container: guards against cycles and endless depth."""
        if id(value) in self._active:
            raise StateError(
                f"{path!r} is the same object as {self._active[id(value)]!r}, which contains it: a cycle can't be "
                "stored; save the parts under names of their own",
                path=path,
            )
        if len(self._active) >= MAX_DEPTH:
            raise StateError(f"{path!r} lies more than {MAX_DEPTH} containers deep: flatten the state", path=path)
        self._active[id(value)] = path
        try:
            yield
        finally:
            del self._active[id(value)]

    def array(self, value: np.ndarray, path: str) -> dict[str, Json]:
        """The node of a NumPy array."""
        row = numpy_stored(value.dtype)
        if row is None or type(value) is not np.ndarray:
            raise StateError(
                f"{path!r} is a {type(value).__name__} of type {value.dtype}, which can't be stored without pickle: "
                "store its fields as arrays of numbers, strings or times",
                path=path,
            )
        return {TAG: "ndarray", "name": self._array(value, path), "dtype": value.dtype.str}

    def _array(self, value: np.ndarray, path: str) -> str:
        row = numpy_stored(value.dtype)
        assert row is not None
        spec = TensorSpec(self._name(path), row.code, value.shape + row.tail, row.logical)
        nbytes = math.prod(spec.shape) * CODE_BYTES[row.code]
        self.sources.append(TensorSource(spec, nbytes, None, value))
        return spec.name

    def _name(self, path: str) -> str:
        name = path if path.isascii() else path.encode("utf-8", "backslashreplace").decode()
        name = base = name[:_NAME_LENGTH] or "state"
        number = 1
        # In its file a tensor is called what follows the component.
        while name in self._names or name.partition("/")[2] == "__metadata__":
            name = f"{base}~{number}"
            number += 1
        self._names.add(name)
        return name

    def _plain_tensor(self, value: torch.Tensor, path: str) -> Json:
        node = self.tensor(value, path)
        if isinstance(value, torch.nn.Parameter):
            node["parameter"] = True
        if value.requires_grad and value.is_leaf:
            node["grad"] = True
        return node

    def _dict(self, value: dict[Any, Any], path: str) -> Json:
        if TAG in value or not all(type(key) is str and is_plain_text(key) for key in value):
            return {TAG: "dict", "items": self._items(value, path)}
        prefix = f"{path}/" if path else ""
        with self.inside(value, path):
            return {key: self.encode(item, prefix + key) for key, item in value.items()}

    def _items(self, value: dict[Any, Any], path: str) -> list[Json]:
        items: list[Json] = []
        with self.inside(value, path):
            for index, (key, item) in enumerate(value.items()):
                node = self._key(key, path)
                items.append([node, self.encode(item, join(path, key_text(node, index)))])
        return items

    def _key(self, key: object, path: str) -> Json:
        before, self._in_key = self._in_key, True
        node = self.encode(key, path)
        self._in_key = before
        if not is_key_node(node):
            raise StateError(
                f"{path!r} has a key of type {type(key).__name__}, which can't be stored as one: use text, numbers "
                "or tuples of these, or register its type",
                path=path,
            )
        return node

    def _list(self, value: list[Any], path: str) -> Json:
        if _is_plain(value):
            with self.inside(value, path):
                return list(value)
        return self.sequence(value, path)

    def sequence(self, value: Iterable[Any], path: str) -> list[Json]:
        """The nodes of some values in a row."""
        prefix = f"{path}/" if path else ""
        with self.inside(value, path):
            return [self.encode(item, f"{prefix}{index}") for index, item in enumerate(value)]

    def _set(self, value: Iterable[Any], path: str) -> list[Json]:
        with self.inside(value, path):
            nodes = [self._key(item, path) for item in value]
        # The order of a set differs from run to run; the stored bytes shall not.
        return sorted(nodes, key=json.dumps)

    def _default_dict(self, value: defaultdict[Any, Any], path: str) -> Json:
        factory = value.default_factory
        name = None if factory is None else getattr(factory, "__name__", "")
        if name is not None and FACTORIES.get(name) is not factory:
            raise StateError(
                f"{path!r} is a defaultdict whose factory is code, which can't be stored: use one of "
                f"{', '.join(FACTORIES)}, or convert it with dict()",
                path=path,
            )
        return {TAG: "default_dict", "factory": name, "items": self._items(value, path)}

    def _bytes(self, value: bytes | bytearray, path: str) -> Json:
        kind = VALUE_ENCODERS[type(value)].kind
        if len(value) <= INLINE_BYTES or self._in_key:
            return {TAG: kind, **VALUE_ENCODERS[type(value)].encode(value)}
        # A copy, so that a bytearray can grow while it is being written.
        return {TAG: kind, "tensor": self._array(np.frombuffer(bytes(value), np.uint8), path)}

    def _value(self, value: object, path: str) -> Json:
        row = VALUE_ENCODERS[type(value)]
        try:
            return {TAG: row.kind, **row.encode(value)}
        except TypeError as error:
            raise StateError(f"the {row.kind} at {path!r} can't be stored: {error}", path=path) from error

    def _other(self, value: object, path: str) -> Json:
        cls = type(value)
        registration = registered_class(cls)
        if registration is not None and registration.to_state is not None:
            return self._registered(registration, value, path)
        if isinstance(value, torch.Tensor):
            return self._plain_tensor(value, path)
        if isinstance(value, np.ndarray):
            return self.array(value, path)
        if isinstance(value, np.generic) and (fields := scalar_fields(value)) is not None:
            return {TAG: "scalar", **fields}
        return self._object(value, path)

    def _object(self, value: object, path: str) -> Json:
        if isinstance(value, torch.nn.Module):
            return modules.encode(self, value, path)
        if isinstance(value, torch.optim.Optimizer):
            self.optimizers.append(value)
        if isinstance(value, torch.optim.Optimizer) and optimizer.is_plain(value):
            node: dict[str, Json] = {TAG: "optimizer", "type": type_name(type(value))}
            self._optimizers.append((value, path, node))
            return node
        if modules.is_stateful(value):
            return modules.encode_stateful(self, value, path)
        return self._fields(value, path)

    def _registered(self, registration: Registration, value: object, path: str) -> Json:
        assert registration.to_state is not None
        try:
            state = registration.to_state(value)
        except Exception as error:
            raise StateError(f"to_state of {registration.name} failed at {path!r}: {error}", path=path) from error
        with self.inside(value, path):
            return {TAG: "object", "type": registration.name, "state": self.encode(state, path)}

    def _fields(self, value: object, path: str) -> Json:
        cls = type(value)
        registration = registered_class(cls)
        name = type_name(cls) if registration is None else registration.name
        if is_namedtuple(cls) and isinstance(value, tuple):
            fields: list[Json] = list(cls._fields)  # type: ignore[attr-defined]
            return {TAG: "namedtuple", "type": name, "fields": fields, "items": self.sequence(value, path)}
        if dataclasses.is_dataclass(cls):
            try:
                content = {field.name: getattr(value, field.name) for field in dataclasses.fields(cls)}
            except AttributeError as error:
                raise StateError(f"the {name} at {path!r} lacks a field: {error}", path=path) from error
            return {TAG: "dataclass", "type": name, "fields": self._namespace(value, content, path)}
        raise _refused(value, path)

    def _namespace(self, value: object, content: dict[str, object], path: str) -> dict[str, Json]:
        with self.inside(value, path):
            return {key: self.encode(item, join(path, key)) for key, item in content.items()}


def _check_tensor(value: torch.Tensor, path: str) -> None:
    """Nothing, if the tensor can be stored (StateError)."""
    strange = value.layout is not torch.strided or value.is_nested or type(value) not in _TENSORS
    if value.dtype not in TORCH_STORED or strange or (value.numel() and (value.is_meta or not value.data_ptr())):
        raise _refused_tensor(value, path)


def _identity(value: torch.Tensor, shape: torch.Size) -> tuple[Any, ...] | None:
    """What two tensors that are one have in common; None for one that shares its memory with nobody.

    ``shape`` is that of the whole, of which ``value`` may be a part.
    """
    # A lazily conjugated or negated view has the memory of its base, and other values.
    if not value.numel() or value.is_neg() or (value.is_complex() and value.is_conj()):
        return None
    device = None if value.is_cpu else value.device
    return value.data_ptr(), tuple(value.shape), tuple(shape), value.stride(), value.dtype, device


def _is_plain(values: list[Any]) -> bool:
    """Whether JSON has words for all of these, so that long lists of numbers need no walk."""
    types = set(map(type, values))
    if not types <= {int, float, bool, type(None)}:
        return False
    numbers = [value for value in values if value is not None] if type(None) in types else values
    return not numbers or (max(numbers) < EXACT_INT and min(numbers) > -EXACT_INT and all(map(math.isfinite, numbers)))


def _refused(value: object, path: str) -> StateError:
    cls = type(value)
    bases = [base.__name__ for base in cls.__mro__[1:] if base in _ENCODERS]
    hint = f"convert it with {bases[0]}(), or make" if bases else "make"
    return StateError(
        f"the value at {path!r} is a {type_name(cls)}, which can't be stored without pickle: {hint} it storable with "
        "ckptstore.register_type(cls, to_state=..., from_state=...), or give it state_dict and load_state_dict",
        path=path,
    )


def _refused_tensor(value: torch.Tensor, path: str) -> StateError:
    if isinstance(value, UninitializedParameter | UninitializedBuffer):
        cause, way_out = "has no shape yet", "run a forward pass first"
    elif value.is_meta:
        cause, way_out = "is on the meta device and has no values", "materialise it with to_empty() and fill it"
    elif value.is_quantized or value.dtype not in TORCH_STORED:
        cause, way_out = f"is quantised ({value.dtype})", "store int_repr() with its scale and zero point"
    elif value.layout is not torch.strided:
        cause, way_out = f"is sparse ({value.layout})", "store its indices and values, or to_dense()"
    elif value.is_nested:
        cause, way_out = "is a nested tensor", "store its unbind() as a list"
    elif type(value) not in _TENSORS:
        cause, way_out = f"is a {type_name(type(value))}", "store the plain tensors that it wraps"
    else:
        cause, way_out = "has no memory (its storage was freed or is virtual)", "gather it before saving"
    return StateError(f"the tensor at {path!r} {cause} and can't be stored: {way_out}", path=path)


_TENSORS = (torch.Tensor, torch.nn.Parameter)
_Method = Callable[[Encoder, Any, str], Json]
_ENCODERS: dict[type, _Method] = {
    type(None): lambda encoder, value, path: None,
    bool: lambda encoder, value, path: value,
    int: lambda encoder, value, path: int_node(value),
    float: lambda encoder, value, path: float_node(value),
    str: lambda encoder, value, path: text_node(value),
    list: Encoder._list,
    dict: Encoder._dict,
    torch.Tensor: Encoder._plain_tensor,
    torch.nn.Parameter: Encoder._plain_tensor,
    tuple: lambda encoder, value, path: {TAG: "tuple", "items": encoder.sequence(value, path)},
    OrderedDict: lambda encoder, value, path: {TAG: "ordered_dict", "items": encoder._items(value, path)},
    Counter: lambda encoder, value, path: {TAG: "counter", "items": encoder._items(value, path)},
    defaultdict: Encoder._default_dict,
    deque: lambda encoder, value, path: {TAG: "deque", "maxlen": value.maxlen, "items": encoder.sequence(value, path)},
    set: lambda encoder, value, path: {TAG: "set", "items": encoder._set(value, path)},
    frozenset: lambda encoder, value, path: {TAG: "frozenset", "items": encoder._set(value, path)},
    SimpleNamespace: lambda encoder, value, path: {
        TAG: "namespace",
        "fields": encoder._namespace(value, dict(vars(value)), path),
    },
    **dict.fromkeys(VALUE_ENCODERS, Encoder._value),
    bytes: Encoder._bytes,
    bytearray: Encoder._bytes,
    np.ndarray: Encoder.array,
    **{cls: rng.encoder_of(cls) for cls in rng.GENERATORS.values()},
}
