"""The memory that a save to a bucket and a load from it take at their peak, in a process of its own."""

from __future__ import annotations

import gc
import json
import sys
from typing import Any

import torch

import ckptstore as cs
from benchmarks.memory import fresh_peak, resident
from benchmarks.tensors import gpt2_adamw


def once(asked: dict[str, Any]) -> dict[str, int]:
    """Save and load once, after a tiny store has imported all that is needed."""
    url, options = f"s3://{asked['bucket']}/{asked['name']}", asked["options"]
    with cs.open(f"{url}-tiny", storage_options=options) as store:
        store.save({"x": torch.zeros(8)}, step=0)
        store.load()
    tensors = {"x": torch.randn(1 << 20)} if asked["small"] else gpt2_adamw()
    size = sum(tensor.nbytes for tensor in tensors.values())
    before = fresh_peak()
    with cs.open(url, storage_options=options) as store:
        store.save(tensors, step=1)
    save_bytes = resident("VmHWM") - before
    # The state stays, and buffers of the saving go: what was freed in the meantime would hide as much.
    del store
    gc.collect()
    before = fresh_peak()
    with cs.open(url, storage_options=options, read_only=True) as store:
        loaded = store.load()
    load_bytes = resident("VmHWM") - before - size
    assert len(loaded) == len(tensors)
    return {"save_bytes": save_bytes, "load_bytes": load_bytes}


if __name__ == "__main__":
    print(json.dumps(once(json.loads(sys.argv[1]))))
