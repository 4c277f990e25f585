"""Modules and other objects with ``state_dict`` and ``load_state_dict``.

A module is written and read directly, tensor by tensor under canonical names, unless it changes what its
``state_dict`` means: then its own two methods are used, as for any other object that has them.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from ckptstore.errors import FormatError, StateError
from ckptstore.state.registry import type_name
from ckptstore.state.staging import is_fence
from ckptstore.state.values import TAG, Json

if TYPE_CHECKING:
    from ckptstore.state.encode import Encoder
    from ckptstore.state.pairing import Pairing

_HOOKS = ("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")
_EXTRA = "_extra_state"


def is_stateful(value: object) -> bool:
    """Whether an object saves and restores itself."""
    cls = type(value)
    return callable(getattr(cls, "state_dict", None)) and callable(getattr(cls, "load_state_dict", None))


def wrapped_in(module: nn.Module) -> str | None:
    """The name under which a wrapper (torch.compile, DataParallel, DDP) keeps the module itself, or None."""
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return "module"
    # Where nothing was compiled yet, the compiler isn't imported: that takes seconds.
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    return "_orig_mod" if compiler is not None and isinstance(module, compiler.OptimizedModule) else None


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside of all wrappers."""
    while (name := wrapped_in(module)) is not None:
        module = module._modules[name]  # type: ignore[assignment]
    return module


def is_plain(module: nn.Module) -> bool:
    """Whether ``state_dict`` means just the tensors, all the way down."""
    return all(_is_plain_itself(part) for part in module.modules())


def _is_plain_itself(module: nn.Module) -> bool:
    cls = type(module)
    if cls.state_dict is not nn.Module.state_dict or cls.load_state_dict is not nn.Module.load_state_dict:
        return False
    if any(_has_foreign(getattr(module, hooks, None)) for hooks in _HOOKS):
        return False
    inner = (cls._load_from_state_dict, cls._save_to_state_dict)
    return all(method.__module__.startswith("torch.nn.") for method in inner)


def _has_foreign(hooks: dict[int, object] | None) -> bool:
    return hooks is not None and not all(is_fence(hook) or _only_reshards(hook) for hook in hooks.values())


def _only_reshards(hook: object) -> bool:
    """Whether a hook is that of ``fully_shard``, which has a module's parameters be its shards again."""
    function = getattr(hook, "hook", hook)
    return (getattr(function, "__module__", None) or "").startswith("torch.distributed.fsdp._fully_shard")


def canonical_names(root: nn.Module) -> Callable[[str], str]:
    """What takes the names of wrappers inside of ``root`` out of a key of its ``state_dict``."""
    wrappers = {
        path: name
        for path, part in root.named_modules(remove_duplicate=False)
        if (name := wrapped_in(part)) is not None
    }

    def canonical(key: str) -> str:
        kept, walked = [], ""
        for part in key.split("."):
            if wrappers.get(walked) != part:
                kept.append(part)
            walked = f"{walked}.{part}" if walked else part
        return ".".join(kept)

    return canonical if wrappers else str


def entries(root: nn.Module) -> dict[str, tuple[str, Any]]:
    """Canonical name → key and live value (a tensor, or extra state) of an unwrapped module."""
    canonical = canonical_names(root)
    return {canonical(key): (key, value) for key, value in root.state_dict(keep_vars=True).items()}


def named_parameters(root: nn.Module) -> dict[str, nn.Parameter]:
    """Canonical name → parameter, also under its further names where it is tied."""
    _spread(root)
    canonical = canonical_names(root)
    return {canonical(name): value for name, value in root.named_parameters(remove_duplicate=False)}


def _spread(root: nn.Module) -> None:
    """After an evaluation by FSDP2 whole parameters may stand in for the shards, which are what optimizers know."""
    # Where nobody uses it, it isn't imported.
    sharding = sys.modules.get("torch.distributed.fsdp")
    if sharding is not None:
        for part in root.modules():
            if isinstance(part, sharding.FSDPModule):
                part.reshard()


def full_names(module: nn.Module, path: str) -> dict[str, nn.Parameter]:
    """Name in the state → parameter of a module that stands at ``path``."""
    return {_join(path, name): parameter for name, parameter in named_parameters(unwrap(module)).items()}


