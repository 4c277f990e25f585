"""Optimizers, written and read directly.

``torch.distributed``'s ``get_optimizer_state_dict`` runs a step, and ``Optimizer.load_state_dict`` casts fp32 state
of bf16 parameters down; neither is used. Parameters are named as the modules of the same state name them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ckptstore.errors import FormatError, StateError
from ckptstore.state.values import Json

if TYPE_CHECKING:
    from ckptstore.state.decode import Decoder, Maker
    from ckptstore.state.encode import Encoder
    from ckptstore.state.pairing import Pairing

_HOOKS = (
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)


class Group(NamedTuple):
    """One saved parameter group."""

    options: Any
    params: list[str]
    """Full tensor names, or "#<group>.<index>" for parameters that no module of the state owns."""
    shapes: list[list[int]]


class Saved(NamedTuple):
    """A saved optimizer, its structure checked and its values not yet."""

    groups: list[Group]
    state: dict[str, Any]
    other: Any


def is_plain(optimizer: torch.optim.Optimizer) -> bool:
    """Whether groups and state are all there is to it."""
    cls, base = type(optimizer), torch.optim.Optimizer
    if cls.state_dict is not base.state_dict or cls.load_state_dict is not base.load_state_dict:
        return False
    return not any(getattr(optimizer, hooks, None) for hooks in _HOOKS)


def encode(encoder: Encoder, optimizer: torch.optim.Optimizer, path: str) -> dict[str, Json]:
    """The fields of an optimizer's node. All modules must have been encoded."""
    refs: dict[int, str] = {}
    taken: set[str] = set()
    groups: list[Json] = []
    for number, group in enumerate(optimizer.param_groups):
        options = {key: value for key, value in group.items() if key != "params"}
        names: list[Json] = []
        for index, parameter in enumerate(group["params"]):
            place, name = f"#{number}.{index}", encoder.owners.get(id(parameter))
            # A group may list a parameter twice, as that of a trunk which two heads share.
            names.append(place if name is None or name in taken else name)
            taken.add(str(names[-1]))
            refs.setdefault(id(parameter), str(names[-1]))
        groups.append({
            "params": names,
            "shapes": [list(parameter.shape) for parameter in group["params"]],
            "options": encoder.encode(options, f"{path}/groups/{number}"),
        })  # fmt: skip
    state: list[Json] = []
    other: dict[object, object] = {}
    for key, value in optimizer.state.items():
        if not isinstance(key, torch.Tensor):
            other[key] = value
        elif id(key) in refs:
            ref = refs[id(key)]
            state.append([ref, encoder.encode(value, f"{path}/state/{ref}")])
        elif value:
            raise StateError(
                f"the optimizer at {path!r} has state of a parameter that is in none of its groups: remove it from "
                "optimizer.state, or add the parameter to a group",
                path=path,
            )
    return {"groups": groups, "state": state, "other": encoder.encode(other, f"{path}/other")}


def read(node: dict[str, Any], path: str) -> Saved:
    """The inverse of ``encode``, as far as the structure goes.

    Raises:
        FormatError: the node is malformed.
    """
    groups, state = node.get("groups"), node.get("state")
    if not isinstance(groups, list) or not isinstance(state, list):
        raise FormatError(f"the optimizer at {path!r} lacks its groups or its state")
    read_groups = [_read_group(group, path) for group in groups]
    refs = {ref for group in read_groups for ref in group.params}
    if len(refs) != sum(len(group.params) for group in read_groups):
        raise FormatError(f"the optimizer at {path!r} names a parameter twice")
    states: dict[str, Any] = {}
    for item in state:
        if not isinstance(item, list) or len(item) != 2 or not isinstance(item[0], str) or item[0] not in refs:
            raise FormatError(f"the optimizer at {path!r} has state of an unknown parameter")
        states[item[0]] = item[1]
    return Saved(read_groups, states, node.get("other", {}))


def _read_group(node: object, path: str) -> Group:
    if not isinstance(node, dict):
        raise FormatError(f"the optimizer at {path!r} has a malformed group")
    params, shapes = node.get("params"), node.get("shapes")
    if not isinstance(params, list) or not all(isinstance(ref, str) for ref in params):
        raise FormatError(f"the optimizer at {path!r} has a group without parameters")
    if not isinstance(shapes, list) or len(shapes) != len(params):
        raise FormatError(f"the optimizer at {path!r} has a group whose shapes and parameters differ in number")
    return Group(node.get("options", {}), params, shapes)


