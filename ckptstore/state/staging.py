"""What a save in the background may read in place, and the fence that tells it when it must have done so.

Between two calls of ``optimizer.step()`` nothing changes a trained parameter or an optimizer's state. So they can be
read while the next forward and backward pass runs, without a copy. The hooks here are the fence at the end of it:
before a step, and before ``load_state_dict`` fills a module, whoever reads is told to finish.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ckptstore.errors import StateError
from ckptstore.state.sharding import local_of
from ckptstore.state.tensors import TensorSource

IN_PLACE_BYTES = 64 << 10
"""Smaller tensors are copied at the call: that takes less time than to look after them."""


class Window:
    """The time in which one save reads tensors in place.

    Attributes:
        trained: addresses of what optimizers will change.
        frozen: addresses of parameters that nobody trains.
    """

    def __init__(self, trained: set[int], frozen: set[int]) -> None:
        self.trained, self.frozen = trained, frozen
        self._close: Callable[[bool], None] | None = None

    def open(self, close: Callable[[bool], None]) -> None:
        """Have ``close(frozen)`` called before what is read in place changes, ``frozen`` if that may, too."""
        self._close = close
        _open.add(self)

    def shut(self) -> None:
        """Nothing is read in place any more. Safe to call twice, from any thread."""
        _open.discard(self)
        self._close = None

    def before(self, addresses: set[int] | None) -> None:
        """What lies at ``addresses`` (None: anything) is about to change."""
        close = self._close
        if close is None:
            return
        frozen = addresses is None or not addresses.isdisjoint(self.frozen)
        if frozen or addresses is None or not addresses.isdisjoint(self.trained):
            close(frozen)


_open: set[Window] = set()
_fenced: WeakSet[torch.optim.Optimizer] = WeakSet()
_hooked = False
_steps_begun = 0


def steps_begun() -> int:
    """How often an optimizer's step was begun in this process since the first one was fenced."""
    return _steps_begun


def fence(*optimizers: torch.optim.Optimizer) -> None:
    """Let overlapped saves read in place what these optimizers train, parameters and state, until their next step.

    Once for each optimizer is enough, best before the training step is compiled. An overlapped save does it by itself
    for the optimizers of its state.

    Raises:
        StateError: one of them is no ``torch.optim.Optimizer``, whose steps can't be seen.
    """
    global _hooked
    for optimizer in optimizers:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise StateError(
                f"fence: a {type(optimizer).__name__} is no torch.optim.Optimizer, so that its steps can't be seen; "
                "pass the optimizer that it wraps, or save with mode='async'",
                path="fence",
            )
        _fenced.add(optimizer)
    if not _hooked:
        # Global, once and for good: it also fires for compiled, fused and foreach steps, and a hook that comes and goes
        # makes torch.compile start again.
        register_optimizer_step_pre_hook(_before_step)
        _hooked = True


def fence_module(module: torch.nn.Module) -> None:
    """See ``load_state_dict`` come for a module and those inside of it."""
    for part in module.modules():
        if part._parameters and not any(map(is_fence, part._load_state_dict_pre_hooks.values())):
            part.register_load_state_dict_pre_hook(_before_load)  # type: ignore[no-untyped-call]


def is_fence(hook: object) -> bool:
    """Whether a module's hook is ours, which changes nothing of what its ``state_dict`` means."""
    return getattr(hook, "hook", hook) is _before_load


def fence_all() -> None:
    """The state is about to be changed in a way that no hook sees."""
    for window in list(_open):
        window.before(None)


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
    global _steps_begun
    _steps_begun += 1
    if not _open:
        return None
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if callable(closure) and type(optimizer).__module__.startswith("torch.optim."):
        # torch's own optimizers run the closure first, often all of the forward and backward pass; others may not.
        fenced = _fenced_after(closure, optimizer)
        if "closure" in kwargs:
            return args, {**kwargs, "closure": fenced}
        return (args[0], fenced, *args[2:]), kwargs
    _close_windows(optimizer)
    return None


