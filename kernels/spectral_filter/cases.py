"""Calls that `tools.build` compiles and `tools.traffic` counts, and the cost at real model sizes."""

from __future__ import annotations

import torch

from ..common.costs import Cost, nbytes
from . import spectral_filter


def _both(w_shape: tuple[int, ...]) -> dict[str, int]:
    x = torch.randn(4, 14, 8, 32, dtype=torch.complex64).requires_grad_()
    w = torch.randn(w_shape, dtype=torch.complex64).requires_grad_()
    y = spectral_filter(x, w, backend="triton")
    grads = torch.autograd.grad(y, (x, w), torch.ones_like(y))
    return {"bytes": nbytes(x, w, y, y, *grads)}  # y: also dy


def case_forward() -> dict[str, int]:
    """One filter, inference."""
    x, w = torch.randn(4, 14, 8, 32, dtype=torch.complex64), torch.randn(14, 8, 32, dtype=torch.complex64)
    with torch.no_grad():
        y = spectral_filter(x, w, backend="triton")
    return {"bytes": nbytes(x, w, y)}


def case_backward_shared() -> dict[str, int]:
    """GFNet: one filter; forward and backward."""
    return _both((14, 8, 32))


def case_backward_adaptive() -> dict[str, int]:
    """AFFNet: a filter for each sample; forward and backward."""
    return _both((4, 14, 8, 32))


def roofline() -> list[Cost]:
    """GFNet-B at 224 x 224 and batch 64."""
    numbers, shared = 64 * 14 * 8 * 512, 14 * 8 * 512
    return [
        Cost("spectral_filter forward", "GFNet-B: (64, 14, 8, 512) complex64", 16 * numbers + 8 * shared,
             other=6 * numbers),
        Cost("spectral_filter with backward", "GFNet-B: (64, 14, 8, 512) complex64", 32 * numbers + 16 * shared,
             other=20 * numbers),
    ]  # fmt: skip
