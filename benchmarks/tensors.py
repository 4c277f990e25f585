"""States for the benchmarks: GPT-2 with its optimizer, and very many small tensors."""

from __future__ import annotations

import torch


def gpt2_adamw(width: int = 768, layers: int = 12, tokens: int = 50257) -> dict[str, torch.Tensor]:
    """GPT-2 124M in fp32 with AdamW's two moments: 148 parameters, 444 tensors, 1.49 GB of random numbers.

    Shapes: https://huggingface.co/openai-community/gpt2 (12 layers, 768 wide, 50257 tokens, 1024 positions).
    """
    shapes = {"wte.weight": (tokens, width), "wpe.weight": (1024, width)}
    for layer in range(layers):
        block = {
            "ln_1.weight": (width,),
            "ln_1.bias": (width,),
            "attn.c_attn.weight": (width, 3 * width),
            "attn.c_attn.bias": (3 * width,),
            "attn.c_proj.weight": (width, width),
            "attn.c_proj.bias": (width,),
            "ln_2.weight": (width,),
            "ln_2.bias": (width,),
            "mlp.c_fc.weight": (width, 4 * width),
            "mlp.c_fc.bias": (4 * width,),
            "mlp.c_proj.weight": (4 * width, width),
            "mlp.c_proj.bias": (width,),
        }
        shapes |= {f"h.{layer}.{name}": shape for name, shape in block.items()}
    shapes |= {"ln_f.weight": (width,), "ln_f.bias": (width,)}
    kinds = ("parameter", "exp_avg", "exp_avg_sq")
    return {f"{kind}.{name}": torch.randn(*shape) for kind in kinds for name, shape in shapes.items()}


def many(count: int = 100_000) -> dict[str, torch.Tensor]:
    """``count`` tensors of 1 KiB."""
    return {f"t{number:06d}": torch.randn(256) for number in range(count)}
