"""Calls that `tools.build` compiles and `tools.traffic` counts, and the cost at real model sizes."""

from __future__ import annotations

from typing import Any

import torch

from ..common.costs import Cost, nbytes
from . import token_mlp


def _inputs(samples: int, tokens: int, hidden: int, channels: int, dtype: torch.dtype) -> dict[str, Any]:
    shapes = {
        "x": (samples, tokens, channels),
        "w1": (hidden, tokens),
        "b1": (hidden,),
        "w2": (tokens, hidden),
        "b2": (tokens,),
    }
    return {k: torch.randn(s).to(dtype) for k, s in shapes.items()}


def _both(dtype: torch.dtype, activation: str = "gelu") -> dict[str, int]:
    inputs = {k: t.requires_grad_() for k, t in _inputs(2, 49, 96, 64, dtype).items()}
    y = token_mlp(**inputs, activation=activation, backend="triton")
    grads = torch.autograd.grad(y, list(inputs.values()), torch.ones_like(y))
    return {"bytes": nbytes(*inputs.values(), y, y, *grads), "flops": 12 * 2 * 49 * 96 * 64}  # y: also dy


def case_forward() -> dict[str, int]:
    """Inference in bfloat16."""
    inputs = _inputs(2, 49, 96, 64, torch.bfloat16)
    with torch.no_grad():
        y = token_mlp(**inputs, backend="triton")
    return {"bytes": nbytes(*inputs.values(), y), "flops": 4 * 2 * 49 * 96 * 64}


def case_backward() -> dict[str, int]:
    """Forward and backward in bfloat16."""
    return _both(torch.bfloat16)


def case_backward_float32() -> dict[str, int]:
    """Forward and backward in float32, exact products."""
    return _both(torch.float32, "silu")


case_forward.matmul = True
case_backward.matmul = True


def roofline() -> list[Cost]:
    """Mixer-B/16 at 224 x 224 and batch 64."""
    samples, tokens, hidden, channels = 64, 196, 384, 768
    numbers, weights, flops = samples * tokens * channels, 2 * tokens * hidden, 4 * samples * tokens * hidden * channels
    size = "Mixer-B/16: (64, 196, 768) bf16, 384 hidden"
    return [
        Cost("token_mlp forward", size, 2 * (2 * numbers + weights), flops),
        Cost("token_mlp with backward", size, 2 * (4 * numbers + 2 * weights), 3 * flops),
    ]
