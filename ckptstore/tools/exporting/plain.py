"""Trees as values that ``torch.load(weights_only=True)`` takes: what it doesn't is made simpler, or left out."""

from __future__ import annotations

import io
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, Final, Protocol

import numpy as np
import torch

from ckptstore.engine.tensorreader import TensorReader
from ckptstore.errors import FormatError
from ckptstore.state import optimizer
from ckptstore.state.decode import Decoder
from ckptstore.state.encode import MAX_DEPTH, join, key_text
from ckptstore.state.modules import entry_nodes
from ckptstore.state.rng import GENERATORS
from ckptstore.state.select import ABSENT
from ckptstore.state.tensors import TensorSpec
from ckptstore.state.values import DICT_KINDS, TAG, Json
from ckptstore.tools.exporting.notes import Notes
from ckptstore.tools.exporting.trees import content_of, is_optimizer, kind_of, plain_key


class _LeftOut:
    """Stands for a value that is left out."""


LEFT_OUT: Final = _LeftOut()

# Long ones have a code of their own that the restricted loader doesn't know.
_PLAIN_INT_BITS = 2000

# As in ``Decoder``: containers of a module or an optimizer are two levels of ours.
_MAX_NODE_DEPTH = 2 * MAX_DEPTH + 8

_KEYS = (str, int, float, bool, bytes, complex, type(None), torch.dtype, torch.device)


class MakeTensor(Protocol):
    """Makes what stands for a tensor of the checkpoint, converted where it belongs to a model."""

    def __call__(self, spec: TensorSpec, dtype: torch.dtype, shape: tuple[int, ...], model: bool) -> torch.Tensor: ...


