"""Calls that `tools.build` compiles and `tools.traffic` counts, and the cost at real model sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common.costs import Cost, nbytes
from . import selective_scan, selective_scan_step


def _inputs(batch: int, length: int, channels: int, states: int, groups: int, dtype: torch.dtype) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return {
        "u": normal(batch, length, channels),
        "delta": normal(batch, length, channels),
        "A": -torch.rand(channels, states, generator=generator),
        "B": normal(batch, length, groups, states),
        "C": normal(batch, length, groups, states),
        "D": normal(channels, dtype=torch.float32),
        "z": normal(batch, length, channels),
        "delta_bias": normal(channels, dtype=torch.float32),
    }


def case_forward() -> dict[str, int]:
    """Inference, every option."""
    inputs = _inputs(1, 128, 128, 16, 1, torch.bfloat16)
    with torch.no_grad():
        y, state = selective_scan(**inputs, delta_softplus=True, return_final_state=True, backend="triton")
    return {"bytes": nbytes(*inputs.values(), y, state)}


def _backward(inputs: dict[str, Any], **options: Any) -> dict[str, int]:
    inputs = {k: v.requires_grad_() for k, v in inputs.items()}
    y: Any = selective_scan(**inputs, delta_softplus=True, backend="triton", **options)
    grads = torch.autograd.grad(y, list(inputs.values()), torch.ones_like(y))
    return {"bytes": nbytes(*inputs.values(), *options.values(), y, y, *grads)}  # y twice: its gradient is read, too


def case_backward() -> dict[str, int]:
    """Forward and backward, every option."""
    return _backward(_inputs(1, 128, 128, 16, 1, torch.bfloat16))


def case_backward_float32_documents() -> dict[str, int]:
    """Forward and backward in float32, with two groups and documents."""
    ids = torch.arange(100)[None] // 40
    return _backward(_inputs(1, 100, 64, 8, 2, torch.float32), document_ids=ids)


def case_step() -> dict[str, int]:
    """One token."""
    i = {
        k: v[:, 0] if k in ("u", "delta", "B", "C", "z") else v
        for k, v in _inputs(2, 1, 256, 16, 1, torch.bfloat16).items()
    }
    state = torch.zeros(2, 256, 16)
    y, state = selective_scan_step(
        i["u"], i["delta"], i["A"], i["B"], i["C"], i["D"], state,
        z_t=i["z"], delta_bias=i["delta_bias"], delta_softplus=True, backend="triton",
    )  # fmt: skip
    return {"bytes": nbytes(*i.values(), y, state, state)}


def _cost(label: str, model: str, batch: int, length: int, channels: int, groups: int, states: int = 16) -> list[Cost]:
    """bfloat16 activations with the gate z. Of each state: forward 7 flops, forward and backward 27."""
    tokens, numbers = batch * length, batch * length * channels
    shared, parameters = 2 * 2 * tokens * groups * states, 4 * channels * (states + 2)
    size = f"{model}: ({batch}, {length}, {channels}), {groups} groups, {states} states, bf16"
    forward = 2 * 4 * numbers + shared + parameters
    both = 2 * 8 * numbers + 2 * shared + 2 * parameters
    return [
        Cost(f"{label} forward", size, forward, other=(7 * states + 12) * numbers),
        Cost(f"{label} with backward", size, both, other=(27 * states + 40) * numbers),
    ]


def roofline() -> list[Cost]:
    """Layers of published models."""
    step = 4 * 64 * 1536 * 16 * 2 + 2 * 64 * (4 * 1536 + 2 * 16) + 4 * 1536 * 18
    return [
        *_cost("selective_scan", "Mamba-130M", 8, 2048, 1536, 1),
        *_cost("selective_scan", "Mamba-2.8B", 8, 2048, 5120, 1),
        *_cost("selective_scan", "VMamba-T stage 1 at 224", 128, 3136, 768, 4, 1),
        Cost("selective_scan_step", "Mamba-130M: (64, 1536), 16 states, bf16", step, other=64 * 1536 * (7 * 16 + 12)),
    ]
