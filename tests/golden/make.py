"""Write the golden stores (``python -m tests.golden.make``), each once; they are kept for ever.

``v1`` is of the first version of the format; ``timed1`` has what came later: ``timing``, and what a verification found.
"""

from __future__ import annotations

import random
from collections import Counter, OrderedDict, defaultdict, deque
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ckptstore as cs

HERE = Path(__file__).parent


def plain_state(step: int) -> dict[str, Any]:
    """Values of every kind that a tree can hold."""
    return {
        "int": 2**70 + step,
        "float": [0.1, -0.0, float("inf")],
        "text": "größer ✓",
        "bytes": b"\x00\xff" * 3,
        "tuple": (1, (2, 3)),
        "set": {1, 2},
        "ordered": OrderedDict(b=1, a=2),
        "default": defaultdict(list, x=[1]),
        "counter": Counter("aab"),
        "deque": deque([1, 2], maxlen=5),
        "keys": {1: "one", (2, "b"): "two", None: "none"},
        "complex": 1 + 2j,
        "size": torch.Size([2, 3]),
        "dtype": torch.bfloat16,
        "array": np.arange(6, dtype=">i2").reshape(2, 3),
        "scalar": np.float32(1.5),
        "tensors": {
            str(dtype).removeprefix("torch."): (torch.arange(6).reshape(2, 3) % 2).to(dtype)
            for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.bool, torch.complex128, torch.int64)
        },
    }


def trained(steps: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A small model after some steps, the same on every machine."""
    model = torch.nn.Linear(3, 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.arange(parameter.numel()).reshape(parameter.shape) / 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    return model, optimizer


def tuned() -> torch.nn.Module:
    """Half of it is frozen."""
    model = torch.nn.Sequential(trained(0)[0], trained(2)[0])
    model[0].requires_grad_(False)
    return model


def exponents() -> dict[str, torch.Tensor]:
    """Numbers whose exponents compress and whose mantissas don't."""
    # Integers and one division, which every machine rounds alike.
    parts = (torch.arange(1, 3000) * 2654435761 % 8388593).double() / 8388593
    return {"fp32": parts.float(), "bf16": parts.bfloat16(), "fp16": parts.half(), "fp64": parts}


def first(root: Path) -> None:
    """The store of the first version."""
    random.seed(0)
    with cs.open(root) as store:
        for step in (0, 2):
            model, optimizer = trained(step)
            state = {"model": model, "optimizer": optimizer, "plain": plain_state(step)}
            store.save(state, step=step, epoch=step // 2, metrics={"val_loss": 3.0 - step}, reasons=[f"step {step}"])
        store.save({"plain": plain_state(9)}, step=9)
        store.hold("step:2", "release")
        store.delete("step:9")
    with cs.open(root, compression="zstd") as store:
        store.save({"zeros": torch.zeros(5000)}, step=3, reasons=["encoded"])
    with cs.open(root, compression="float-zstd") as store:
        for step in (4, 5):
            store.save({"model": tuned(), "values": exponents()}, step=step, reasons=["frozen, and borrowed at step 5"])


def timed(root: Path) -> None:
    """Checkpoints that tell how long their saves took, and one verification of both."""
    with cs.open(root) as store:
        store.save({"weights": torch.arange(3.0)}, step=1)
        store.save({"weights": torch.arange(4.0)}, step=2, mode="async").result()
        store.rollback("step:1")
        store.verify()


def main() -> None:
    """Write those that aren't there: one that exists is never changed."""
    for name, write in {"v1": first, "timed1": timed}.items():
        if not (HERE / name).exists():
            write(HERE / name)


if __name__ == "__main__":
    main()