def decode(decoder: Decoder, node: dict[str, Any], path: str, depth: int) -> Maker:
    """What makes the plain form: ``{"groups": [{..., "params": [name, ...]}], "state": {name: {...}}}``."""
    saved = read(node, path)
    options = [
        decoder.entries(group.options, f"{path}/groups/{number}", depth) for number, group in enumerate(saved.groups)
    ]
    states = {ref: decoder.parse(child, f"{path}/state/{ref}", depth) for ref, child in saved.state.items()}
    other = decoder.parse(saved.other, f"{path}/other", depth)

    def make() -> dict[str, Any]:
        groups = [
            {**{key: value() for key, value in makers.items()}, "params": list(group.params)}
            for makers, group in zip(options, saved.groups, strict=True)
        ]
        result = {"groups": groups, "state": {ref: value() for ref, value in states.items()}}
        return result | ({"other": rest} if (rest := other()) else {})

    return make


def pair(pairing: Pairing, node: dict[str, Any], target: torch.optim.Optimizer, path: str) -> None:
    """Plan to restore an optimizer in place. All modules of the target must have been paired.

    Raises:
        StateError: another number of groups or parameters.
    """
    saved = read(node, path)
    if not pairing.same_class(node, target, path):
        return
    if pairing.union:
        matched = _match_by_name(pairing, saved, target, path)
    else:
        _check_counts(saved, target, path)
        matched = _match(pairing, saved, target)
    for number, (group, live) in enumerate(zip(saved.groups, target.param_groups, strict=True)):
        _pair_options(pairing, group.options, live, f"{path}/groups/{number}")
        on_device = any(_plain_flag(group.options, flag) for flag in ("capturable", "fused"))
        for ref, shape in zip(group.params, group.shapes, strict=True):
            parameter = matched.get(ref)
            if parameter is None:
                # Another rank has it.
                continue
            if list(parameter.shape) != shape:
                pairing.mismatched(f"{path}/state/{ref}", f"saved {shape}, target {list(parameter.shape)}")
            elif ref in saved.state:
                _pair_state(pairing, saved.state[ref], _Slot(target, parameter, on_device), f"{path}/state/{ref}")
    other = pairing.decoder.parse(saved.other, f"{path}/other")
    kept = {id(matched[ref]) for ref in saved.state if ref in matched}
    pairing.later(lambda: _finish(target, kept, other(), pairing.partial), target, path)


def _finish(target: torch.optim.Optimizer, kept: set[int], other: Any, partial: bool) -> None:
    if not partial:
        # The checkpoint of step 0 brings back an optimizer without state.
        for key in [key for key in target.state if id(key) not in kept]:
            del target.state[key]
    target.state.update(other)


def _check_counts(saved: Saved, target: torch.optim.Optimizer, path: str) -> None:
    here, there = len(target.param_groups), len(saved.groups)
    if here != there:
        raise StateError(
            f"the optimizer at {path!r} was saved with {there} parameter groups and the target has {here}: build it "
            "with the same groups",
            path=path,
        )
    for number, (group, live) in enumerate(zip(saved.groups, target.param_groups, strict=True)):
        if len(group.params) != len(live["params"]):
            raise StateError(
                f"group {number} of the optimizer at {path!r} was saved with {len(group.params)} parameters and the "
                f"target has {len(live['params'])}: build it with the same parameters",
                path=path,
            )


