"""Train a small GPT on the sources of Python's standard library; killed at any moment, it continues by itself.

    python examples/train_gpt.py --store runs/gpt --log runs/gpt.jsonl

Kill it and start it again with the same flags: it goes on after the newest checkpoint, and the losses are those of
a run that was never killed, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sysconfig
from pathlib import Path

import numpy as np
import torch
from gpt import GPT

import ckptstore as cs

LEARNING_RATE = 3e-4
WARM_UP = 0.1


def main() -> None:
    args = parse_flags()
    torch.manual_seed(args.seed)
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.use_deterministic_algorithms(True)
    # With several threads the last bits of a sum may depend on how the machine shares them out: seen here once in
    # ten runs beside other work. One thread repeats itself exactly.
    torch.set_num_threads(args.threads)

    text = read_text()
    model = GPT(layers=args.layers, width=args.width, heads=args.width // 32, context=args.context)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warm_up_then_cosine(step, args.steps))
    sampling = torch.Generator().manual_seed(args.seed)
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "sampling": sampling}

    args.log.parent.mkdir(parents=True, exist_ok=True)
    with cs.Checkpointer(args.store, state, save=cs.every(steps=args.save_every)) as ckpt, args.log.open("a") as log:
        ckpt.resume()
        while ckpt.progress.step < args.steps:
            batch = sample(text, args.batch, args.context, sampling)
            loss = train_step(model, optimizer, scheduler, batch)
            ckpt.step(loss=loss, tokens=batch.numel())
            log.write(json.dumps({"step": ckpt.progress.step, "loss": loss, "hex": loss.hex()}) + "\n")
            log.flush()


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", required=True, help="where the checkpoints go: a path or URL")
    parser.add_argument("--log", type=Path, required=True, help="JSON lines are added here: step, loss, loss in hex")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--save-every", type=int, default=50, metavar="STEPS")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=256, help="a multiple of 32")
    parser.add_argument("--context", type=int, default=128, help="bytes the model sees")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="more are faster, and not always repeatable")
    return parser.parse_args()


def read_text() -> torch.Tensor:
    """Real text that every machine has: the modules of Python's standard library, as one tensor of bytes."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8)


def sample(text: torch.Tensor, batch: int, context: int, generator: torch.Generator) -> torch.Tensor:
    """``batch`` random windows of ``context`` + 1 bytes."""
    starts = torch.randint(len(text) - context, (batch, 1), generator=generator)
    return text[starts + torch.arange(context + 1)].long()


def train_step(
    model: GPT,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    batch: torch.Tensor,
) -> float:
    loss: torch.Tensor = model(batch[:, :-1], batch[:, 1:])
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    scheduler.step()
    return loss.item()


def warm_up_then_cosine(step: int, steps: int) -> float:
    """Factor on the learning rate: up in the first tenth, then down along a cosine to a tenth."""
    warm_up = max(1, round(WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    done = (step - warm_up) / max(1, steps - warm_up)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * done))


if __name__ == "__main__":
    main()