def _close_windows(optimizer: torch.optim.Optimizer) -> None:
    if _open:
        addresses = _addresses([optimizer])
        for window in list(_open):
            window.before(addresses)


def _fenced_after(closure: Callable[[], Any], optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
    """``closure``, and then the fence."""

    def run() -> Any:
        result = closure()
        _close_windows(optimizer)
        return result

    return run


# What the fence does can't be compiled; that this is said as an attribute spares importing the compiler.
_before_step._torchdynamo_disable = True  # type: ignore[attr-defined]


def _before_load(module: torch.nn.Module, *_: object) -> None:
    if _open:
        addresses = {local_of(parameter).data_ptr() for parameter in module.parameters(recurse=False)}
        for window in list(_open):
            window.before(addresses)


def _addresses(optimizers: Iterable[torch.optim.Optimizer]) -> set[int]:
    found = set()
    for optimizer in optimizers:
        found |= {local_of(parameter).data_ptr() for group in optimizer.param_groups for parameter in group["params"]}
        for state in optimizer.state.values():
            if isinstance(state, dict):
                found |= {local_of(value).data_ptr() for value in state.values() if isinstance(value, torch.Tensor)}
    return found


def mark_frozen(
    sources: Iterable[TensorSource],
    parameters: Iterable[torch.Tensor],
    optimizers: Iterable[torch.optim.Optimizer],
) -> None:
    """Mark the sources of ``parameters`` that need no gradient and that no optimizer has."""
    idle = {local_of(parameter).data_ptr() for parameter in parameters if not parameter.requires_grad}
    if not idle:
        return
    idle -= _addresses(optimizers)
    for source in sources:
        source.frozen = source.live is not None and source.live.data_ptr() in idle


def settle(
    sources: Sequence[TensorSource], modules: Iterable[torch.nn.Module], optimizers: Iterable[torch.optim.Optimizer]
) -> Window | None:
    """Sort out what may be read in place until the next step, and copy what is small and may not.

    Read in place is only what a fenced optimizer owns, and what is frozen, from ``IN_PLACE_BYTES`` up. What else is so
    large is marked as fickle. None, and nothing done, where there is nothing to read in place.
    """
    modules = list(modules)
    fence(*optimizers)
    owned = _addresses(_fenced)
    renormed = {local_of(p).data_ptr() for module in modules for p in _renormed(module)}
    window = Window(set(), set())
    kept = []
    for source in sources:
        source.fickle = False
        stays = _stays(source, owned) and source.base not in renormed
        if source.nbytes < IN_PLACE_BYTES or source.live is None or source.live.is_inference():
            # Also what has no version counter: it could never be copied safely later on.
            kept.append((source, not stays))
        elif not stays:
            source.fickle = True
        else:
            (window.frozen if source.frozen else window.trained).add(source.base)
            source.watch()
    if not window.trained:
        return None
    for module in modules:
        fence_module(module)
    _keep(kept)
    return window


def _stays(source: TensorSource, owned: set[int]) -> bool:
    if source.live is None or source.live.is_inference():
        return False
    return source.place > 0 and (source.frozen or source.base in owned)


def _renormed(module: torch.nn.Module) -> Iterable[torch.Tensor]:
    """Parameters that the forward pass itself changes: an embedding with ``max_norm`` scales the rows that it reads."""
    for part in module.modules():
        if getattr(part, "max_norm", None) is not None:
            yield from part.parameters(recurse=False)


def _keep(sources: list[tuple[TensorSource, bool]]) -> None:
    """Copy the bytes of all sources into one piece of memory, for good or until the save has to begin again.

    A parameter is read again then, however small it is, so that it fits the large ones; batch statistics are not.
    """
    room = np.empty(sum(source.nbytes for source, _ in sources), np.uint8)
    address, at = room.ctypes.data, 0
    for source, for_good in sources:
        source.keep(room[at : at + source.nbytes], address + at, for_good=for_good)
        at += source.nbytes


# A forked child has nobody who would read.
os.register_at_fork(after_in_child=_open.clear)