def encode(encoder: Encoder, module: nn.Module, path: str) -> Json:
    """The node of a module."""
    root = unwrap(module)
    encoder.modules.append(root)
    for name, parameter in full_names(root, path).items():
        if isinstance(parameter, UninitializedParameter | UninitializedBuffer):
            # Refused before state_dict() is asked, so that the error names the parameter.
            encoder.tensor(parameter, name)
        encoder.parameter(parameter, name)
    if not is_plain(root):
        return encode_stateful(encoder, root, path)
    content: dict[str, Json] = {}
    live = _asked(lambda: entries(root), root, path)
    with encoder.inside(root, path):
        for name, (key, value) in live.items():
            place = _join(path, name)
            content[name] = encoder.encode(value, place) if _is_extra(key) else encoder.tensor(value, place)
    return {TAG: "module", "type": type_name(type(root)), "entries": content}


def _asked(ask: Callable[[], Any], value: object, path: str) -> Any:
    try:
        return ask()
    except Exception as error:
        raise StateError(
            f"state_dict() of the {type_name(type(value))} at {path!r} failed: {error!r}", path=path
        ) from error


def encode_stateful(encoder: Encoder, value: Any, path: str) -> Json:
    """The node of an object with ``state_dict``."""
    state = _asked(value.state_dict, value, path)
    with encoder.inside(value, path):
        node: dict[str, Json] = {TAG: "stateful", "type": type_name(type(value)), "state": encoder.encode(state, path)}
        # Modules keep the versions of their layouts in an attribute of the dict.
        metadata = getattr(state, "_metadata", None)
        if isinstance(metadata, dict):
            node["metadata"] = encoder.encode(metadata, _join(path, "_metadata"))
    return node


def pair(pairing: Pairing, node: dict[str, Any], module: nn.Module, path: str) -> None:
    """Plan to restore a module in place."""
    root = unwrap(module)
    if node.get(TAG) == "stateful":
        pair_stateful(pairing, node, root, path)
    elif is_plain(root):
        _pair_entries(pairing, node, root, path)
    else:
        make = pairing.decoder.parse(node, path)
        pairing.later(lambda: root.load_state_dict(OrderedDict(make()), strict=pairing.strict), root, path)


def pair_plain(pairing: Pairing, node: Any, target: Any, path: str) -> None:
    """Plan to give what was saved as plain data, as by another program, to the object's ``load_state_dict``."""
    saved = pairing.decoder.children(node, path)
    if isinstance(target, nn.Module) and is_plain(unwrap(target)):
        # Tensor by tensor: then nothing is changed where one of them doesn't fit.
        _pair_entries(pairing, {"entries": saved}, unwrap(target), path)
        return
    make = pairing.decoder.parse(node, path)
    options = {} if pairing.strict or not isinstance(target, nn.Module) else {"strict": False}
    pairing.later(lambda: target.load_state_dict(make(), **options), target, path)


def pair_stateful(pairing: Pairing, node: dict[str, Any], target: Any, path: str) -> None:
    """Plan to call ``load_state_dict``."""
    if type(target).__module__.startswith("torch.optim") and not pairing.same_class(node, target, path):
        return
    make = pairing.decoder.parse(node, path)
    metadata = pairing.decoder.parse(node.get("metadata"), path)
    options = {} if pairing.strict or not isinstance(target, nn.Module) else {"strict": False}

    def load() -> None:
        state, versions = make(), metadata()
        if isinstance(state, OrderedDict) and versions is not None:
            state._metadata = versions  # type: ignore[attr-defined]
        target.load_state_dict(state, **options)

    pairing.later(load, target, path)


def entry_nodes(node: dict[str, Any], path: str) -> dict[str, Any]:
    """The nodes of a module's tensors by name.

    Raises:
        FormatError: the node is malformed.
    """
    content = node.get("entries")
    if not isinstance(content, dict):
        raise FormatError(f"the module at {path!r} has no entries")
    return content


def _pair_entries(pairing: Pairing, node: dict[str, Any], root: nn.Module, path: str) -> None:
    targets = _asked(lambda: entries(root), root, path)
    saved = entry_nodes(node, path)
    for name, child in saved.items():
        place = _join(path, name)
        if name not in targets:
            pairing.report.unexpected.append(place)
            continue
        key, value = targets[name]
        if _is_extra(key):
            _pair_extra(pairing, child, root, key, place)
        else:
            pairing.tensor(child, value, place)
    pairing.missing(_join(path, name) for name in targets if name not in saved)


def _pair_extra(pairing: Pairing, node: object, root: nn.Module, key: str, path: str) -> None:
    make = pairing.decoder.parse(node, path)
    owner = root.get_submodule(key.removesuffix(_EXTRA).rstrip("."))
    pairing.later(lambda: owner.set_extra_state(make()), owner, path)


def _is_extra(key: str) -> bool:
    return key == _EXTRA or key.endswith("." + _EXTRA)


def _join(path: str, name: str) -> str:
    return f"{path}/{name}" if path else name
