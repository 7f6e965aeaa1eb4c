"""Calls that `tools.build` compiles and `tools.traffic` counts, and the cost at real model sizes."""

from __future__ import annotations

from typing import Any

import torch

from ..common.costs import Cost, nbytes
from . import causal_conv1d, causal_conv1d_step


def _inputs(batch: int, length: int, channels: int, taps: int, dtype: torch.dtype) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (batch, length, channels), "weight": (channels, taps), "bias": (channels,)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def case_forward() -> dict[str, int]:
    """Inference with SiLU."""
    inputs = _inputs(1, 64, 256, 4, torch.bfloat16)
    y: Any = causal_conv1d(**inputs, activation="silu", backend="triton")
    return {"bytes": nbytes(*inputs.values(), y)}


def _backward(dtype: torch.dtype, **options: Any) -> dict[str, int]:
    inputs = _inputs(1, 64, 128, 4, dtype) | {k: v for k, v in options.items() if v.is_floating_point()}
    inputs = {k: v.requires_grad_() for k, v in inputs.items()}
    integers = {k: v for k, v in options.items() if not v.is_floating_point()}
    y: Any = causal_conv1d(**inputs, **integers, activation="silu", backend="triton")
    grads = torch.autograd.grad(y, list(inputs.values()), torch.ones_like(y))
    return {"bytes": nbytes(*inputs.values(), *integers.values(), y, y, *grads)}


def case_backward() -> dict[str, int]:
    """Forward and backward with SiLU."""
    return _backward(torch.bfloat16)


def case_backward_float32_documents() -> dict[str, int]:
    """Forward and backward in float32 with an initial state and documents."""
    return _backward(
        torch.float32, initial_state=torch.zeros(1, 3, 128), document_ids=(torch.arange(64) // 25)[None].int()
    )


def case_step() -> dict[str, int]:
    """One token."""
    inputs = _inputs(4, 1, 512, 4, torch.bfloat16)
    x, state = inputs["x"][:, 0], torch.zeros(4, 3, 512, dtype=torch.bfloat16)
    y, new = causal_conv1d_step(x, inputs["weight"], inputs["bias"], state, activation="silu", backend="triton")
    return {"bytes": nbytes(x, inputs["weight"], inputs["bias"], state, y, new)}


def roofline() -> list[Cost]:
    """The convolution of Mamba-130M, with SiLU."""
    numbers, taps = 8 * 2048 * 1536, 4
    parameters = 2 * 1536 * (taps + 1)
    size = "Mamba-130M: (8, 2048, 1536), 4 taps, bf16"
    return [
        Cost("causal_conv1d forward", size, 2 * 2 * numbers + parameters, other=(2 * taps + 5) * numbers),
        Cost("causal_conv1d with backward", size, 2 * 4 * numbers + 2 * parameters, other=(8 * taps + 16) * numbers),
        Cost(
            "causal_conv1d_step", "Mamba-130M: (64, 1536), 4 taps, bf16",
            2 * 64 * 1536 * (2 + 2 * (taps - 1)) + parameters, other=64 * 1536 * (2 * taps + 5),
        ),
    ]  # fmt: skip
