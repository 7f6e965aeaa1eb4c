"""Calls that `tools.build` compiles and `tools.traffic` counts, and the cost at real model sizes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.costs import Cost, nbytes
from . import shift


def _both(x: Tensor, **options) -> dict[str, int]:
    x = x.requires_grad_()
    y = shift(x, backend="triton", **options)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    return {"bytes": nbytes(x, y, y, dx)}  # y: also dy


def case_zeros() -> dict[str, int]:
    """S2-MLP: one pixel in each of four directions."""
    return _both(torch.randn(2, 14, 14, 64), shifts=[(0, 1), (0, -1), (1, 0), (-1, 0)])


def case_wrap() -> dict[str, int]:
    """MS-MLP: five circular shifts along an axis."""
    return _both(torch.randn(2, 14, 14, 80).bfloat16(), shifts=[(d, 0) for d in range(-2, 3)], padding="wrap")


def case_sequence() -> dict[str, int]:
    """Over a sequence."""
    return _both(torch.randn(2, 50, 64), shifts=[1, 0])


def roofline() -> list[Cost]:
    """S2-MLP-wide at 224 x 224 and batch 64."""
    tokens, size = 2 * 64 * 14 * 14 * 384, "S2-MLP: (64, 14, 14, 384) bf16"
    return [Cost("shift forward", size, 2 * tokens), Cost("shift with backward", size, 4 * tokens)]
