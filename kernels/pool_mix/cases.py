"""Calls that `tools.build` compiles and `tools.traffic` counts, and the cost at real model sizes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.costs import Cost, nbytes
from . import pool_mix


def _both(x: Tensor, **options) -> dict[str, int]:
    x = x.requires_grad_()
    y = pool_mix(x, backend="triton", **options)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    return {"bytes": nbytes(x, y, y, dx, *(t for t in options.values() if isinstance(t, Tensor)))}  # y: also dy


def case_forward() -> dict[str, int]:
    """PoolFormer's window, inference."""
    x = torch.randn(1, 28, 28, 64)
    with torch.no_grad():
        y = pool_mix(x, backend="triton")
    return {"bytes": nbytes(x, y)}


def case_backward() -> dict[str, int]:
    """PoolFormer's window, forward and backward."""
    return _both(torch.randn(1, 14, 14, 64))


def case_backward_half() -> dict[str, int]:
    """In bfloat16, with a larger window."""
    return _both(torch.randn(1, 14, 14, 64).bfloat16(), pool_size=5)


def case_backward_masked() -> dict[str, int]:
    """With a mask."""
    return _both(torch.randn(1, 14, 14, 64), mask=torch.ones(1, 14, 14, dtype=torch.bool))


def case_backward_causal() -> dict[str, int]:
    """Over a sequence with documents."""
    return _both(torch.randn(1, 128, 64), causal=True, document_ids=torch.arange(128)[None] // 50)


def case_backward_video() -> dict[str, int]:
    """Over three axes."""
    return _both(torch.randn(1, 4, 8, 8, 32))


def roofline() -> list[Cost]:
    """PoolFormer-S12 at 224 x 224 and batch 64, its first stage; forward, and forward and backward."""
    numbers = 64 * 56 * 56 * 64
    return [
        Cost("pool_mix forward", "PoolFormer-S12 stage 1: (64, 56, 56, 64) bf16", 2 * 2 * numbers, other=11 * numbers),
        Cost("pool_mix with backward", "PoolFormer-S12 stage 1, bf16", 4 * 2 * numbers, other=23 * numbers),
    ]