class Values:
    """Makes the values of nodes.

    Args:
        reader: of the checkpoint.
        tensor: makes its tensors.
        notes: told of what is simpler now, or left out.
        takes: whether there can be tensors of a type.
        names: of parameters in their modules, by full name, where optimizers shall have names as those of
            ``torch.distributed.checkpoint`` have; None: numbers, as ``Optimizer.state_dict`` has.
    """

    def __init__(
        self,
        reader: TensorReader,
        tensor: MakeTensor,
        notes: Notes,
        *,
        takes: Callable[[torch.dtype], bool],
        names: Mapping[str, str] | None = None,
    ) -> None:
        specs = [TensorSpec(name, t.dtype, tuple(t.shape), t.logical) for name, t in reader.tensors.items()]
        self._decoder = Decoder(specs)
        self._reader, self._tensor, self._notes, self._names = reader, tensor, notes, names
        self._takes = takes
        self._leaves: dict[tuple[str, bool], torch.Tensor] = {}
        self._model = True

    def make(self, tree: Json) -> Any:
        """The value of a whole tree.

        Raises:
            FormatError: it is malformed; other errors of a wrong type or value tell of the same.
            IntegrityError, StorageError: what has to be read for it can't be.
        """
        return self._make(tree, "", 0)

    def _make(self, node: Json, path: str, depth: int) -> Any:
        if depth > _MAX_NODE_DEPTH:
            raise FormatError(f"{path!r} lies deeper than any state that can be saved")
        if isinstance(node, list):
            return self._items(node, path, depth)
        if not isinstance(node, dict):
            return node
        before = self._model
        self._model = before and not is_optimizer(node) and kind_of(node) not in GENERATORS
        try:
            return self._of_dict(node, path, depth)
        finally:
            self._model = before

    def _of_dict(self, node: dict[str, Any], path: str, depth: int) -> Any:
        content = content_of(node)
        if content is not None:
            return self._dict(node, content, path, depth)
        kind = kind_of(node)
        if kind in GENERATORS:
            return self._generator(node, path, depth)
        handler = _HANDLERS.get(kind or "")
        if handler is not None:
            return handler(self, node, path, depth)
        return self._value(node, path)

    def _generator(self, node: dict[str, Any], path: str, depth: int) -> Any:
        before = set(self._notes.converted)
        state = self._make(node.get("state"), path, depth + 1)
        for name in self._notes.converted.keys() - before:
            # Nobody asks what its words are stored as.
            del self._notes.converted[name]
        return self._simpler(state, path, "the state of a random generator")

    def _dict(self, node: dict[str, Any], content: dict[Any, Json], path: str, depth: int) -> Any:
        made: dict[Any, Any] = {}
        for index, (key, child) in enumerate(content.items()):
            place = join(path, key_text(plain_key(key), index))
            if not _is_plain_key(key):
                self._leave_out(place, f"its key is a {type(key).__name__}, which plain torch doesn't load")
                continue
            value = self._make(child, place, depth + 1)
            if value is not LEFT_OUT:
                made[key] = value
        kind = node.get(TAG)
        if kind == "default_dict":
            return self._simpler(made, path, "a dict, without its factory")
        return OrderedDict(made) if kind == "ordered_dict" else Counter(made) if kind == "counter" else made

    def _items(self, items: Any, path: str, depth: int) -> list[Any]:
        if not isinstance(items, list):
            raise FormatError(f"{path!r} lacks its items")
        made = [self._make(item, join(path, n), depth + 1) for n, item in enumerate(items) if item is not ABSENT]
        # None keeps the others in their places.
        return [None if item is LEFT_OUT else item for item in made]

    def _tensor_of(self, node: dict[str, Any], path: str, depth: int) -> Any:
        spec, dtype, shape = self._decoder.tensor_spec(node, path)
        if not self._takes(dtype):
            return self._leave_out(path, f"such files can't hold tensors of {dtype}")
        if node.get("parameter") is True:
            self._notes.converted[path] = "a tensor, of a parameter"
        return self._leaf(spec, dtype, shape, node.get("grad") is True and self._names is None)

    def _leaf(self, spec: TensorSpec, dtype: torch.dtype, shape: tuple[int, ...], grad: bool) -> torch.Tensor:
        """The same one wherever it stands."""
        if (spec.name, grad) not in self._leaves:
            if grad:
                made = self._leaf(spec, dtype, shape, False).detach().requires_grad_()
            else:
                made = self._tensor(spec, dtype, shape, self._model)
            self._leaves[spec.name, grad] = made
        return self._leaves[spec.name, grad]

    def _array(self, node: dict[str, Any], path: str, depth: int) -> Any:
        spec, dtype, shape = self._decoder.array_spec(node, path)
        if spec.logical is not None and spec.logical.startswith("numpy:"):
            return self._leave_out(path, f"a NumPy array of {dtype}, which torch has no type for")
        _, element, _ = self._decoder.tensor_spec({TAG: "tensor", "name": spec.name}, path)
        return self._simpler(self._leaf(spec, element, shape, False), path, "a tensor, of a NumPy array")

    def _bytes(self, node: dict[str, Any], path: str, depth: int) -> Any:
        if "tensor" not in node:
            return self._value(node, path)
        spec = self._decoder.spec(node["tensor"], path)
        image = bytearray(self._reader.tensors[spec.name].nbytes)
        self._reader.read_into(spec.name, 0, memoryview(image))
        return bytes(image) if node[TAG] == "bytes" else image

    def _module(self, node: dict[str, Any], path: str, depth: int) -> Any:
        made = {k: self._make(child, join(path, k), depth + 1) for k, child in entry_nodes(node, path).items()}
        return {key: value for key, value in made.items() if value is not LEFT_OUT}

    def _stateful(self, node: dict[str, Any], path: str, depth: int) -> Any:
        return self._make(node.get("state"), path, depth + 1)

    def _object(self, node: dict[str, Any], path: str, depth: int) -> Any:
        made = self._make(node.get("state"), path, depth + 1)
        return self._simpler(made, path, f"the state of a {node.get('type')}")

    def _fields(self, node: dict[str, Any], path: str, depth: int) -> Any:
        if content_of(node.get("fields")) is None:
            raise FormatError(f"{path!r} lacks its fields")
        made = self._make(node["fields"], path, depth + 1)
        return self._simpler(made, path, f"a dict, of a {node[TAG]}")

    def _sequence(self, node: dict[str, Any], path: str, depth: int) -> Any:
        made = self._items(node.get("items"), path, depth)
        if node[TAG] == "tuple":
            return tuple(made)
        if node[TAG] == "namedtuple":
            return self._simpler(tuple(made), path, "a tuple, of a namedtuple")
        return self._simpler(made, path, "a list, of a deque")

    def _set(self, node: dict[str, Any], path: str, depth: int) -> Any:
        items = node.get("items")
        if not isinstance(items, list):
            raise FormatError(f"{path!r} lacks its items")
        keys = {self._decoder.key(item, path) for item in items}
        if not all(map(_is_plain_key, keys)):
            return self._leave_out(path, "a set with elements that plain torch doesn't load")
        return keys if node[TAG] == "set" else self._simpler(keys, path, "a set, of a frozenset")

    def _optimizer(self, node: dict[str, Any], path: str, depth: int) -> Any:
        saved = optimizer.read(node, path)
        refs = [ref for group in saved.groups for ref in group.params]
        keys: dict[str, Any] = {ref: number for number, ref in enumerate(refs)}
        if self._names is not None:
            keys = {ref: self._names.get(ref, ref) for ref in refs}
            if len({*keys.values()}) < len(refs):
                # Two modules share it, and have the same names.
                keys = {ref: ref for ref in refs}
        state = {keys[ref]: self._make(child, f"{path}/state/{ref}", depth + 1) for ref, child in saved.state.items()}
        state = {key: value for key, value in state.items() if value is not LEFT_OUT}
        other = self._make(saved.other, f"{path}/other", depth + 1)
        groups = []
        for number, group in enumerate(saved.groups):
            options = self._make(group.options, f"{path}/groups/{number}", depth + 1)
            groups.append({**options, "params": [keys[ref] for ref in group.params]})
        return {"state": {**state, **other}, "param_groups": groups}

    def _value(self, node: dict[str, Any], path: str) -> Any:
        value = self._decoder.parse(node, path)()
        if isinstance(value, np.str_ | np.bytes_):
            return self._simpler(value.item(), path, f"a {type(value.item()).__name__}, of NumPy's")
        if isinstance(value, np.generic):
            plain = value.item()
            if type(plain) not in (int, float, bool, complex):
                return self._leave_out(path, f"a NumPy {value.dtype}, which plain torch doesn't load")
            return self._simpler(plain, path, f"a {type(plain).__name__}, of a NumPy {value.dtype}")
        if type(value) is int and value.bit_length() < _PLAIN_INT_BITS:
            return value
        if type(value) in (float, complex) or is_loadable(value):
            return value
        return self._leave_out(path, f"a {type(value).__name__}, which plain torch doesn't load")

    def _simpler(self, value: Any, path: str, what: str) -> Any:
        if value is not LEFT_OUT:
            self._notes.converted[path] = what
        return value

    def _leave_out(self, path: str, reason: str) -> _LeftOut:
        self._notes.left_out[path] = reason
        return LEFT_OUT