def _match(pairing: Pairing, saved: Saved, target: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Saved name → the target's parameter: by name if every name is one of the target's, by position otherwise."""
    live = [parameter for group in target.param_groups for parameter in group["params"]]
    refs = [ref for group in saved.groups for ref in group.params]
    named = {ref: pairing.owners[ref] for ref in refs if ref in pairing.owners}
    if {id(parameter) for parameter in named.values()} == set(map(id, live)) and len(named) == len(refs):
        return dict(named)
    return dict(zip(refs, live, strict=True))


def _match_by_name(pairing: Pairing, saved: Saved, target: torch.optim.Optimizer, path: str) -> dict[str, torch.Tensor]:
    """Saved name → the target's parameter, where the saved ones are those of several ranks, and the target has some.

    Raises:
        StateError: another number of groups, or a parameter that no rank has saved, or that has no name.
    """
    if len(target.param_groups) != len(saved.groups):
        _check_counts(saved, target, path)
    names: dict[int, str] = {}
    for name, parameter in pairing.owners.items():
        # A tied one is saved under its first name.
        names.setdefault(id(parameter), name)
    found: dict[str, torch.Tensor] = {}
    for number, (group, live) in enumerate(zip(saved.groups, target.param_groups, strict=True)):
        refs = set(group.params)
        for index, parameter in enumerate(live["params"]):
            name = names.get(id(parameter), f"#{number}.{index}")
            if name not in refs:
                raise StateError(
                    f"group {number} of the optimizer at {path!r} has the parameter {name!r}, which no rank has saved "
                    "in that group: build it with the same groups, and have the model in the state, so that its "
                    "parameters have names",
                    path=path,
                )
            found[name] = parameter
    return found


def _plain_flag(options: object, name: str) -> bool:
    return isinstance(options, dict) and options.get(name) is True


def _pair_options(pairing: Pairing, node: object, live: dict[str, Any], path: str) -> None:
    for key, child in pairing.decoder.children(node, path).items():
        place = f"{path}/{key}"
        if key == "param_names" and key in live:
            # They name the target's own parameters, which may stand in another order.
            continue
        if isinstance(live.get(key), torch.Tensor):
            _pair_tensor_option(pairing, child, live[key], place)
        else:
            pairing.values.append(_setter(live, key, pairing.decoder.parse(child, place)))


def _pair_tensor_option(pairing: Pairing, node: object, live: torch.Tensor, path: str) -> None:
    if isinstance(node, int | float):
        # A learning rate that has become a tensor for the sake of CUDA graphs keeps its memory.
        pairing.values.append(lambda: _fill(live, node))
    else:
        pairing.tensor(node, live, path)


def _fill(live: torch.Tensor, value: float) -> None:
    with torch.no_grad():
        live.fill_(value)


def _setter(live: dict[str, Any], key: str, make: Maker) -> Callable[[], None]:
    def put() -> None:
        live[key] = make()

    return put


class _Slot(NamedTuple):
    """The state of one parameter of an optimizer."""

    optimizer: torch.optim.Optimizer
    parameter: torch.Tensor
    on_device: bool
    """The step counters lie on the parameter's device."""

    def device(self, key: object) -> torch.device:
        """Where a state tensor belongs: torch's own rule, see ``_process_value_according_to_param_policy``."""
        return torch.device("cpu") if key == "step" and not self.on_device else self.parameter.device


def _pair_state(pairing: Pairing, node: object, slot: _Slot, path: str) -> None:
    existing = slot.optimizer.state.get(slot.parameter, {})
    makers: dict[Any, Maker | None] = {}
    for key, child in pairing.decoder.children(node, path).items():
        place = f"{path}/{key}"
        live = existing.get(key)
        if isinstance(live, torch.Tensor) and live.device == slot.device(key) and pairing.fits(child, live, place):
            pairing.tensor(child, live, place)
            makers[key] = None
        else:
            spread = pairing.spread(child, slot.parameter, place)
            makers[key] = pairing.decoder.parse(child, place) if spread is None else spread

    def put() -> None:
        # Whoever keeps a reference to the parameter's state goes on seeing it.
        state = slot.optimizer.state.setdefault(slot.parameter, {})
        filled = {
            key: existing[key] if make is None else _moved(make(), slot.device(key)) for key, make in makers.items()
        }
        if not pairing.partial:
            state.clear()
        state.update(filled)

    pairing.later(put, slot.optimizer, path)


def _moved(value: Any, device: torch.device) -> Any:
    """The value with all its tensors on ``device``, with the types that they were saved with."""
    if device.type == "cpu":
        return value
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if type(value) is dict:
        return {key: _moved(item, device) for key, item in value.items()}
    return type(value)(_moved(item, device) for item in value) if type(value) in (list, tuple) else value
