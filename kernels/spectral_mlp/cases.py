"""Calls that `tools.build` compiles and `tools.traffic` counts, and the cost at real model sizes."""

from __future__ import annotations

from typing import Any

import torch

from ..common.costs import Cost, nbytes
from . import spectral_mlp


def _inputs(shape: tuple[int, ...], blocks: int, *, modes_inner: bool = False) -> dict[str, Any]:
    width = shape[-1] // blocks
    x = torch.randn(shape, dtype=torch.complex64)
    if modes_inner:  # as a Fourier transform over (H, W) returns it
        x = torch.randn(shape[0], shape[-1], *shape[1:-1], dtype=torch.complex64).movedim(1, -1)
    shapes = {"w1": (width, width), "b1": (width,), "w2": (width, width), "b2": (width,)}
    return {"x": x} | {k: 0.1 * torch.randn(2, blocks, *s) for k, s in shapes.items()}


def _flops(inputs: dict[str, Any]) -> int:
    return 16 * inputs["x"].numel() * inputs["w1"].shape[-1]


def _forward(shape: tuple[int, ...], blocks: int) -> dict[str, int]:
    inputs = _inputs(shape, blocks)
    with torch.no_grad():
        y = spectral_mlp(**inputs, backend="triton")
    return {"bytes": nbytes(*inputs.values(), y), "flops": _flops(inputs)}


def _both(shape: tuple[int, ...], blocks: int, **options: bool) -> dict[str, int]:
    inputs = {k: t.requires_grad_() for k, t in _inputs(shape, blocks, **options).items()}
    y = spectral_mlp(**inputs, backend="triton")
    grads = torch.autograd.grad(y, list(inputs.values()), torch.ones_like(y))
    return {"bytes": nbytes(*inputs.values(), y, y, *grads), "flops": 3 * _flops(inputs)}  # y: also dy


def case_forward() -> dict[str, int]:
    """Inference, 4 blocks of 16 channels."""
    return _forward((2, 14, 8, 64), 4)


def case_forward_32() -> dict[str, int]:
    """Inference, 2 blocks of 32 channels, whose weights stay in registers."""
    return _forward((2, 14, 8, 64), 2)


def case_forward_96() -> dict[str, int]:
    """Inference, 2 blocks of 96 channels as in AFNO-B, whose weights do not."""
    return _forward((1, 14, 8, 192), 2)


def case_backward() -> dict[str, int]:
    """Forward and backward, 4 blocks of 16 channels."""
    return _both((2, 14, 8, 64), 4)


def case_backward_modes_inner() -> dict[str, int]:
    """Forward and backward, 4 blocks of 16 channels, modes innermost in memory."""
    return _both((2, 14, 8, 64), 4, modes_inner=True)


def roofline() -> list[Cost]:
    """AFNO-B at 64 x 64 tokens and batch 8: 8 blocks of 96 channels."""
    numbers, weights = 8 * 64 * 33 * 768, 8 * 4 * (96 * 96 + 96)
    size, flops = "AFNO-B: (8, 64, 33, 768) complex64, 8 blocks", 16 * numbers * 96
    return [
        Cost("spectral_mlp forward", size, 16 * numbers + 4 * weights, flops),
        Cost("spectral_mlp with backward", size, 32 * numbers + 8 * weights, 3 * flops),
    ]
