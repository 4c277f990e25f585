"""A stored tree beside a live target: what is restored where. Nothing is touched while the plan is made."""

from __future__ import annotations

import dataclasses
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch

from ckptstore.errors import FormatError, StateError
from ckptstore.state import modules, optimizer, rng, sharding
from ckptstore.state.decode import Decoder, Maker, array_of, build_dataclass
from ckptstore.state.encode import MAX_DEPTH, join, key_text
from ckptstore.state.inplace import (
    GENERATOR_KINDS,
    LIVE_KINDS,
    PLAIN_TENSORS,
    attribute_setter,
    code_of,
    copy_tensor,
    fill_dict,
    fill_list,
    fill_set,
    holds_live,
    is_record,
    obstacle_to,
    only_live,
    same,
)
from ckptstore.state.merge import APART
from ckptstore.state.registry import is_namedtuple, registered_class, type_name
from ckptstore.state.report import LoadReport
from ckptstore.state.select import ABSENT, Selection
from ckptstore.state.sharding import Box
from ckptstore.state.tensors import Destination, TensorSpec
from ckptstore.state.values import DICT_KINDS, TAG


class Newcomer(NamedTuple):
    """A process that wasn't there when the checkpoint was saved.

    Attributes:
        first: only one process was there.
    """

    number: int
    first: bool


_DICTS = (dict, OrderedDict, defaultdict, Counter)
_PLAIN = frozenset((int, float, bool, str, type(None), torch.Tensor))


