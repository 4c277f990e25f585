"""What is saved: GPT-2 on the CPU with its AdamW, or with adapters beside a frozen base."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from examples.gpt import GPT


@dataclass(frozen=True)
class Size:
    """Of the model (``layers``, ``width``, ``heads``, ``vocabulary`` and ``context`` tokens) and of one step's batch
    (``batch`` rows of ``length`` tokens)."""

    layers: int
    width: int
    heads: int
    vocabulary: int
    context: int
    batch: int
    length: int


GPT2 = Size(layers=12, width=768, heads=12, vocabulary=50257, context=1024, batch=1, length=128)
"""124M parameters in 148 tensors, the head tied to the tokens; a step takes about 2 s on two cores."""

TINY = Size(layers=1, width=32, heads=2, vocabulary=128, context=32, batch=1, length=16)
"""Too small to measure anything: what is set up at the first use, and tests."""


class Workload:
    """A model in training, whose optimizer has state already.

    Attributes:
        model, optimizer: a ``GPT``, where no other model is given, and an ``AdamW`` over its parameters that want
            gradients.
        state: both by name, as ckptstore takes them.
    """

    def __init__(self, size: Size, *, adapter_rank: int | None = None, model: nn.Module | None = None) -> None:
        torch.manual_seed(0)
        self.size = size
        self.model = gpt(size) if model is None else model
        if adapter_rank is not None:
            adapt(self.model, adapter_rank)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5)
        self.state = {"model": self.model, "optimizer": self.optimizer}
        for parameter in self.trained:
            parameter.grad = torch.randn_like(parameter)
        self.optimizer.step()

    def forward_backward(self) -> None:
        """Gradients of one batch of random tokens."""
        self.optimizer.zero_grad()
        self.loss(torch.stack([self.row() for _ in range(self.size.batch)])).backward()

    def row(self) -> torch.Tensor:
        """Random tokens to learn from, and the one after them."""
        return torch.randint(self.size.vocabulary, (self.size.length + 1,))

    def loss(self, rows: torch.Tensor) -> torch.Tensor:
        """Of a batch of such rows."""
        loss: torch.Tensor = self.model(rows[:, :-1], rows[:, 1:])
        return loss

    def plain(self) -> dict[str, Any]:
        """The state as dicts of tensors, for those that take no live objects; tied tensors once."""
        parameters = {name: parameter.detach() for name, parameter in self.model.named_parameters()}
        return {"model": parameters, "optimizer": self.optimizer.state_dict()}

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors of ``plain`` by one flat name each; they share memory with the run."""
        return dict(_flat(self.plain(), ""))

    @property
    def bytes(self) -> int:
        """Of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())


def gpt(size: Size) -> GPT:
    """The model alone, its weights drawn at random."""
    model = GPT(layers=size.layers, width=size.width, heads=size.heads, context=size.context)
    # The example predicts bytes; only these two know how many different tokens there are.
    model.token = nn.Embedding(size.vocabulary, size.width)
    model.head = nn.Linear(size.width, size.vocabulary, bias=False)
    nn.init.normal_(model.token.weight, std=0.02)
    model.head.weight = model.token.weight
    return model


def adapt(model: GPT, rank: int) -> None:
    """Freeze ``model`` and give its attention adapters of that rank."""
    model.requires_grad_(False)
    for block in model.blocks:
        block.qkv = Adapted(block.qkv, rank)
        block.out = Adapted(block.out, rank)


class Adapted(nn.Module):
    """A frozen linear layer with a trained product of two thin matrices added, as LoRA has it."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        adapted: torch.Tensor = self.base(x) + self.up(self.down(x))
        return adapted


def _flat(tree: dict[Any, Any], prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in tree.items():
        if isinstance(value, torch.Tensor):
            yield f"{prefix}{name}", value
        elif isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
