"""What Hugging Face Accelerate wraps around optimizers, schedulers and loaders: known by its classes, not imported."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any


def _is_prepared(value: object) -> bool:
    # Not by its __class__: prepared loaders claim to be torch's.
    return type(value).__module__.startswith("accelerate.")


def unwrapped(value: Any) -> Any:
    """The optimizers and schedulers themselves, which are what steps and is saved, also inside of dicts and lists."""
    if type(value) is dict:
        return {key: unwrapped(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(unwrapped, value))
    if _is_prepared(value):
        fields = getattr(value, "__dict__", {})
        return fields.get("scheduler", fields.get("optimizer", value))
    return value


def loader_of(source: Any) -> Any:
    """The loader inside of a prepared one; anything else as it is."""
    return vars(source).get("base_dataloader", source) if _is_prepared(source) else source


def dressed(shard: Any, batches: Iterator[Any], is_last: Callable[[], bool], epoch: int) -> Iterator[Any]:
    """One pass, as a prepared loader makes it, but without reading a batch ahead, which a resume would lose.

    Args:
        shard: the prepared loader.
        batches: those of the loader inside of it.
        is_last: whether the batch that was taken last is known to be the last one.
        epoch: that the run is in.
    """
    to_device: Any = vars(sys.modules[type(shard).__module__])["send_to_device"]
    # One that reads for all processes puts batches where its process computes.
    device = (shard if "device" in vars(shard) else shard.state).device
    if shard.gradient_state.num_steps > 1 and not _has_length(loader_of(shard)):
        warnings.warn(
            "a loader without a length doesn't know which batch is its last one: where gradients are accumulated, a "
            "last window that isn't full makes no step",
            stacklevel=3,
        )
    shard.begin()
    try:
        # A new process begins to count its passes anew.
        shard.set_epoch(max(shard.iteration, epoch))
        for batch in batches:
            shard.end_of_dataloader = is_last()
            yield batch if device is None else to_device(batch, device, non_blocking=shard._non_blocking)
        shard.iteration += 1
    finally:
        shard.end()


def _has_length(loader: Any) -> bool:
    try:
        return len(loader) >= 0
    except TypeError:
        return False