class Pairing:
    """One walk over tree and target. ``pair`` plans, and the lists are what is to be done, in their order.

    Attributes:
        tensors: copies into tensors whose bytes can't be read straight into them.
        values: changes of plain containers.
        loads: calls of the target's own methods.
        randoms: random state.
        missing_parts, unexpected_parts: entries of the state that only one side has, where that is no misfit.
        owners: full name → parameter, of all modules in the target.
        union: the tree is that of several processes, of which the target may be one.
    """

    def __init__(
        self,
        decoder: Decoder,
        selection: Selection | None,
        strict: bool,
        *,
        union: bool = False,
        newcomer: Newcomer | None = None,
    ) -> None:
        self.decoder = decoder
        self.union = union
        self._newcomer = newcomer
        self.strict = strict
        self.partial = selection is not None
        self.report = LoadReport()
        self.owners: dict[str, torch.Tensor] = {}
        self.tensors: list[Callable[[], None]] = []
        self.values: list[Callable[[], None]] = []
        self.loads: list[Callable[[], None]] = []
        self.randoms: list[Callable[[], None]] = []
        self.missing_parts: list[str] = []
        self.unexpected_parts: list[str] = []
        self._selection = selection
        self._optimizers: list[tuple[dict[str, Any], torch.optim.Optimizer, str]] = []
        self._claimed: set[int] = set()

    def plan(self, tree: object, target: object) -> None:
        """Plan everything: this or ``plan_parts`` is the only call from outside."""
        self._note_owners(target, "", frozenset())
        make = self.pair(tree, target, "", 0)
        if make is not None and not same(tree, target):
            self.mismatched("", f"a {type(target).__name__} can't be changed in place; put it into a dict")
        self._pair_optimizers()

    def plan_parts(self, tree: object, target: object) -> None:
        """Plan to restore the entries that both have, whatever else one of them has.

        Raises:
            StateError: there are none, or one of the two is no dict.
        """
        if type(target) not in _DICTS or _kind(tree) not in DICT_KINDS:
            what = f"the target is a {type_name(type(target))}, the checkpoint holds a {_kind(tree)}"
            raise StateError(f"strict='parts' restores the entries that two dicts have in common: {what}", path="")
        assert isinstance(target, dict)
        saved = self.decoder.children(tree, "")
        if not saved.keys() & target.keys():
            raise StateError(
                f"the checkpoint and the target have no entry in common: saved {_names(saved)}, "
                f"target {_names(target)}",
                path="",
            )
        lacking = [str(key) for key in target if key not in saved]
        asked = tree if self._selection is None else self._selection.prune(tree, lacking)
        self.missing_parts += [name for name in lacking if self._selection is None or self._selection.means(name)]
        self._note_owners(target, "", frozenset())
        makers: dict[Any, Maker | None] = {}
        for index, (key, child) in enumerate(self.decoder.children(asked, "").items()):
            if key in target:
                makers[key] = self.pair(child, target[key], key_text(key, index), 1)
            else:
                self.unexpected_parts.append(key_text(key, index))
        self.values.append(lambda: fill_dict(target, makers, follow=False))
        self._pair_optimizers()

    def _pair_optimizers(self) -> None:
        for node, instance, path in self._optimizers:
            optimizer.pair(self, node, instance, path)

    def _note_owners(self, target: object, path: str, above: frozenset[int]) -> None:
        # Also of modules that only= leaves out: an optimizer names their parameters.
        if isinstance(target, torch.nn.Module):
            self.owners |= modules.full_names(target, path)
            return
        content: Any = ()
        if isinstance(target, dict):
            content = target.items()
        elif isinstance(target, list | tuple | deque):
            content = enumerate(target)
        elif type(target) is SimpleNamespace:
            content = vars(target).items()
        elif dataclasses.is_dataclass(target):
            content = [(field.name, getattr(target, field.name, None)) for field in dataclasses.fields(target)]
        if id(target) not in above:
            for key, item in content:
                if type(item) not in _PLAIN:
                    self._note_owners(item, join(path, key), above | {id(target)})

    def pair(self, node: Any, target: Any, path: str, depth: int) -> Maker | None:
        """Plan to restore ``target`` in place, or give what makes the value to put in its stead."""
        if depth > 2 * MAX_DEPTH:
            raise StateError(f"the target at {path!r} lies too deep, or contains itself", path=path)
        kind = _kind(node)
        if type(target) in _PAIRS:
            return _PAIRS[type(target)](self, node, target, path, depth)
        if kind in ("dict", "ordered_dict") and modules.is_stateful(target) and registered_class(type(target)) is None:
            modules.pair_plain(self, node, target, path)
            return None
        plan = self._planner(target, kind)
        if plan is None:
            return self._other(node, target, path, depth)
        kinds, method = plan
        if self._expect(kind, kinds, target, path):
            method(node, target, path)
        return None

    def _planner(self, target: object, kind: str) -> tuple[tuple[str, ...], Callable[[Any, Any, str], None]] | None:
        """The kinds of nodes that a live object takes, and what plans to restore it."""
        registration = registered_class(type(target))
        if registration is not None and registration.to_state is not None:
            return None
        if isinstance(target, torch.Tensor):
            return ("tensor",), self.tensor
        if isinstance(target, np.ndarray):
            return ("ndarray",), self._array
        if isinstance(target, torch.nn.Module):
            return ("module", "stateful"), partial(modules.pair, self)
        if isinstance(target, torch.optim.Optimizer) and kind == "optimizer" and optimizer.is_plain(target):
            # They wait for the modules, which name their parameters.
            return (kind,), lambda node, target, path: self._optimizers.append((node, target, path))
        if type(target) in GENERATOR_KINDS:
            return (GENERATOR_KINDS[type(target)],), self._random
        return None

    def tensor(self, node: object, target: torch.Tensor, path: str) -> None:
        """Plan to restore one tensor in place; of one that is spread over processes the part that is here."""
        spec, dtype, shape = self.decoder.tensor_spec(node, path)
        region: Box | None = None
        if sharding.is_sharded(target):
            if target.shape != shape:
                self.mismatched(path, f"saved {list(shape)}, target {list(target.shape)}")
                return
            box, target = sharding.box_of(target, path), sharding.local_of(target)
            if box is None:
                return
            spec, region = sharding.cut(spec, box)
            shape = box[1]
        alike = target.dtype == dtype and target.shape == shape and type(target) in PLAIN_TENSORS
        if alike and target.is_cpu and target.is_contiguous() and self._read_straight(spec, target, region):
            return
        obstacle = obstacle_to(target, dtype)
        if obstacle is not None or target.shape != shape:
            saved, live = spec.logical or spec.dtype, code_of(target.dtype)
            target_shape = list(target.shape)
            self.mismatched(path, f"saved {saved} {list(shape)}, target {live} {target_shape}{obstacle or ''}")
            return
        if target.dtype != dtype:
            self.report.cast.append(path)
        destination = self.decoder.destination(spec, region)
        self.tensors.append(lambda: copy_tensor(target, destination.tensor()))

    def _read_straight(self, spec: TensorSpec, target: torch.Tensor, region: Box | None) -> bool:
        """Let the bytes go into the target's own memory. Never those of two stored tensors into the same."""
        pointer = target.data_ptr()
        if pointer in self._claimed or spec.name in self.decoder.wanted or target.is_neg() or target.is_conj():
            return False
        if not pointer or target.is_nested:
            return False
        self._claimed.add(pointer)
        self.decoder.wanted[spec.name] = Destination(spec, target, region)
        return True

    def fits(self, node: object, live: torch.Tensor, path: str) -> bool:
        """Whether a node is a tensor of exactly the type and shape of a live one."""
        if _kind(node) != "tensor":
            return False
        _, dtype, shape = self.decoder.tensor_spec(node, path)
        return live.dtype == dtype and live.shape == shape and obstacle_to(sharding.local_of(live), dtype) is None

    def spread(self, node: object, parameter: torch.Tensor, path: str) -> Maker | None:
        """What makes a new tensor that is spread as ``parameter`` is; None where the node is none of its shape."""
        if not sharding.is_sharded(parameter) or _kind(node) != "tensor":
            return None
        spec, dtype, shape = self.decoder.tensor_spec(node, path)
        if parameter.shape != shape:
            return None
        box = sharding.box_of(parameter, path)
        if box is None:
            nothing = torch.empty_like(sharding.local_of(parameter), dtype=dtype)
            return lambda: sharding.like(parameter, nothing)
        destination = self.decoder.destination(*sharding.cut(spec, box))
        return lambda: sharding.like(parameter, destination.tensor().to(parameter.device))

    def mismatched(self, path: str, why: str) -> None:
        """Report what can't be restored."""
        self.report.mismatched.append(f"{path or 'the state'}: {why}")

    def missing(self, paths: Iterable[str]) -> None:
        """Report what the target has and the checkpoint hasn't, as far as it was asked for."""
        self.report.missing += [path for path in paths if self._selection is None or self._selection.matches(path)]

    def later(self, call: Callable[[], object], target: object, path: str) -> None:
        """Plan to call a method of the target's own."""

        def load() -> None:
            try:
                call()
            except (FormatError, StateError):
                raise
            except Exception as error:
                raise StateError(
                    f"the {type_name(type(target))} at {path!r} refused what was saved: {error}", path=path
                ) from error

        self.loads.append(load)

    def same_class(self, node: dict[str, Any], target: object, path: str) -> bool:
        """Whether an optimizer or scheduler is of the class that was saved, by its name alone: modules move.

        Another class would take the values without a word and fail at its next step.
        """
        saved, live = str(node.get("type")), type_name(type(target))
        same = saved.rpartition(".")[2] == live.rpartition(".")[2]
        if not same:
            self.mismatched(path, f"saved {saved}, target {live}")
        return same

    def _expect(self, kind: str, kinds: tuple[str, ...], target: object, path: str) -> bool:
        if kind not in kinds:
            hint = ""
            if "module" in (kind, *kinds):
                hint = " (give what was saved, or load without into= and call load_state_dict)"
            self.mismatched(path, f"saved {kind}, target {type_name(type(target))}{hint}")
        return kind in kinds

    def _array(self, node: dict[str, Any], target: np.ndarray, path: str) -> None:
        spec, dtype, shape = self.decoder.array_spec(node, path)
        names = f"saved {dtype} {list(shape)}, target {target.dtype} {list(target.shape)}"
        if target.shape != shape or not target.flags.writeable or type(target) is not np.ndarray:
            self.mismatched(path, names + ("" if target.flags.writeable else ", read-only"))
            return
        if target.dtype != dtype:
            casting = "same_kind" if dtype.kind == target.dtype.kind and dtype.kind in "fc" else "safe"
            if not np.can_cast(dtype, target.dtype, casting):  # type: ignore[arg-type]
                self.mismatched(path, names)
                return
            self.report.cast.append(path)
        elif target.flags.c_contiguous and dtype.str[0] != ">" and spec.name not in self.decoder.wanted:
            pointer = target.ctypes.data
            if pointer not in self._claimed:
                self._claimed.add(pointer)
                self.decoder.wanted[spec.name] = Destination(spec, target)
                return
        destination = self.decoder.destination(spec)
        self.tensors.append(lambda: np.copyto(target, array_of(destination, dtype, shape), casting="same_kind"))

    def _random(self, node: dict[str, Any], target: Any, path: str) -> None:
        kind = node[TAG]
        make = self.decoder.parse(node.get("state"), path)
        self.randoms.append(lambda: rng.set_state(kind, target, make(), path))
        new = self._newcomer
        if new is not None and (node.get(APART) is True or (new.first and kind == "rng")):
            # No two processes shall draw the same numbers, where they didn't before.
            self.randoms.append(lambda: rng.derive(kind, target, new.number))

    def _other(self, node: Any, target: Any, path: str, depth: int) -> Maker | None:
        kind = _kind(node)
        registration = registered_class(type(target))
        if registration is not None and registration.to_state is not None:
            return self._fresh(node, target, path)
        if modules.is_stateful(target):
            if self._expect(kind, ("stateful",), target, path):
                modules.pair_stateful(self, node, target, path)
            return None
        if is_namedtuple(type(target)):
            return self._tuple(node, target, path, depth)
        if dataclasses.is_dataclass(target):
            return self._dataclass(node, target, path, depth)
        return self._fresh(node, target, path)

    def _fresh(self, node: Any, target: object, path: str) -> Maker | None:
        if _kind(node) in LIVE_KINDS:
            self._expect(_kind(node), (), target, path)
            return None
        return self.decoder.parse(node, path)

    def _added(self, node: Any, path: str) -> Maker | None:
        """A value where the target has none: plain ones only, as nothing could take back the others."""
        if _kind(node) in LIVE_KINDS:
            self.report.unexpected.append(path)
            return None
        return self.decoder.parse(node, path)

    def _dict(self, node: Any, target: dict[Any, Any], path: str, depth: int) -> None:
        if not self._expect(_kind(node), DICT_KINDS, target, path):
            return
        nodes = self.decoder.children(node, path)
        record = is_record(target, nodes)
        makers: dict[Any, Maker | None] = {}
        for index, (key, child) in enumerate(nodes.items()):
            place = join(path, key_text(key, index))
            if key in target:
                makers[key] = self.pair(child, target[key], place, depth + 1)
            elif record:
                self.report.unexpected.append(place)
            elif (make := self._added(child, place)) is not None:
                makers[key] = make
        if record:
            self.missing(join(path, key) for key in target if key not in nodes)
        self.values.append(lambda: fill_dict(target, makers, follow=not record and not self.partial))

    def _list(self, node: Any, target: Any, path: str, depth: int) -> None:
        kinds = ("list",) if type(target) is list else ("deque",)
        if not self._expect(_kind(node), kinds, target, path):
            return
        nodes = _elements(node, path)
        makers: list[Maker | None] = []
        for index, child in enumerate(nodes):
            place = join(path, index)
            if index >= len(target):
                makers.append(None if child is ABSENT else self._added(child, place))
            else:
                makers.append(None if child is ABSENT else self.pair(child, target[index], place, depth + 1))
        if any(child is ABSENT for child in nodes):
            makers += [None] * (len(target) - len(nodes))
        self.missing(join(path, i) for i in range(len(nodes), len(target)) if only_live(target[i]))
        self.values.append(lambda: fill_list(target, makers))

    def _set(self, node: Any, target: set[Any], path: str, depth: int) -> None:
        if self._expect(_kind(node), ("set",), target, path):
            make = self.decoder.parse(node, path)
            self.values.append(lambda: fill_set(target, make()))

    def _tuple(self, node: Any, target: Any, path: str, depth: int) -> Maker | None:
        kind = "tuple" if type(target) is tuple else "namedtuple"
        if not self._expect(_kind(node), (kind,), target, path):
            return None
        nodes = _elements(node, path)
        if kind == "namedtuple" and node.get("fields") != list(target._fields):
            self.mismatched(path, f"saved fields {node.get('fields')}, target {list(target._fields)}")
            return None
        whole = not any(child is ABSENT for child in nodes)
        live = any(map(holds_live, target))
        if whole and not live:
            cls, items = type(target), self.decoder.items(node, path, depth)
            return lambda: tuple.__new__(cls, (make() for make in items))
        if len(nodes) != len(target):
            self.mismatched(path, f"saved {len(nodes)} elements, target {len(target)}")
            return None
        if not live:
            return self._mended(nodes, target, path, depth)
        for index, (child, item) in enumerate(zip(nodes, target, strict=True)):
            self._fixed(child, item, join(path, index), depth)
        return None

    def _mended(self, nodes: list[Any], target: tuple[Any, ...], path: str, depth: int) -> Maker:
        """A tuple of plain values, of which some weren't asked for."""
        makers = [
            partial(target.__getitem__, index)
            if child is ABSENT
            else self.decoder.parse(child, join(path, index), depth)
            for index, child in enumerate(nodes)
        ]
        return lambda: tuple(make() for make in makers)

    def _fixed(self, node: Any, item: object, path: str, depth: int) -> None:
        """Restore what lies in an immutable container: in place, or it must be equal already."""
        if node is not ABSENT and self.pair(node, item, path, depth + 1) is not None and not same(node, item):
            self.mismatched(path, "it can't be changed inside of an immutable container; put it into a list or dict")

    def _dataclass(self, node: Any, target: Any, path: str, depth: int) -> Maker | None:
        if not self._expect(_kind(node), ("dataclass", "namespace"), target, path):
            return None
        content = (
            vars(target)
            if type(target) is SimpleNamespace
            else {field.name: getattr(target, field.name) for field in dataclasses.fields(target)}
        )
        nodes = node.get("fields")
        if not isinstance(nodes, dict):
            raise FormatError(f"{path!r} lacks its fields")
        frozen = type(target) is not SimpleNamespace and target.__dataclass_params__.frozen
        if frozen and not any(map(holds_live, content.values())):
            cls, makers = type(target), self.decoder.fields(node, path, depth)
            return lambda: build_dataclass(cls, {key: make() for key, make in makers.items()}, path)
        self.report.unexpected += [join(path, key) for key in nodes if key not in content]
        self.missing(join(path, key) for key in content if key not in nodes)
        for key in nodes.keys() & content.keys():
            if frozen:
                self._fixed(nodes[key], content[key], join(path, key), depth)
            elif (make := self.pair(nodes[key], content[key], join(path, key), depth + 1)) is not None:
                self.values.append(attribute_setter(target, key, make))
        return None


def _names(entries: Iterable[Any]) -> str:
    names = sorted(map(str, entries))
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "") or "nothing"


def _kind(node: object) -> str:
    if isinstance(node, dict):
        tag = node.get(TAG, "dict")
        return tag if isinstance(tag, str) else "malformed node"
    return "list" if isinstance(node, list) else "plain value"


def _elements(node: Any, path: str) -> list[Any]:
    items = node if isinstance(node, list) else node.get("items")
    if not isinstance(items, list):
        raise FormatError(f"{path!r} lacks its items")
    return items


_Pair = Callable[[Pairing, Any, Any, str, int], Maker | None]
_PAIRS: dict[type, _Pair] = {
    **dict.fromkeys(_DICTS, Pairing._dict),
    list: Pairing._list,
    deque: Pairing._list,
    set: Pairing._set,
    tuple: Pairing._tuple,
    SimpleNamespace: Pairing._dataclass,
}
