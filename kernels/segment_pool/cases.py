"""Calls that `tools.build` compiles and `tools.traffic` counts, and the cost at real model sizes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.costs import Cost, nbytes
from . import segment_pool


def _both(dtype: torch.dtype, mask: Tensor | None) -> dict[str, int]:
    segment, local = (torch.randn(2, 100, 64, dtype=dtype).requires_grad_() for _ in range(2))
    y = segment_pool(segment, local, segment_length=16, mask=mask, backend="triton")
    grads = torch.autograd.grad(y, (segment, local), [torch.ones_like(t) for t in y])
    return {"bytes": nbytes(segment, local, mask, *y, *y, *grads)}  # y twice: their gradients are read, too


def case_forward() -> dict[str, int]:
    """Inference."""
    segment, local = torch.randn(2, 100, 64), torch.randn(2, 100, 64)
    with torch.no_grad():
        y = segment_pool(segment, local, segment_length=16, backend="triton")
    return {"bytes": nbytes(segment, local, *y)}


def case_backward() -> dict[str, int]:
    """Forward and backward."""
    return _both(torch.float32, None)


def case_backward_masked_half() -> dict[str, int]:
    """Forward and backward in bfloat16 with a mask."""
    return _both(torch.bfloat16, torch.ones(2, 100, dtype=torch.bool))


def roofline() -> list[Cost]:
    """PoNet-base at 512 tokens and batch 32."""
    numbers, size = 32 * 512 * 768, "PoNet-base: (32, 512, 768) bf16"
    return [
        Cost("segment_pool forward", size, 2 * 4 * numbers, other=3 * numbers),  # three maxima
        Cost("segment_pool with backward", size, 2 * 8 * numbers, other=8 * numbers),
    ]