def _is_plain_key(key: Any) -> bool:
    if type(key) is tuple:
        return all(map(_is_plain_key, key))
    return type(key) in _KEYS


def is_loadable(value: Any) -> bool:
    """Whether ``torch.load(weights_only=True)`` of this release takes a value."""
    file = io.BytesIO()
    try:
        torch.save(value, file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except Exception:
        # Whatever stops it, it would stop every reader of the export.
        return False
    return True


@lru_cache
def is_loadable_type(dtype: torch.dtype) -> bool:
    """Whether it takes tensors of a type."""
    with warnings.catch_warnings(action="ignore"):
        # Some types are experimental; those who use them have heard of it.
        return is_loadable(torch.empty(1, dtype=dtype))


_Handler = Callable[[Values, dict[str, Any], str, int], Any]
_HANDLERS: dict[str, _Handler] = {
    "tensor": Values._tensor_of,
    "ndarray": Values._array,
    "bytes": Values._bytes,
    "bytearray": Values._bytes,
    "module": Values._module,
    "optimizer": Values._optimizer,
    "stateful": Values._stateful,
    "object": Values._object,
    "dataclass": Values._fields,
    "namespace": Values._fields,
    **dict.fromkeys(("tuple", "namedtuple", "deque"), Values._sequence),
    **dict.fromkeys(("set", "frozenset"), Values._set),
}
assert not _HANDLERS.keys() & set(DICT_KINDS)
